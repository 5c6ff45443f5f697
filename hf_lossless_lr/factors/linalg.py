"""Dense linear algebra around the factorization: damping, quadratic tails, pivoted form, shifted weights.

Nothing here knows a module or a name. All functions take and return tensors and compute in float64 (tails: in the
dtype of the factors; large systems, if well conditioned: in float32), on the device of their input. Leading
dimensions, where arguments have them, are those of several independent matrices.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from threadpoolctl import ThreadpoolController

from ..errors import NumericalError
from ..statistics import gram, precision_of
from .decomposition import MetricFactors

FAINT = 0.01  # of the mean that a channel adds to the outputs: what adds less is not fitted to
LARGEST_SCALE = 1e30  # of a channel whose column is zero, or so small that its square is
WELL_CONDITIONED = 1e5  # condition of a system: what float32 loses to it stays below 1 % where inputs hardly vary


class PivotedForm(NamedTuple):
    """A rank-`k` matrix as `k` of its own rows and the coefficients that rebuild the others from them."""

    skeleton: torch.Tensor  # shape: (k, in), the pivot rows
    coefficients: torch.Tensor  # shape: (out - k, k)
    permutation: torch.Tensor  # shape: (out,), `cat(skeleton, coefficients @ skeleton)[permutation]` is the matrix


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Return `matrix + damping * diag(matrix)`, the Tikhonov damping of each channel relative to its own.

    So the result follows a rescaling of the channels, and a few large ones do not drown the others. A channel that is
    zero (it never saw a signal) gets `damping` times the smallest of the others. A matrix that is entirely zero
    carries no information and becomes the identity.

    Args:
        matrix: symmetric positive semi-definite.  # shape: (..., d, d)
        damping: relative damping, dimensionless, at least 0.

    Returns:
        The damped matrix, of the same shape, in float64; a large one in float32 stays in float32.
    """
    wide = matrix.dtype == torch.float64 or precision_of(matrix.shape[-1]) == torch.float64
    matrix = matrix.to(torch.float64 if wide else torch.float32, copy=True)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(damped_diagonal(diagonal, damping))
    return matrix


def damped_diagonal(diagonal: torch.Tensor, damping: float) -> torch.Tensor:
    """Return what `damped` does to a diagonal matrix.

    Args:
        diagonal: its diagonal.  # shape: (..., d)
        damping: relative damping, dimensionless, at least 0.

    Returns:
        The damped diagonal in float64, of the same shape.
    """
    diagonal = diagonal.double()
    silent = diagonal <= 0
    smallest = torch.where(silent, math.inf, diagonal).amin(-1, keepdim=True)
    filled = torch.where(silent, damping * smallest, (1 + damping) * diagonal)
    return torch.where(silent.all(-1, keepdim=True), torch.ones_like(diagonal), filled)


def quadratic_tails(
    factors: MetricFactors, input_covariance: torch.Tensor, grad_covariance: torch.Tensor
) -> torch.Tensor:
    r"""Return `½ tr(B D_k A D_kᵀ)` for every rank `k = 0 … m` at once, where `D_k = Ŵ_k − W`.

    `D_k = −Σ_{i>k} l_i r_i`, so the value is half the sum of the trailing block of `(LᵀBL) ∘ (R A Rᵀ)`. This holds for
    factors of any metric, which makes their predictions comparable.

    Args:
        factors: nested factors from `metric_svd`.
        input_covariance: A.  # shape: (..., in, in)
        grad_covariance: B.  # shape: (..., out, out)

    Returns:
        Predicted second-order loss increase in nats for each rank.  # shape: (..., m + 1)
    """
    left, right = factors.left, factors.right
    inside = gram(left, grad_covariance.to(left.dtype) @ left)
    terms = (inside * gram(right.mT, input_covariance.to(right.dtype) @ right.mT)).double()
    # A block grows by the part of a row from its diagonal on, and by the same part of a column.
    rows = 2 * terms.triu(1).sum(-1) + terms.diagonal(dim1=-2, dim2=-1)
    block_sums = rows.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([0.5 * block_sums, torch.zeros_like(block_sums[..., :1])], dim=-1).clamp_min(0.0)


