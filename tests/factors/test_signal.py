"""Layers about which the data say nothing are found, and no others."""

import pytest
import torch

from hf_lossless_lr.factors.signal import NO_GRADIENT, NO_INPUT, cost_of_removal, silent_layers
from hf_lossless_lr.statistics.records import LayerStatistics

SHAPE = (4, 6)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed, size, scale=1.0):
    rows = random(seed, 1, 3 * size, size)
    return scale * rows.mT @ rows


def layer(seed, inputs=1.0, gradients=1.0):
    return LayerStatistics(random(seed, 1, *SHAPE), moment(seed + 1, 6, inputs), moment(seed + 2, 4, gradients), 9, 9)


def test_the_cost_of_removal_is_the_quadratic_form():
    weight, statistics = random(0, 1, *SHAPE), layer(1)
    A, B, W = statistics.input_covariance[0], statistics.grad_covariance[0], weight[0]
    assert cost_of_removal(weight, statistics) == pytest.approx(float(0.5 * torch.trace(B @ W @ A @ W.T)), rel=1e-12)


def test_layers_without_input_or_gradient_are_found_with_the_reason():
    statistics = {"whole": layer(0), "unused": layer(10, gradients=0.0), "saturated": layer(20, gradients=1e-16)}
    statistics |= {"dead": layer(30, inputs=0.0), "small": layer(40, gradients=1e-6)}
    weights = {name: random(50, 1, *SHAPE) for name in statistics}
    expected = {"unused": NO_GRADIENT, "saturated": NO_GRADIENT, "dead": NO_INPUT}
    assert silent_layers(weights, statistics) == expected


def test_all_layers_are_where_nothing_is_felt():
    statistics = {"one": layer(0, gradients=0.0), "two": layer(10, gradients=0.0)}
    assert silent_layers({name: random(1, 1, *SHAPE) for name in statistics}, statistics).keys() == statistics.keys()


def test_a_weight_of_zeros_is_no_such_layer():
    """Its removal costs nothing because nothing is removed."""
    statistics = {"zero": layer(0), "other": layer(10)}
    assert silent_layers({"zero": torch.zeros(1, *SHAPE), "other": random(1, 1, *SHAPE)}, statistics) == {}
