"""From a weight or its factorization to the numbers in a layer, rounded where it has a number format."""

from __future__ import annotations

from typing import Any

import torch

from ..formats import FLOAT, FORMATS, Grid, NumberFormat
from ..layers import from_matrix, set_grid
from .decomposition import MetricFactors
from .factorize import SMALLEST_NORM, Factorization, FactorTensors
from .rounding import RoundedFactors, round_dense, round_factors
from .spatial import SpatialFactorization, solved_second, vertical_moments


@torch.no_grad()
def fill(
    layer: Any,
    weight: torch.Tensor,
    factorization: Factorization | SpatialFactorization | None,
    hessian: torch.Tensor | None,
    number_format: str = FLOAT,
) -> None:
    """Put the best numbers for a weight into a layer.

    Args:
        layer: a factorized layer, or a dense one of which only the weight changes.
        weight: what the layer is to stand for.  # shape: (groups, out, in)
        factorization: of the weight; None for a dense layer.
        hessian: second moments of its inputs, positive definite; None in floating point.  # shape: (groups, in, in)
        number_format: `float` or a key of `FORMATS`.
    """
    if number_format == FLOAT or hessian is None:
        if factorization is None:
            _load_dense(layer, weight.flatten(0, 1), None)
        else:
            layer.load_factors(*factorization.truncate(layer.rank, layer.storage, layer.pivots_inputs))
        return
    kind, matrices = FORMATS[number_format], range(len(weight))
    if factorization is None:
        rounded = [round_dense(weight[n], hessian[n], kind) for n in matrices]
        _load_dense(layer, torch.cat([matrix for matrix, _ in rounded]), _below([grid for _, grid in rounded]))
        return
    if isinstance(factorization, SpatialFactorization):
        first = factorization.truncate(layer.rank).down
        found = [_rounded_filters(first[n], weight[n], hessian[n], factorization.width, kind) for n in matrices]
    else:
        parts = [Factorization(MetricFactors(*each)) for each in zip(*factorization.factors, strict=True)]
        found = [
            round_factors(part, layer.rank, layer.storage, layer.pivots_inputs, weight[n], hessian[n], kind)
            for n, part in enumerate(parts)
        ]
    down, up, orders = zip(*(each.factors for each in found), strict=True)
    layer.load_factors(
        *FactorTensors(torch.stack(down), torch.stack(up), None if orders[0] is None else torch.stack(orders))
    )
    set_grid(layer.down, _below([each.down for each in found]))
    set_grid(layer.up, _below([each.up for each in found]))


def _rounded_filters(
    first: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor, width: int, kind: NumberFormat
) -> RoundedFactors:
    """Round the filters of a spatial form: the first ones, then the second as they fit best to these."""
    up, _ = solved_second(first, weight, hessian, width)
    norms = up.unflatten(-1, (len(first), width)).norm(dim=(0, -1)).clamp_min(SMALLEST_NORM)
    vertical = vertical_moments(hessian, width)
    down, down_grid = round_dense(first * norms[:, None], vertical, kind)  # those of a group share their grids
    up, between = solved_second(down.double(), weight, hessian, width)
    up, up_grid = round_dense(up, between, kind)
    return RoundedFactors(FactorTensors(down, up, None), down_grid, up_grid)


def _below(grids: list[Grid]) -> Grid:
    """Return the grids of matrices that lie below one another."""
    return Grid(grids[0].kind, torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids]))


def _load_dense(layer: Any, matrix: torch.Tensor, grid: Grid | None) -> None:
    layer.weight.copy_(from_matrix(layer, matrix, layer.weight.shape))
    set_grid(layer, grid)
