r"""Dense weights in int8 with analytic clipping (ACIQ): a finer grid for most numbers, at the price of the extremes.

Rounding numbers of a density `p` to `2^M` steps over `[−a, a]` has the mean squared error

$$2 ∫_a^∞ (x − a)^2 p(x) dx + a^2 / (3 · 4^M),$$

the least of which is where `∫_a^∞ (x − a) p(x) dx = a / (6 · 4^M)`.

Source: Banner et al. 2018, "ACIQ: Analytical clipping for integer quantization of neural networks", arXiv 1810.05723.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..formats import FORMATS, Grid
from ..layers import as_matrix, copied, from_matrix, set_grid

INT8 = FORMATS["int8"]
SMALLEST_SCALE = 1e-30


def clipped(layers: Mapping[str, nn.Module], keep_ratio: float) -> dict[str, nn.Module]:
    """Round layers to int8, one scale for each output channel, clipped as for a Laplace or a normal distribution.

    Each channel takes the one of the two that has the smaller error, and clips nothing beyond its largest number.

    Args:
        layers: dense layers by name; unchanged.
        keep_ratio: not used, for the size is fixed.

    Returns:
        Copies whose weights are what their stored numbers stand for, by name.
    """
    rounded: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        copy: Any = copied(layer)
        matrix = as_matrix(copy, copy.weight.detach())
        grid = clipped_grid(matrix.float())
        copy.weight.detach().copy_(from_matrix(copy, grid.nearest(matrix), copy.weight.shape))
        set_grid(copy, grid)
        rounded[name] = copy
    return rounded


def clipped_grid(matrix: torch.Tensor) -> Grid:
    """Return the grid of each row of a matrix.

    Args:
        matrix: the numbers.  # shape: (rows, columns)

    Returns:
        The grids.
    """
    largest = matrix.abs().amax(1, keepdim=True)
    laplace = laplace_clip(INT8.bits) * matrix.abs().mean(1, keepdim=True)
    normal = normal_clip(INT8.bits) * matrix.square().mean(1, keepdim=True).sqrt()
    first, second = (_grid(torch.minimum(clip, largest)) for clip in (laplace, normal))
    errors = [(grid.nearest(matrix) - matrix).square().sum(1, keepdim=True) for grid in (first, second)]
    return first._replace(scale=torch.where(errors[0] <= errors[1], first.scale, second.scale))


def _grid(clip: torch.Tensor) -> Grid:
    scale = (clip / INT8.highest).clamp_min(SMALLEST_SCALE).bfloat16().float()  # as it is stored
    return Grid(INT8, scale, torch.zeros_like(scale))


def laplace_clip(bits: int) -> float:
    """Return the best clipping value for a Laplace distribution of scale 1, `a exp(a) = 3 · 4^M`: Newton's method."""
    clip = bits * math.log(4)
    for _ in range(50):
        clip -= (clip + math.log(clip) - math.log(3 * 4**bits)) / (1 + 1 / clip)
    return clip


def normal_clip(bits: int) -> float:
    """Return the best clipping value for a standard normal distribution: bisection."""
    low, high = 0.0, 10.0
    for _ in range(60):
        clip = (low + high) / 2
        density = math.exp(-(clip**2) / 2) / math.sqrt(2 * math.pi)
        beyond = density - clip * math.erfc(clip / math.sqrt(2)) / 2  # of which the mean is cut off
        low, high = (clip, high) if beyond > clip / (6 * 4**bits) else (low, clip)
    return high
