r"""Layers of two factors in the place of dense ones: the truncated SVD, also with a weight for each row.

The matrix of rank `k` that is closest to `W` where the error of row `i` counts `d_i`,

$$min_M Σ_i d_i ‖W_i − M_i‖^2,$$

is `D^{-1/2} [D^{1/2} W]_k`, in which `[.]_k` is the truncated SVD and `D` is diagonal. A row that counts nothing is
left out of both factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from ..layers import layout_of, weight_matrices


def rank_of_share(module: nn.Module, most: int) -> int:
    """Return the largest rank at which the factors of a dense layer have at most so many parameters.

    Args:
        module: the layer.
        most: the most parameters, of `k (in + out)` for each of its matrices.

    Raises:
        ConfigurationError: if rank 1 has more.
    """
    groups, *sides = weight_matrices(module).shape
    return min(at_least_one(most // (groups * sum(sides))), *sides)


def truncated(module: Any, rank: int, row_weights: torch.Tensor | None = None) -> nn.Module:
    """Return a layer of two factors in the place of a dense one.

    Args:
        module: the dense layer; unchanged.
        rank: the rank of each of its matrices.
        row_weights: what the error of each row counts; default: all the same.  # shape: (groups, out)

    Returns:
        The layer.
    """
    return two_factors(module, *truncated_svd(weight_matrices(module).double(), rank, row_weights))


def two_factors(module: Any, down: torch.Tensor, up: torch.Tensor) -> Any:
    """Return a layer of two given factors in the place of a dense one, with its bias.

    Args:
        module: the dense layer; unchanged.
        down: the first factor.  # shape: (groups, rank, in)
        up: the second one.  # shape: (groups, out, rank)

    Returns:
        The layer.
    """
    layer: Any = layout_of(module).factorized(module, down.shape[-2], "two-factor")
    layer.load_factors(down, up, None, module.bias)
    return layer


def truncated_svd(
    matrices: torch.Tensor, rank: int, row_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of the closest matrix of a rank, each with the square roots of the singular values.

    Args:
        matrices: one matrix or several.  # shape: (..., out, in)
        rank: the rank.
        row_weights: what the error of each row counts; default: all the same.  # shape: (..., out)

    Returns:
        `down` and `up`.  # shape: (..., rank, in), (..., out, rank)
    """
    scale = torch.ones_like(matrices[..., :1]) if row_weights is None else row_weights.to(matrices).sqrt()[..., None]
    left, values, right = torch.linalg.svd(scale * matrices, full_matrices=False)
    root = values[..., :rank].sqrt()
    up = left[..., :rank] * root[..., None, :]
    return root[..., None] * right[..., :rank, :], torch.where(scale > 0, up / scale, 0.0)


def at_least_one(rank: int) -> int:
    """Return a rank, or raise an error where there is none."""
    if rank < 1:
        raise ConfigurationError("the lowest ranks have more parameters. Keep more, or add the layer to `ignore`.")
    return rank
