r"""Grids on which the numbers of a matrix lie, and the tensors that hold them.

With the scale `s` and the zero `z` of its group, a number becomes the code `q = clamp(round(w / s) + z)` and is
`s (q − z)` afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .kinds import NumberFormat
from .packing import pack, unpack

SHRINKS = torch.linspace(1.0, 0.45, 23).tolist()  # of the range of a group; narrower grids cut off its extremes
SMALLEST_SCALE = 1e-30


class Grid(NamedTuple):
    """The grids of a matrix, one for each group of columns of each row.

    Attributes:
        kind: the number format.
        scale: steps; bfloat16 numbers in float32.  # shape: (rows, groups)
        zero: codes of the number 0, in float32.  # shape: (rows, groups)
    """

    kind: NumberFormat
    scale: torch.Tensor
    zero: torch.Tensor

    def columns(self, count: int) -> Grid:
        """Return the grid of every column.  # shapes: (rows, count)."""
        group = torch.arange(count, device=self.scale.device) // self.kind.width(count)
        return Grid(self.kind, self.scale[:, group], self.zero[:, group])

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes; scale and zero must have the shape of the values, or one that expands to it."""
        return (values / self.scale).round_().add_(self.zero).clamp_(self.kind.lowest, self.kind.highest)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the numbers of codes in float32."""
        return (codes - self.zero) * self.scale

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the nearest numbers on the grids, in float32; shapes as for `codes`."""
        return self.values(self.codes(values.float()))

    def to(self, device: torch.device) -> Grid:
        """Return the grids on a device."""
        return Grid(self.kind, self.scale.to(device), self.zero.to(device))


def search_grid(
    matrix: torch.Tensor, importance: torch.Tensor, kind: NumberFormat, shrinks: Sequence[float] = SHRINKS
) -> Grid:
    r"""Choose for each group of each row the grid with the least squared error `Σ_j h_j (w_j − round(w_j))²`.

    The range of the group is narrowed step by step: a finer grid for most of the numbers, at the price of cutting off
    the extremes.

    Args:
        matrix: the numbers.  # shape: (rows, columns)
        importance: `h`, at least 0.  # shape: (columns,)
        kind: the number format.
        shrinks: shares of the range to try.

    Returns:
        The grids.
    """
    rows, columns = matrix.shape
    width = kind.width(columns)
    padding = (0, kind.groups(columns) * width - columns)  # a number 0 is on every grid
    parts = F.pad(matrix.float(), padding).reshape(rows, -1, width)
    weights = F.pad(importance.float(), padding).reshape(-1, width)
    low, high = parts.amin(-1, keepdim=True).clamp_max(0), parts.amax(-1, keepdim=True).clamp_min(0)
    best = _grid(shrinks[0] * low, shrinks[0] * high, kind)
    least = _error(parts, weights, best)
    for shrink in shrinks[1:]:
        grid = _grid(shrink * low, shrink * high, kind)
        error = _error(parts, weights, grid)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(kind, *(torch.where(better, new, old) for new, old in zip(grid[1:], best[1:], strict=True)))
    return Grid(kind, best.scale[..., 0], best.zero[..., 0])


def _grid(low: torch.Tensor, high: torch.Tensor, kind: NumberFormat) -> Grid:
    if kind.symmetric:
        scale = torch.maximum(-low, high) / kind.highest
        return Grid(kind, _stored(scale), torch.zeros_like(scale))
    scale = _stored((high - low) / kind.highest)
    return Grid(kind, scale, (-low / scale).round().clamp(kind.lowest, kind.highest))


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Return the scales as they are stored; a group of zeros has one, too."""
    return scale.clamp_min(SMALLEST_SCALE).bfloat16().float()


def _error(parts: torch.Tensor, weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    return (grid.nearest(parts).sub_(parts).square_() * weights).sum(-1, keepdim=True)


def encode(matrix: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """Return the tensors that hold the codes nearest to a matrix, and its grids.

    Numbers that lie on the grids, even if rounded to 16 bits since, become the codes that they came from.

    Args:
        matrix: the numbers.  # shape: (rows, columns)
        grid: their grids.

    Returns:
        The tensors that `NumberFormat.tensors` declares.
    """
    kind, rows = grid.kind, len(matrix)
    codes = grid.columns(matrix.shape[1]).codes(matrix.float())
    scale = grid.scale.bfloat16().contiguous().view(torch.int16).reshape(rows, -1)
    if kind.symmetric:
        return {"codes": codes.to(torch.int8), "scale": scale}
    return {"codes": pack(codes, kind.bits), "scale": scale, "zero": pack(grid.zero, kind.bits)}


def stored_grid(tensors: Mapping[str, torch.Tensor], kind: NumberFormat) -> Grid:
    """Return the grids in stored tensors."""
    scale = tensors["scale"].view(torch.bfloat16).float()
    if kind.symmetric:
        return Grid(kind, scale, torch.zeros_like(scale))
    return Grid(kind, scale, unpack(tensors["zero"], scale.shape[1], kind.bits).float())


def decode(tensors: Mapping[str, torch.Tensor], columns: int, kind: NumberFormat) -> torch.Tensor:
    """Return the numbers in stored tensors, in float32.  # shape: (rows, columns)."""
    grid = stored_grid(tensors, kind).columns(columns)
    codes = tensors["codes"] if kind.symmetric else unpack(tensors["codes"], columns, kind.bits)
    return grid.values(codes.float())