def pivoted_form(left: torch.Tensor, right: torch.Tensor, bound: float = 2.0) -> PivotedForm:
    """Rewrite `left @ right` of rank `k` so that `k` rows are stored as they are.

    The pivots come from a QR decomposition with column pivoting, then rows are swapped while a coefficient exceeds
    `bound` in magnitude (each swap multiplies the volume of the pivot rows by more than `bound`, so it ends). The map
    is the same; it takes `k (out + in − k)` numbers instead of `k (out + in)`.

    Args:
        left: left factor of full column rank.  # shape: (out, k), k < out
        right: right factor.  # shape: (k, in)
        bound: largest coefficient allowed, above 1 (at 1, rounding could swap rows for ever).

    Returns:
        The pivot rows, the coefficients of the other rows, and the permutation that restores the order.

    Raises:
        NumericalError: if `k` is not below the number of rows, or `bound` is not above 1.

    Source: Gu & Eisenstat 1996, "Efficient algorithms for computing a strong rank-revealing QR factorization".
    """
    from scipy.linalg import qr  # here: scipy is slow to import, and only this step needs it

    rows, rank = left.shape
    if rank >= rows:
        raise NumericalError(f"pivoted_form: the rank must be below the number of rows, got rank {rank}, rows {rows}.")
    if not bound > 1:
        raise NumericalError(f"pivoted_form: the bound of the coefficients must be above 1, got {bound}.")
    left = left.double()
    basis = torch.linalg.qr(left).Q
    # The threads of scipy's BLAS would go on spinning, and slow down those of torch.
    with _libraries().limit(limits=1, user_api="blas"):
        order = torch.from_numpy(qr(basis.T.cpu().numpy(), mode="r", pivoting=True)[1]).to(left.device, torch.int64)
    while True:
        pivots, rest = order[:rank], order[rank:]
        coefficients = torch.linalg.solve(basis[pivots].T, basis[rest].T).T
        largest = int(coefficients.abs().argmax())
        row, column = divmod(largest, rank)
        if coefficients[row, column].abs() <= bound:
            break
        order = order.clone()
        order[[column, rank + row]] = order[[rank + row, column]]
    return PivotedForm(left[pivots] @ right.double(), coefficients, torch.argsort(order))


@cache
def _libraries() -> ThreadpoolController:
    """Return the libraries that compute with threads; to look for them takes as long as a small decomposition."""
    return ThreadpoolController()


def shifted_weight(
    weight: torch.Tensor, output_cross: torch.Tensor, input_gram: torch.Tensor, ridge: float
) -> torch.Tensor:
    r"""Return the weight that best reproduces the outputs `W X` from other inputs `X'`.

    $$T = (W X X'^\top + WΛ)\,(X' X'^\top + Λ)^{-1},$$

    the minimizer of `‖W X − T X'‖² + ‖(T − W) Λ^½‖²`, with `Λ_j = ridge · (a_j + FAINT · mean(a ‖W‖²) / ‖W_j‖²)` of a
    channel `j` with the second moment `a_j = (X'X'ᵀ)_jj` and the column `W_j`. The first term makes the ridge of each
    channel relative to its own size, so that the result follows a rescaling of the channels. The second one keeps
    the column of a channel that hardly adds to the outputs: a unit that was active in one row of a thousand, by
    0.0001, would else get a weight of thousands, which some other input multiplies. Where `X'` says nothing (dead
    inputs, fewer rows than features), `T` stays at `W`, and so do columns that are zero. The system has a condition
    of at most `1 + in / ridge`; large ones are solved in float32 where that is below `WELL_CONDITIONED`.

    Args:
        weight: W.  # shape: (..., out, in)
        output_cross: `W X X'ᵀ` per row.  # shape: (..., out, in)
        input_gram: `X' X'ᵀ` per row.  # shape: (..., in, in)
        ridge: relative ridge, above 0.

    Returns:
        T in float64.  # shape: (..., out, in)
    """
    features = weight.shape[-1]
    dtype = precision_of(features) if features < ridge * WELL_CONDITIONED else torch.float64
    weight, input_gram, output_cross = (each.to(dtype) for each in (weight, input_gram, output_cross))
    moments, squares = input_gram.diagonal(dim1=-2, dim2=-1), weight.square().sum(dim=-2)
    mean = (moments * squares).mean(dim=-1, keepdim=True)
    scales = moments + torch.where(mean > 0, FAINT * mean / squares, 0.0)
    scales = torch.where(scales <= 0, 1.0, scales).clamp_max(LARGEST_SCALE).sqrt()  # of the channels; NaN stays NaN
    columns, seen = scales[..., None, :], ~(moments <= 0)
    system = input_gram / (scales[..., :, None] * columns)
    known = torch.where(seen[..., None, :], output_cross / columns, 0.0) + ridge * weight * columns
    system.diagonal(dim1=-2, dim2=-1).add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(system)
    if failed.any():  # by rounding; what is not a number stays it
        return torch.linalg.solve(system.double(), known.double(), left=False) / columns
    return (torch.cholesky_solve(known.mT, lower).mT / columns).double()
