"""Analytic clipping: the published values, the least error that a search finds, and int8 in the bytes."""

import math

import pytest
import torch
from support.tiny_models import TINY_MODELS, split_batch
from torch import nn

from hf_lossless_lr.baselines import compare
from hf_lossless_lr.baselines.clipping import clipped, clipped_grid, laplace_clip, normal_clip
from hf_lossless_lr.layers import find_targets, grid_of

SAMPLES = 200_000


def rounded(values, clip, bits):
    """Values at the middles of `2 ** bits` steps over what is not cut off."""
    step = 2 * clip / 2**bits
    return ((values / step - 0.5).round() + 0.5).clamp(0.5 - 2 ** (bits - 1), 2 ** (bits - 1) - 0.5) * step


@pytest.mark.parametrize(("bits", "laplace", "normal"), [(2, 2.83, 1.71), (3, 3.89, 2.15), (4, 5.03, 2.55)])
def test_the_values_are_those_of_the_publication(bits, laplace, normal):
    assert laplace_clip(bits) == pytest.approx(laplace, abs=0.01)
    assert normal_clip(bits) == pytest.approx(normal, abs=0.01)
    assert laplace_clip(bits) * math.exp(laplace_clip(bits)) == pytest.approx(3 * 4**bits)


@pytest.mark.parametrize("name", ["laplace", "normal"])
def test_no_other_value_has_a_smaller_error(name):
    clip = {"laplace": laplace_clip, "normal": normal_clip}[name](8)
    quantiles = (torch.arange(SAMPLES).double() + 0.5) / SAMPLES  # they stand for the distribution, without chance
    distribution = torch.distributions.Laplace if name == "laplace" else torch.distributions.Normal
    values = distribution(torch.tensor(0.0).double(), 1.0).icdf(quantiles)
    errors = {
        step: float((rounded(values, (1 + step / 50) * clip, 8) - values).square().mean()) for step in range(-15, 16)
    }
    assert errors[0] < 1.01 * min(errors.values())
    assert errors[0] < 0.99 * min(errors[-15], errors[15])


def test_each_channel_takes_the_better_of_the_two_and_no_more_than_its_range():
    torch.manual_seed(0)
    normal, laplace = torch.distributions.Normal(0.0, 1.0), torch.distributions.Laplace(0.0, 1.0)
    rows = torch.stack([each.sample((SAMPLES,)) for each in (normal, laplace)] + [torch.rand(SAMPLES)])
    scale = 127 * clipped_grid(rows).scale[:, 0]
    assert scale[0].item() == pytest.approx(normal_clip(8), rel=0.02)
    assert scale[1].item() == pytest.approx(laplace_clip(8), rel=0.02)
    assert scale[2].item() == pytest.approx(1.0, rel=0.01)
    found = (clipped_grid(rows).nearest(rows) - rows).square().mean(1)
    for clips in (laplace_clip(8) * rows.abs().mean(1), normal_clip(8) * rows.square().mean(1).sqrt()):
        steps = (torch.minimum(clips, rows.abs().amax(1)) / 127)[:, None]
        other = ((rows / steps).round().clamp(-127, 127) * steps - rows).square().mean(1)
        assert (found <= 1.02 * other).all()  # scales are bfloat16 numbers


def test_a_layer_of_zeros_stays_one():
    layer = nn.Linear(4, 3).requires_grad_(False)
    layer.weight.zero_()
    assert torch.equal(clipped({"layer": layer}, 1.0)["layer"].weight, layer.weight)


def test_the_weights_lie_on_the_grids_that_the_bytes_are_counted_of():
    model, batch = TINY_MODELS["resnet"](120)
    data = split_batch(batch, 30)
    before = {name: layer.weight.clone() for name, layer in find_targets(model).chosen.items()}
    (found,) = compare(model, data[:2], methods=["aciq-int8"], keep_ratios=[0.5], eval_dataset=data[2:])
    assert found.keep_ratio is None
    assert found.parameters == 1.0
    targets = find_targets(model).chosen
    total = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
    saved = sum(3 * layer.weight.numel() - 2 * len(layer.weight) - 4 for layer in targets.values())  # and a guard
    assert found.bytes == pytest.approx((total - saved) / total)
    for name, layer in clipped(targets, 1.0).items():
        codes = layer.weight.detach().flatten(1) / grid_of(layer).scale
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert codes.abs().max() < 127.01
        assert torch.equal(targets[name].weight, before[name])
        assert grid_of(targets[name]) is None
