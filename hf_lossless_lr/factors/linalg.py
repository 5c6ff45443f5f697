r"""Dense linear algebra behind the factorization: metric SVD, quadratic tails, pivoted form.

Nothing here knows a module or a name. All functions take and return tensors and compute in float64, on the device
of their input.

Leading dimensions, where arguments have them, are those of several independent matrices.

A *metric* is a pair of symmetric positive semi-definite matrices: `A (in, in)` on the input side and `B (out, out)`
on the output side. Each may also be a vector (a diagonal matrix) or `None` (the identity). It measures a change `D` of
the weight by

$$\|D\|^2_{A,B} = \mathrm{tr}(B\,D\,A\,D^\top).$$
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from threadpoolctl import threadpool_limits

from ..errors import NumericalError


class MetricFactors(NamedTuple):
    """Factors of a matrix, nested in the rank: `left[..., :k] @ right[..., :k, :]` is the best one of rank `k`."""

    left: torch.Tensor  # shape: (..., out, m), m = min(out, in)
    right: torch.Tensor  # shape: (..., m, in)
    singular_values: torch.Tensor  # shape: (..., m), descending, in the metric


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
        The damped matrix in float64, of the same shape.
    """
    matrix = matrix.double()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return matrix + torch.diag_embed(damped_diagonal(diagonal, damping) - diagonal)


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


