"""Rank masks: a budget that holds, gradients of its solution, and ranks that go where they are needed."""

import math
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny_models import TINY_MODELS, split_batch
from torch import nn

from hf_lossless_lr.baselines import Recipe, compare, masked_ranks
from hf_lossless_lr.baselines.rank_masks import Budget, RankMask
from hf_lossless_lr.baselines.truncation import truncated
from hf_lossless_lr.checkpoint import LosslessLowRankConfig
from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.fingerprint import tensors_fingerprint
from hf_lossless_lr.layers import find_targets, in_place, weight_matrices
from hf_lossless_lr.pipeline import LowRankCompressor

BLOCK = "bert.encoder.layer"
LAYERS = {
    "linear": (nn.Linear(12, 8), (3, 12)),
    "convolution": (nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "grouped": (nn.Conv2d(8, 8, 3, groups=2), (2, 8, 5, 5)),
}


@pytest.fixture(scope="module")
def calibrated():
    model, batch = TINY_MODELS["bert-sequence-classification"](60)
    compressor = LowRankCompressor(LosslessLowRankConfig.from_preset("svd"))
    compressor.calibrate(model, split_batch(batch, 20))
    yield model, find_targets(model).chosen, compressor
    compressor.release()


@pytest.fixture
def budget():
    torch.manual_seed(3)
    sizes = [(16, 16), (16, 40), (24, 16)]
    layers = [nn.Linear(*size) for size in sizes]
    masks = [
        RankMask(truncated(layer, min(size)), layer.weight.numel()) for layer, size in zip(layers, sizes, strict=True)
    ]
    for mask in masks:
        nn.init.normal_(mask.logits, std=2.0)
    return Budget({str(n): mask.double() for n, mask in enumerate(masks)}, 0.5)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_mask_that_keeps_all_is_the_dense_layer_and_one_that_keeps_some_a_lower_rank(kind):
    layer, shape = LAYERS[kind]
    matrices = weight_matrices(layer)
    rank, x = min(matrices.shape[1:]), torch.randn(*shape)
    mask = RankMask(truncated(layer, rank), matrices.numel())
    with torch.no_grad():
        mask.logits.fill_(100.0)
        torch.testing.assert_close(mask(x), layer(x), atol=1e-5, rtol=1e-4)
        mask.logits[2:] = -100.0
        torch.testing.assert_close(mask(x), truncated(layer, 2)(x), atol=1e-5, rtol=1e-4)
    assert mask.each * rank == sum(matrices.shape[1:]) * len(matrices) * rank


def test_a_component_is_drawn_as_often_as_its_probability_says():
    torch.manual_seed(0)
    mask = RankMask(truncated(nn.Linear(4, 4, bias=False), 1), 16)
    with torch.no_grad():
        mask.logits.fill_(1.0)
        mask.offset = torch.tensor(0.5)
        whole = mask.factors(torch.eye(4))
        shares = torch.stack([(mask(torch.eye(4)) / whole).mean() for _ in range(2000)])
    assert (shares > 0.5).double().mean() == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.035)


@pytest.mark.parametrize("share", [1.2, 0.9, 0.5, 0.2, 0.07])
def test_what_is_expected_to_be_kept_is_the_budget(budget, share):
    budget.set_offset(share)
    expected = sum(
        mask.each * sum(1 / (1 + math.exp(mask.offset.item() - logit)) for logit in mask.logits.tolist())
        for mask in budget.masks
    )
    assert expected == pytest.approx(share * sum(mask.dense for mask in budget.masks), rel=1e-9)


def test_the_budget_sinks_from_everything_to_the_wanted_share(budget):
    shares = []
    budget.set_offset = shares.append
    for step in range(20):
        budget.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=20), None)
    assert shares[0] == sum(m.each * len(m.logits) for m in budget.masks) / sum(m.dense for m in budget.masks)
    assert (np.diff(shares)[:15] < 0).all()
    assert shares[15:] == [0.5] * 5


def test_with_everything_kept_no_mask_takes_anything_away(budget):
    budget.set_offset(budget.full)
    assert all((mask.logits - mask.offset > 25).all() for mask in budget.masks)


def test_the_gradient_of_the_offset_is_that_of_the_solution(budget):
    """Against central differences of the bisection."""
    budget.set_offset(0.3)
    budget.masks[0].offset.backward()
    for mask in budget.masks:
        for place in (0, len(mask.logits) - 1):
            found, step = mask.logits.grad[place].item(), 1e-4
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    mask.logits[place] += sign * step
                budget.set_offset(0.3)
                ends.append(mask.offset.item())
                with torch.no_grad():
                    mask.logits[place] -= sign * step
            assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_the_highest_logits_that_the_budget_pays_for_are_kept(budget, share):
    budget.keep_ratio = share
    most = share * sum(mask.dense for mask in budget.masks)
    logits = sorted((logit.item() for mask in budget.masks for logit in mask.logits), reverse=True)

    def size(kept):
        return sum(min(mask.each * int(each.sum()), mask.dense) for mask, each in zip(budget.masks, kept, strict=True))

    def above(number):
        return [mask.logits >= logits[number - 1] for mask in budget.masks]

    number = max(n for n in range(1, len(logits) + 1) if size(above(n)) <= most)
    assert all(map(torch.equal, budget.kept(), above(number)))


def test_a_size_that_no_rank_has_is_an_error_before_any_training(calibrated, monkeypatch):
    model, targets, compressor = calibrated
    monkeypatch.setattr("hf_lossless_lr.baselines.rank_masks.train", None)
    with pytest.raises(ConfigurationError, match=r"keep_ratio=0.001 cannot be reached"):
        masked_ranks(targets, 0.001, model=model, data=None, statistics=compressor.calibration_statistics)


def test_a_layer_that_nothing_hears_gives_its_ranks_to_the_others(calibrated):
    """The outputs of a block are taken away: of what leads to them one component is left, the least there is."""
    model, _, compressor = calibrated
    model = deepcopy(model)
    with torch.no_grad():
        model.get_submodule(f"{BLOCK}.1.output.dense").weight.zero_()
    unheard = f"{BLOCK}.1.intermediate.dense"
    targets = {f"{BLOCK}.{block}.intermediate.dense": None for block in (0, 1)}
    targets = {name: model.get_submodule(name) for name in targets}
    before = tensors_fingerprint(model.state_dict())
    masked = partial(
        masked_ranks,
        targets,
        model=model,
        data=compressor.calibration_data,
        statistics=compressor.calibration_statistics,
        recipe=Recipe(learning_rate=0.2, epochs=20.0),
    )
    layers = masked(0.5)
    assert tensors_fingerprint(model.state_dict()) == before
    assert layers[unheard].rank < 0.3 * layers[f"{BLOCK}.0.intermediate.dense"].rank
    again = masked(0.5)
    assert all(torch.equal(layer.down.weight, again[name].down.weight) for name, layer in layers.items())
    with in_place(model, layers):
        numbers = sum(p.numel() for layer in layers.values() for n, p in layer.named_parameters() if "bias" not in n)
    assert numbers <= 0.5 * sum(layer.weight.numel() for layer in targets.values())


def test_it_is_compared_without_labels():
    model, batch = TINY_MODELS["bert-sequence-classification"](60)
    del batch["labels"]
    data = split_batch(batch, 20)
    (found,) = compare(
        model, data[:2], methods=["rank-masks"], keep_ratios=[0.5], eval_dataset=data[2:], labels="model"
    )
    assert 0.4 < found.parameters <= 0.5
