"""Truncated SVDs of layers, also with a weight for each row."""

import pytest
import torch
from torch import nn

from hf_lossless_lr.baselines.truncation import rank_of_share, truncated, truncated_svd
from hf_lossless_lr.errors import ConfigurationError

LAYERS = {
    "linear": lambda: nn.Linear(6, 9),
    "convolution": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "convolution in groups": lambda: nn.Conv2d(8, 6, 3, groups=2),
}
INPUTS = {"linear": (5, 6), "convolution": (2, 4, 7, 7), "convolution in groups": (2, 8, 7, 7)}


def seeded(make):
    torch.manual_seed(0)
    return make().double().requires_grad_(False)


def weighted_least_squares(matrix, rank, weights, sweeps=2000):
    """The closest matrix of a rank by alternating weighted least squares, from a random start."""
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(len(matrix), rank, generator=generator, dtype=torch.float64)
    root = weights.sqrt()[:, None]
    for _ in range(sweeps):
        down = torch.linalg.lstsq(root * up, root * matrix).solution
        up = torch.linalg.lstsq(down.mT, matrix.mT).solution.mT
    return up @ down


@pytest.mark.parametrize("rank", [1, 3])
def test_rows_count_as_in_weighted_least_squares(rank):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    weights = torch.rand(9, generator=generator, dtype=torch.float64) + 0.05
    down, up = truncated_svd(matrix, rank, weights)
    assert down.shape == (rank, 6)
    torch.testing.assert_close(up @ down, weighted_least_squares(matrix, rank, weights), atol=1e-8, rtol=0)
    assert (up @ down - torch.matmul(*reversed(truncated_svd(matrix, rank)))).abs().max() > 0.01


def test_a_row_that_counts_nothing_takes_no_part():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, 0, 1, 1, 1])
    down, up = truncated_svd(matrix, 2, weights)
    others = torch.matmul(*reversed(truncated_svd(matrix[weights > 0], 2)))
    assert (up[1] == 0).all()
    torch.testing.assert_close((up @ down)[weights > 0], others)


@pytest.mark.parametrize("name", LAYERS)
def test_at_full_rank_it_is_the_dense_layer(name):
    layer, x = seeded(LAYERS[name]), torch.randn(INPUTS[name], dtype=torch.float64)
    rank = rank_of_share(layer, 10_000)
    torch.testing.assert_close(truncated(layer, rank)(x), layer(x))


def test_the_error_of_equal_rows_is_that_of_the_singular_values_left_out():
    layer = seeded(LAYERS["linear"])
    error = truncated(layer, 2).dense_weight().detach() - layer.weight
    assert error.square().sum() == pytest.approx(torch.linalg.svdvals(layer.weight)[2:].square().sum().item())


@pytest.mark.parametrize("name", LAYERS)
def test_the_rank_is_the_largest_that_its_share_has_room_for(name):
    layer = seeded(LAYERS[name])
    most = layer.weight.numel() // 2

    def numbers(rank):
        factors = truncated(layer, rank)
        return sum(p.numel() for name, p in factors.named_parameters() if name != "bias")

    rank = rank_of_share(layer, most)
    assert numbers(rank) <= most < numbers(rank + 1)
    with pytest.raises(ConfigurationError, match="the lowest ranks have more parameters"):
        rank_of_share(layer, numbers(1) - 1)