def _times(metric: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """Return `metric @ matrix` for a full, diagonal or identity metric."""
    if metric is None:
        return matrix
    return metric[..., None] * matrix if metric.ndim < matrix.ndim else metric @ matrix


def _roots(metric: torch.Tensor | None, diagonal: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a root `P` of a metric, `PᵀP`, and its pseudo-inverse.

    It is the symmetric root of the metric with unit diagonal, times the roots of the diagonal: channels of very
    different scales do not lose precision to one another.
    """
    if metric is None:
        return None, None
    channels = metric if diagonal else metric.diagonal(dim1=-2, dim2=-1)
    scale = channels.clamp_min(0.0).sqrt()
    if diagonal:
        return scale, torch.where(scale > 0, 1 / scale, 0.0)
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(metric / (scale[..., :, None] * scale[..., None, :]))
    floor = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    root = values.clamp_min(0.0).sqrt()
    inverse = torch.where(values > floor, values.clamp_min(floor).rsqrt(), torch.zeros_like(values))
    roots = (vectors * root[..., None, :]) @ vectors.mT * scale[..., None, :]
    return roots, (vectors * inverse[..., None, :]) @ vectors.mT / scale[..., :, None]


def _check_metric(name: str, metric: torch.Tensor | None, size: int, weight: torch.Tensor) -> None:
    if metric is None:
        return
    *matrices, out, in_ = weight.shape
    if metric.shape not in (torch.Size([*matrices, size, size]), torch.Size([*matrices, size])):
        raise NumericalError(
            f"metric_svd: W is {(out, in_)}, so A must be ({in_}, {in_}) and B ({out}, {out}) (or their diagonals); "
            f"{name} is {tuple(metric.shape[len(matrices) :])}. For Conv1D pass the transposed weight."
        )
    if not torch.isfinite(metric).all():
        raise NumericalError(f"metric_svd: {name} has entries that are not finite.")


def metric_svd(
    weight: torch.Tensor, input_metric: torch.Tensor | None = None, output_metric: torch.Tensor | None = None
) -> MetricFactors:
    r"""Factorize a matrix so that each truncation is optimal in the metric `(A, B)`.

    With roots `PᵀP = B`, `QQᵀ = A` and the singular value decomposition `P W Q = U S Vᵀ`, the best approximation of
    rank `k` under `tr(B D A Dᵀ)` is `P⁻¹ U_k S_k V_kᵀ Q⁻¹`, and its squared error is the tail `Σ_{i>k} S_i²`
    (Eckart–Young in a metric). It equals `P⁻¹ U_k U_kᵀ P W` and also `W Q V_k V_kᵀ Q⁻¹`, so only the smaller side
    needs a root; `U` (or `V`) comes from the eigendecomposition of the Gram matrix of that side.

    Args:
        weight: the matrix W.  # shape: (..., out, in)
        input_metric: A, or its diagonal, or None for the identity.  # shape: (..., in, in) or (..., in)
        output_metric: B, or its diagonal, or None for the identity.  # shape: (..., out, out) or (..., out)

    Returns:
        Factors in float64 that reproduce W at full rank (up to the null space of a singular metric).

    Raises:
        NumericalError: if the shapes do not match, or an argument is not finite.

    Source: Hsu et al. 2022 (FWSVD), Chen et al. 2021 (DRONE), Wang et al. 2024 (SVD-LLM) for one-sided metrics.
    """
    out_features, in_features = weight.shape[-2:]
    _check_metric("A", input_metric, in_features, weight)
    _check_metric("B", output_metric, out_features, weight)
    if not torch.isfinite(weight).all():
        raise NumericalError("metric_svd: W has entries that are not finite.")
    W = weight.double()
    A = None if input_metric is None else input_metric.double()
    B = None if output_metric is None else output_metric.double()
    if out_features <= in_features:
        root, inverse = _roots(B, diagonal=B is not None and B.ndim < W.ndim)
        PW = _times(root, W)
        values, U = torch.linalg.eigh(PW @ _times(A, PW.mT))
        U = U.flip(-1)
        left, right = _times(inverse, U), U.mT @ PW
    else:
        root, inverse = _roots(A, diagonal=A is not None and A.ndim < W.ndim)
        WQ = _times(root, W.mT).mT
        values, V = torch.linalg.eigh(WQ.mT @ _times(B, WQ))
        V = V.flip(-1)
        left, right = WQ @ V, _times(inverse, V).mT
    return MetricFactors(left, right, values.flip(-1).clamp_min(0.0).sqrt())


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
    left, right = factors.left.double(), factors.right.double()
    terms = (left.mT @ grad_covariance.double() @ left) * (right @ input_covariance.double() @ right.mT)
    block_sums = terms.flip(-2, -1).cumsum(-2).cumsum(-1).diagonal(dim1=-2, dim2=-1).flip(-1)
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
    with threadpool_limits(1, "blas"):  # the threads of scipy's BLAS would keep spinning, and slow down those of torch
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


def shifted_weight(
    weight: torch.Tensor, output_cross: torch.Tensor, input_gram: torch.Tensor, ridge: float
) -> torch.Tensor:
    r"""Return the weight that best reproduces the outputs `W X` from other inputs `X'`.

    $$T = (W X X'^\top + WΛ)\,(X' X'^\top + Λ)^{-1},$$

    the minimizer of `‖W X − T X'‖² + ‖(T − W) Λ^½‖²`, with `Λ = ridge · diag(X'X'ᵀ)`: the ridge of each channel is
    relative to its own size, so that the result follows a rescaling of the channels. Where `X'` says nothing (dead
    inputs, fewer rows than features), `T` stays at `W`.

    Args:
        weight: W.  # shape: (..., out, in)
        output_cross: `W X X'ᵀ` per row.  # shape: (..., out, in)
        input_gram: `X' X'ᵀ` per row.  # shape: (..., in, in)
        ridge: relative ridge, above 0.

    Returns:
        T in float64.  # shape: (..., out, in)
    """
    weight, input_gram, output_cross = weight.double(), input_gram.double(), output_cross.double()
    diagonal = input_gram.diagonal(dim1=-2, dim2=-1)
    seen = ~(diagonal <= 0)  # what is not a number stays it
    scale = torch.where(seen, diagonal, 1.0).sqrt()  # of the channels; the system is solved for channels of size 1
    columns = scale[..., None, :]
    correlation = torch.where(seen[..., None], input_gram / (scale[..., :, None] * columns), 0.0)
    known = torch.where(seen[..., None, :], output_cross / columns, 0.0) + ridge * weight * columns
    system = correlation + ridge * torch.eye(diagonal.shape[-1]).to(diagonal)
    return torch.linalg.solve(system, known, left=False) / columns
