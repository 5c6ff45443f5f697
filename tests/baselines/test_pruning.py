"""First-order pruning: its schedule, its share, its scores."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_lossless_lr.baselines.pruning import BEGIN, END, FirstOrderPruning, kept, share_kept

STEPS, RATE, SHARE = 10, 0.05, 0.4


def test_the_share_falls_from_one_to_the_asked_one_by_a_cube():
    shares = [share_kept(step / 100, 0.2) for step in range(101)]
    assert shares[: int(100 * BEGIN) + 1] == [1.0] * (int(100 * BEGIN) + 1)
    assert shares[70:] == pytest.approx([0.2] * 31)
    assert all(one >= other for one, other in pairwise(shares))
    assert share_kept((BEGIN + END) / 2, 0.2) == pytest.approx(0.2 + 0.8 / 8)


@pytest.mark.parametrize("share", [0.0, 0.35, 0.5, 1.0])
@pytest.mark.parametrize("values", [torch.arange(40.0), torch.zeros(40)], ids=["different", "all the same"])
def test_exactly_the_share_is_kept_whatever_the_scores(values, share):
    scores = values[torch.randperm(40, generator=torch.Generator().manual_seed(0))].view(5, 8)
    mask = kept(scores, share)
    assert mask.sum() == round(40 * share)
    if len(values.unique()) > 1 and 0 < share < 1:
        assert scores[mask].min() > scores[~mask].max()


def test_weights_and_scores_are_those_of_a_loop_with_masks():
    """Against a loop that has the gradient of least squares in closed form, and masks in the products."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 4, bias=False).double()
    x, y = (torch.randn(30, width, generator=generator, dtype=torch.float64) for width in (6, 4))
    weight = layer.weight.detach().clone()
    scores = torch.zeros_like(weight)
    for step in range(STEPS):
        count = round(share_kept(step / STEPS, SHARE) * weight.numel())
        mask = (scores.flatten().argsort(descending=True).argsort() < count).view(weight.shape)
        gradient = 2 * (x @ (weight * mask).mT - y).mT @ x / len(x)
        scores = scores + (weight * gradient).abs()
        weight = weight - RATE * mask * gradient

    pruning = FirstOrderPruning({"layer": layer}, SHARE)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)
    for step in range(STEPS):
        state = SimpleNamespace(global_step=step, max_steps=STEPS)
        pruning.on_step_begin(None, state, None)
        (layer(x) - y).square().sum(-1).mean().backward()
        pruning.on_pre_optimizer_step(None, state, None)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(pruning.scores["layer"], scores)
    torch.testing.assert_close(layer.weight.detach(), weight)
    pruning.finish()
    assert (layer.weight != 0).sum() == round(SHARE * weight.numel())
    assert scores[layer.weight != 0].min() > scores[layer.weight == 0].max()
