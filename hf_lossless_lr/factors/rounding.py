r"""Rounding a weight, or its factors, to a number format, and what that is predicted to cost.

With a rounded matrix `Q` in place of `M`, applied to inputs of second moments `H`, outputs are off by
`tr((Q − M) H (Q − M)ᵀ)` in the mean. `round_matrix` makes that small: `H` is A for a weight and for `down`, and
`down A downᵀ` for `up`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch

from ..errors import ConfigurationError
from ..formats import FORMATS, SHRINKS, Grid, NumberFormat, free_variances, round_matrix, search_grid
from ..statistics import LayerStatistics, precision_of
from .curves import RoundingCost
from .factorize import SMALLEST_NORM, Factorization, FactorTensors
from .linalg import damped

FEW_SHRINKS = SHRINKS[::4]  # for a prediction
BETWEEN = 1e-6  # relative damping of the second moments between the factors: enough for a factor that is zero


class RoundedFactors(NamedTuple):
    """Rounded factors, and the grids on which they lie."""

    factors: FactorTensors
    down: Grid
    up: Grid


def round_dense(weight: torch.Tensor, hessian: torch.Tensor, kind: NumberFormat) -> tuple[torch.Tensor, Grid]:
    """Round a weight.

    Args:
        weight: W.  # shape: (out, in)
        hessian: A, positive definite.  # shape: (in, in)
        kind: the number format.

    Returns:
        The rounded weight in float32, and its grids.
    """
    grid = search_grid(weight, hessian.diagonal(), kind)
    return round_matrix(weight, hessian, grid), grid


def round_factors(
    factorization: Factorization,
    rank: int,
    storage: str,
    pivot_inputs: bool,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    kind: NumberFormat,
) -> RoundedFactors:
    r"""Truncate a factorization and round it: `down` first, then `up` as it fits best to the rounded `down`.

    With `D` what `down` does to the inputs (for pivots among them, to all of them), the best `up` is
    `T A Dᵀ (D A Dᵀ)⁻¹`.

    Args:
        factorization: of one matrix.
        rank: `k`.
        storage: `pivoted` or `two-factor`.
        pivot_inputs: whether pivots are columns of the weight rather than rows.
        weight: T, the weight that is approximated.  # shape: (out, in)
        hessian: A, positive definite.  # shape: (in, in)
        kind: the number format.

    Returns:
        The factors.

    Raises:
        ConfigurationError: if the format does not go with the storage.
    """
    if storage == "pivoted" and not kind.pivots:
        raise ConfigurationError(
            f"pivoted storage does not go with {kind.bits} bits: the errors of pivots pass into all other outputs. "
            "Use storage='two-factor', or 'auto'."
        )
    down, _, order = tensors = factorization.truncate(rank, storage, pivot_inputs)
    weight, hessian = weight.double(), hessian.double()
    if order is None:
        down = _even_gauge(tensors)
    elif pivot_inputs:
        weight, hessian = weight[:, order], hessian[order][:, order]
    else:
        weight = weight[torch.argsort(order)[rank:]]
    down, down_grid = round_dense(down, hessian[rank:, rank:] if pivot_inputs else hessian, kind)
    through = down.double()
    if pivot_inputs:
        through = torch.cat([torch.eye(rank).to(through), through], dim=1)
    precision = precision_of(hessian.shape[-1])
    through, hessian, weight = (matrix.to(precision) for matrix in (through, hessian, weight))
    products = through @ hessian
    between = damped((products @ through.T).double(), BETWEEN)
    up = torch.linalg.solve(between, (products @ weight.T).double()).T
    up, up_grid = round_dense(up, between, kind)
    return RoundedFactors(FactorTensors(down, up, order), down_grid, up_grid)


def _even_gauge(factors: FactorTensors) -> torch.Tensor:
    """Return `down` for an `up` whose columns have norm 1: those of a group share their grids."""
    return factors.down * factors.up.norm(dim=0).clamp_min(SMALLEST_NORM)[:, None]


def rounding_costs(
    weight: torch.Tensor,
    factorization: Factorization,
    stats: LayerStatistics,
    damping: float,
    formats: Collection[str],
) -> dict[str, RoundingCost]:
    r"""Predict what rounding costs, `½ tr(B E A Eᵀ)` for the errors `E` that are left behind the rounding.

    Errors `e` of single numbers are those of the nearest points of the grids; of an error in column `i`, only the
    variance `d_i` counts that the columns behind it cannot make up for (`free_variances`). Of an error in `down`, `up`
    takes back what lies in the `k` directions that `down` passes on. With the outputs of `down` uncorrelated, as they
    are in the metric,

    $$\mathrm{dense} = \tfrac12 Σ_{oi} B_{oo} e_{oi}^2 d_i,\qquad
    \mathrm{down} = \tfrac12 \left(1 - \frac{k}{\mathrm{in}}\right) Σ_{ji} (u_j^⊤ B u_j) e_{ji}^2 d_i,\qquad
    \mathrm{up} = \tfrac12 Σ_{oj} B_{oo} e_{oj}^2 (D A D^⊤)_{jj}.$$

    Args:
        weight: the dense weight.  # shape: (groups, out, in)
        factorization: its factors.
        stats: its statistics, not damped.
        damping: relative damping of A in the rounding.
        formats: keys of `FORMATS`.

    Returns:
        The costs in each format; at each rank those of two factors.
    """
    ranks = factorization.factors.left.shape[-1]
    dense, by_rank = dict.fromkeys(formats, 0.0), {name: np.zeros(ranks + 1) for name in formats}
    for index, matrix in enumerate(weight):
        A, B = stats.input_covariance[index], stats.grad_covariance[index]
        left, right = (factor[index].double() for factor in factorization.factors[:2])
        norms = left.norm(dim=0).clamp_min(SMALLEST_NORM)
        up, down = left / norms, right * norms[:, None]
        passed_on = (down * (down.to(A.dtype) @ A)).sum(-1)
        of_rows, of_columns = B.diagonal().double(), (up * (B @ up.to(B.dtype))).sum(0)
        free = free_variances(damped(A, damping))
        lost = 1 - torch.arange(1, ranks + 1).to(free) / matrix.shape[1]
        for name in formats:
            kind = FORMATS[name]
            dense[name] += 0.5 * float(of_rows @ _errors(matrix, free, kind).sum(-1))
            of_down = lost * (of_columns * _errors(down, free, kind).sum(-1)).cumsum(0)
            of_up = of_rows @ _errors_by_rank(up, passed_on, kind)
            by_rank[name][1:] += 0.5 * (of_down + of_up).cpu().numpy()
    return {name: RoundingCost(by_rank[name], dense[name]) for name in formats}


def _errors(matrix: torch.Tensor, importance: torch.Tensor, kind: NumberFormat) -> torch.Tensor:
    """Return the weighted squared errors of rounding a matrix to the nearest numbers.  # shape: (rows, columns)."""
    grid = search_grid(matrix, importance, kind, FEW_SHRINKS).columns(matrix.shape[1])
    return (grid.nearest(matrix) - matrix.float()).square().double() * importance


def _errors_by_rank(up: torch.Tensor, importance: torch.Tensor, kind: NumberFormat) -> torch.Tensor:
    """Return the weighted squared errors of each row of `up` for every number of columns.  # shape: (out, m)."""
    errors = _errors(up, importance, kind)
    if kind.group is not None:  # the last group is rarely whole; its errors are then a little smaller
        return errors.cumsum(-1)
    steps = up.abs().cummax(-1).values
    share = (steps / steps[:, -1:].clamp_min(SMALLEST_NORM)).square()  # of the variance of the noise with all columns
    total = importance.cumsum(-1)
    return errors.sum(-1, keepdim=True) * share * total / total[-1].clamp_min(SMALLEST_NORM)
