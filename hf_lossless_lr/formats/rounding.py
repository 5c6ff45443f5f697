r"""Rounding a matrix to its grids, with the error of each column made up for by the columns that follow.

The error of a rounded matrix `Q` is `tr((Q − W) H (Q − W)ᵀ)`, with `H` the second moments of what it is applied to.
"""

from __future__ import annotations

import torch

from ..errors import NumericalError
from .grids import Grid

RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)  # relative
BLOCK = 128  # columns between two updates of all that follow


def round_matrix(matrix: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    r"""Round a matrix column by column, the ones that matter most first (GPTQ with fixed grids).

    After column `j` is rounded with the error `e`, the best change of the remaining columns `r` is
    `−e (H⁻¹)_{jr} / (H⁻¹)_{jj}`, with `H⁻¹` that of the columns which are still free.

    Args:
        matrix: W.  # shape: (rows, columns)
        hessian: H, positive semi-definite with a positive diagonal.  # shape: (columns, columns)
        grid: the grids of W.

    Returns:
        Q in float32.  # shape: (rows, columns)

    Raises:
        NumericalError: if H is not finite, or far from positive semi-definite.

    Source: Frantar et al. 2023, "GPTQ: Accurate post-training quantization for generative pre-trained transformers".
    """
    columns = matrix.shape[1]
    order, lower = _elimination(hessian)
    factor = torch.linalg.solve_triangular(lower, torch.eye(columns).to(lower), upper=False).flip(0, 1).float()
    left = matrix.float()[:, order]
    steps = grid.columns(columns)
    scale, zero = steps.scale[:, order], steps.zero[:, order]
    rounded = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, errors = left[:, start:end].T.contiguous(), []
        upper = factor[start:end, start:end]
        for j in range(end - start):
            column = Grid(grid.kind, scale[:, start + j], zero[:, start + j])
            value = column.nearest(block[j])
            error = (block[j] - value) / upper[j, j]
            block[j + 1 :] -= upper[j, j + 1 :, None] * error
            rounded[:, start + j] = value
            errors.append(error)
        left[:, end:] -= torch.stack(errors, dim=1) @ factor[start:end, end:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


def _elimination(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of the columns, and the lower Cholesky factor in the reverse of that order.

    Its inverse, turned round, is the upper Cholesky factor of the inverse: from `J H J = L Lᵀ` with the reversal `J`
    follows `H⁻¹ = Uᵀ U` with `U = J L⁻¹ J`. What is not positive definite to rounding gets a larger diagonal.

    Raises:
        NumericalError: if no small one helps.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    reverse = order.flip(0)
    reversed_ = hessian.double()[reverse][:, reverse]
    for ridge in RIDGES:
        lower, failed = torch.linalg.cholesky_ex(reversed_ + torch.diag(ridge * reversed_.diagonal()))
        if not failed:
            return order, lower
    raise NumericalError("the second moments of the inputs of a layer are no such moments: raise `damping`.")


def free_variances(hessian: torch.Tensor) -> torch.Tensor:
    r"""Return what is left of the variance of each column when the columns that follow it in the rounding are known.

    A column rounded with an error of variance `v` adds `v · free_variance` to the error of the matrix, for the columns
    behind it make up for the rest: `tr(D)` of the factorization `H = L D Lᵀ` in place of `tr(H)`.

    Args:
        hessian: H, positive definite.  # shape: (columns, columns)

    Returns:
        The variances, in float64.  # shape: (columns,)

    Source: Chee et al. 2023, "QuIP: 2-bit quantization of large language models with guarantees".
    """
    order, lower = _elimination(hessian)
    free = torch.empty_like(lower.diagonal())
    free[order] = lower.diagonal().square().flip(0)
    return free
