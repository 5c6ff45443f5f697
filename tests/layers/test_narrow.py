"""A layer with fewer outputs, or inputs, inside."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from hf_lossless_lr.layers import INPUTS, OUTPUTS, FactorizedLinear, NarrowLinear

PLACES = torch.tensor([1, 2, 5])
on_sides = pytest.mark.parametrize("side", [OUTPUTS, INPUTS])
on_biases = pytest.mark.parametrize("bias", [True, False])


def narrow(side, bias=True):
    torch.manual_seed(0)
    layer = NarrowLinear(nn.Linear(7, 6, bias=bias), len(PLACES), side)
    layer.place(PLACES)
    return layer


@on_sides
@on_biases
def test_computes_what_its_dense_layer_does(side, bias):
    layer, x = narrow(side, bias), torch.randn(2, 3, 7)
    dense = layer.dense()
    torch.testing.assert_close(layer(x), dense(x))
    assert layer(x).shape == (2, 3, 6)
    unused = [n for n in range(6 if side == OUTPUTS else 7) if n not in PLACES]
    assert not dense.weight[unused].any() if side == OUTPUTS else not dense.weight[:, unused].any()


@on_sides
def test_its_state_is_that_of_the_layer_inside_and_of_its_places(side):
    layer, other = narrow(side), NarrowLinear(nn.Linear(7, 6), len(PLACES), side)
    assert set(layer.state_dict()) == {"inner.weight", "inner.bias", "places", "weight"}
    assert layer.weight.numel() == 1
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 7)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def test_making_one_draws_no_random_numbers():
    dense = nn.Linear(7, 6)
    before = torch.get_rng_state()
    NarrowLinear(dense, 3, OUTPUTS)
    assert torch.equal(torch.get_rng_state(), before)


def reverse(places):
    places.copy_(places.flip(0))


@on_sides
@pytest.mark.parametrize("damage", [lambda p: p.fill_(0), lambda p: p.add_(1), lambda p: p.sub_(100), reverse])
def test_places_that_are_none_are_refused(side, damage):
    layer = narrow(side)
    assert layer.refusal() is None
    layer.place(torch.tensor([0, 3, 6 if side == INPUTS else 5]))
    assert layer.refusal() is None
    damage(layer.places)
    assert "out of range" in layer.refusal()
    layer.places = layer.places.long()
    assert "torch.int64" in layer.refusal()


@on_sides
def test_gradients_reach_the_layer_inside_and_it_may_be_factorized(side):
    layer = narrow(side)
    layer.inner = FactorizedLinear(layer.inner.in_features, layer.inner.out_features, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    layer(torch.randn(4, 7)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.inner.parameters())
    again = deepcopy(layer)
    x = torch.randn(2, 7)
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


@on_sides
def test_compiles_and_exports(side):
    layer, x = narrow(side).eval(), torch.randn(2, 7)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
