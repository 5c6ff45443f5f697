r"""The singular value decomposition of a matrix in a metric.

A *metric* is a pair of symmetric positive semi-definite matrices: `A (in, in)` on the input side and `B (out, out)`
on the output side. Each may also be a vector (a diagonal matrix) or `None` (the identity). It measures a change `D` of
the weight by

$$\|D\|^2_{A,B} = \mathrm{tr}(B\,D\,A\,D^\top).$$

Leading dimensions are those of several independent matrices. Small matrices are decomposed in float64, large ones in
float32, with a check in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..errors import NumericalError
from ..statistics import LARGE, gram

TOLERANCE = 1e-4  # of its residual
PROBES = 4  # vectors that see it
SLAB = 256  # rows that are converted or multiplied at once


class MetricFactors(NamedTuple):
    """Factors of a matrix, nested in the rank: `left[..., :k] @ right[..., :k, :]` is the best one of rank `k`."""

    left: torch.Tensor  # shape: (..., out, m), m = min(out, in)
    right: torch.Tensor  # shape: (..., m, in)
    singular_values: torch.Tensor  # shape: (..., m), descending, in the metric

    def contiguous(self) -> MetricFactors:
        """Return them as they come back from a file: last bits of a product depend on how numbers lie in memory."""
        return MetricFactors(*(tensor.contiguous() for tensor in self))


def _times(metric: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """Return `metric @ matrix` for a full, diagonal or identity metric."""
    if metric is None:
        return matrix
    return metric[..., None] * matrix if metric.ndim < matrix.ndim else metric @ matrix


class _Root(NamedTuple):
    """A root `P` of a metric, `PᵀP`, as `factor · diag(scale)`; the identity, or diagonal, without these.

    It is a root of the metric with unit diagonal, times the roots of the diagonal: channels of very different scales
    do not lose precision to one another.
    """

    scale: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    inverse: torch.Tensor | None = None  # of a factor that is not triangular

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return `P @ matrix`."""
        scaled = matrix if self.scale is None else self.scale[..., None] * matrix
        if self.factor is None:
            return scaled
        return _upper_times(self.factor, scaled) if self.inverse is None else self.factor @ scaled

    def solve(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return `P⁻¹ @ matrix`, with the pseudo-inverse of a singular metric."""
        if self.factor is not None:
            triangular = self.inverse is None
            solved = torch.linalg.solve_triangular(self.factor, matrix, upper=True) if triangular else None
            matrix = self.inverse @ matrix if solved is None else solved  # type: ignore[operator]
        if self.scale is None:
            return matrix
        return torch.where(self.scale > 0, 1 / self.scale, 0.0)[..., None] * matrix


def _upper_times(upper: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return `upper @ matrix` of a triangular matrix, in slabs of rows without what is zero in all of them."""
    slabs = zip(range(0, upper.shape[-1], SLAB), upper.split(SLAB, dim=-2), strict=True)
    return torch.cat([slab[..., start:] @ matrix[..., start:, :] for start, slab in slabs], dim=-2)


def _root(metric: torch.Tensor | None, weight: torch.Tensor) -> _Root:
    """Return a root of a metric: triangular where it is positive definite beyond rounding, else symmetric."""
    if metric is None:
        return _Root()
    scale = _channels(metric, weight).clamp_min(0.0).sqrt()
    if metric.ndim < weight.ndim:
        return _Root(scale)
    scale = torch.where(scale > 0, scale, 1.0)
    unit = metric / (scale[..., :, None] * scale[..., None, :])
    rounding = unit.shape[-1] * torch.finfo(unit.dtype).eps
    lower, failed = torch.linalg.cholesky_ex(unit)
    if not failed.any() and lower.diagonal(dim1=-2, dim2=-1).amin() > (4 * rounding) ** 0.5:
        return _Root(scale, lower.mT)
    values, vectors = torch.linalg.eigh(unit)
    floor = values.amax(-1, keepdim=True) * rounding
    root = values.clamp_min(0.0).sqrt()
    inverse = torch.where(values > floor, values.clamp_min(floor).rsqrt(), torch.zeros_like(values))
    symmetric, inverted = ((vectors * each[..., None, :]) @ vectors.mT for each in (root, inverse))
    return _Root(scale, symmetric, inverted)


def _check_metric(name: str, metric: torch.Tensor | None, size: int, weight: torch.Tensor) -> None:
    if metric is None:
        return
    *matrices, out, in_ = weight.shape
    if metric.shape not in (torch.Size([*matrices, size, size]), torch.Size([*matrices, size])):
        raise NumericalError(
            f"metric_svd: W is {(out, in_)}, so A must be ({in_}, {in_}) and B ({out}, {out}) (or their diagonals); "
            f"{name} is {tuple(metric.shape[len(matrices) :])}. For Conv1D pass the transposed weight."
        )
    if not is_finite(metric):
        raise NumericalError(f"metric_svd: {name} has entries that are not finite.")


def is_finite(matrix: torch.Tensor) -> bool:
    """Return whether all entries are finite: the extremes are, much faster to find, and not where one is no number."""
    return bool(torch.isfinite(torch.stack(matrix.aminmax())).all())


def metric_svd(
    weight: torch.Tensor,
    input_metric: torch.Tensor | None = None,
    output_metric: torch.Tensor | None = None,
    rank: int | None = None,
) -> MetricFactors:
    r"""Factorize a matrix so that each truncation is optimal in the metric `(A, B)`.

    With roots `PᵀP = B`, `QQᵀ = A` and the singular value decomposition `P W Q = U S Vᵀ`, the best approximation of
    rank `k` under `tr(B D A Dᵀ)` is `P⁻¹ U_k S_k V_kᵀ Q⁻¹`, and its squared error is the tail `Σ_{i>k} S_i²`
    (Eckart–Young in a metric). It equals `P⁻¹ U_k U_kᵀ P W` and also `W Q V_k V_kᵀ Q⁻¹`, so only the smaller side
    needs a root; `U` (or `V`) comes from the eigendecomposition of the Gram matrix of that side. A root need not be
    symmetric: a triangular one costs a small part of an eigendecomposition.

    A matrix whose smaller side is `LARGE` or more is decomposed in float32, unless a check in float64 finds the
    residual too large. Its factors are in float32, all others in float64.

    Args:
        weight: the matrix W.  # shape: (..., out, in)
        input_metric: A, or its diagonal, or None for the identity.  # shape: (..., in, in) or (..., in)
        output_metric: B, or its diagonal, or None for the identity.  # shape: (..., out, out) or (..., out)
        rank: largest rank that is wanted, which spares products; None for all of them.

    Returns:
        Factors that reproduce W at full rank (up to the null space of a singular metric).

    Raises:
        NumericalError: if the shapes do not match, or an argument is not finite.

    Source: Hsu et al. 2022 (FWSVD), Chen et al. 2021 (DRONE), Wang et al. 2024 (SVD-LLM) for one-sided metrics.
    """
    out_features, in_features = weight.shape[-2:]
    _check_metric("A", input_metric, in_features, weight)
    _check_metric("B", output_metric, out_features, weight)
    if not is_finite(weight):
        raise NumericalError("metric_svd: W has entries that are not finite.")
    if out_features > in_features:
        factors = _svd(weight.mT, output_metric, input_metric, rank)
        return MetricFactors(factors.right.mT, factors.left.mT, factors.singular_values)
    return _svd(weight, input_metric, output_metric, rank)


def _svd(weight: torch.Tensor, A: torch.Tensor | None, B: torch.Tensor | None, rank: int | None) -> MetricFactors:
    """Factorize a matrix that has no more rows than columns."""
    if weight.shape[-2] >= LARGE:
        sizes = [_size(weight), *(1.0 if side is None else _size(_channels(side, weight)) for side in (A, B))]
        W, A_unit, B_unit = (
            None if matrix is None else (matrix.to(torch.promote_types(matrix.dtype, torch.float32)) / size).float()
            for matrix, size in zip((weight, A, B), sizes, strict=True)
        )
        left, right, values = _svd_in_dtype(W, A_unit, B_unit, rank=rank)  # matrices of size 1: its range is small
        factors = MetricFactors(
            left * sizes[2] ** -0.5,
            right * (sizes[0] * sizes[2] ** 0.5),
            values * math.sqrt(math.prod(sizes) * sizes[0]),
        )
        if _residual(factors, weight, A, B) <= TOLERANCE:
            return factors
    wide = (None if matrix is None else matrix.double() for matrix in (weight, A, B))
    return _svd_in_dtype(*wide, rank=rank)


def _svd_in_dtype(W: Any, A: torch.Tensor | None, B: torch.Tensor | None, *, rank: int | None) -> MetricFactors:
    root = _root(B, W)
    PW = root.times(W)
    values, U = torch.linalg.eigh(gram(PW.mT, _times(A, PW.mT)))
    U, values = U.flip(-1)[..., :rank], values.flip(-1)[..., :rank]
    return MetricFactors(root.solve(U), U.mT @ PW, values.clamp_min(0.0).sqrt())


def _channels(metric: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of a metric."""
    return metric if metric.ndim < weight.ndim else metric.diagonal(dim1=-2, dim2=-1)


def _size(numbers: torch.Tensor) -> float:
    """Return the mean magnitude of numbers; above 0."""
    return float(numbers.abs().mean(dtype=torch.float64)) or 1.0


def _residual(factors: MetricFactors, weight: torch.Tensor, A: torch.Tensor | None, B: torch.Tensor | None) -> float:
    """Return the largest relative error, seen by random vectors in float64, of what the factors have to fulfil.

    `R = Lᵀ B W`, `W A Wᵀ B L = L S²` and `Lᵀ B L = I`, at any rank; infinite where one is not finite. Errors of `L`
    are in the metric B, in which its columns have length 1.
    """
    generator = torch.Generator().manual_seed(0)
    *matrices, _, in_features = weight.shape
    L, R, S = factors
    y, z = (
        torch.randn(*matrices, size, PROBES, dtype=torch.float64, generator=generator).to(weight.device)
        for size in (S.shape[-1], in_features)
    )
    Ly = _applied(L, y)
    BLy = _applied(B, Ly)
    pairs = (
        (_applied(R, z), _applied(L.mT, _applied(B, _applied(weight, z))), None),
        (_applied(L, S.double().square()[..., None] * y), _applied(weight, _applied(A, _applied(weight.mT, BLy))), B),
        (_applied(L.mT, BLy), y, None),
    )
    errors = [(_norm(found - wanted, M) / _norm(wanted, M)).max() for found, wanted, M in pairs]
    return float(torch.stack(errors).nan_to_num(math.inf, math.inf).max())


def _applied(matrix: torch.Tensor | None, vectors: torch.Tensor) -> torch.Tensor:
    """Return `matrix @ vectors` in float64, of a full, diagonal or identity matrix; never with a copy of all of it."""
    if matrix is None or matrix.ndim < vectors.ndim:
        return _times(None if matrix is None else matrix.double(), vectors)
    return torch.cat([slab.double() @ vectors for slab in matrix.split(SLAB, dim=-2)], dim=-2)


def _norm(vectors: torch.Tensor, B: torch.Tensor | None) -> torch.Tensor:
    return (vectors * _applied(B, vectors)).sum((-2, -1)).clamp_min(0.0).sqrt()
