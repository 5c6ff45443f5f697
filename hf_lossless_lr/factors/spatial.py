r"""The spatial form of a kernel: `(kh, 1)` filters to `k` channels, then `(1, kw)` filters.

The kernel `(out, in, kh, kw)` is seen as the matrix `(out · kw, in · kh)`. No Kronecker product is its exact metric.
With the second moments of patches `A[c i j, c' i' j']` and of output gradients `B`, this one chooses the first ones:

$$A_v = \frac1{kw} Σ_j A[·j, ·j] \ (in·kh),\qquad B ⊗ A_h,\quad A_h ∝ Σ_{ci} A[ci·, ci·] \ (kw).$$

The second filters are then solved in the full A. With `V̂` the first ones at each of the `kw` columns,
`U = W A V̂ᵀ (V̂ A V̂ᵀ)⁻¹`. For the Cholesky factor `L` of `V̂ A V̂ᵀ` and `Y = L⁻¹ V̂ A Wᵀ`, the leading blocks of both serve
every rank. So does the cost, `½ tr(B (W A Wᵀ − Y_kᵀ Y_k))`: exact but for a ridge, by which it is a little too large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import NumericalError
from ..layers import SPATIAL, break_even_rank, layout_of, weight_matrices
from .curves import LossCurve
from .decomposition import MetricFactors, metric_svd
from .factorize import SMALLEST_NORM, FactorTensors
from .linalg import damped

LARGEST = 2048  # side of the matrix that is decomposed; larger ones would cost more than all else
RIDGE = 1e-4  # relative damping of A for the second filters: the less, the better they fit, down to its precision
BETWEEN = 1e-8  # relative damping of the second moments between the filters: enough for a filter that is zero

Kernel = tuple[int, ...]


@dataclass(frozen=True)
class SpatialFactorization:
    """Nested filters of a kernel in its spatial form, for each group of channels.

    Attributes:
        factors: of the matrix `(out · kw, in · kh)`, in the metric that chooses `right`, the first filters.
        lower: L.  # shape: (groups, m · kw, m · kw)
        solved: Y.  # shape: (groups, m · kw, out)
        width: `kw`.
    """

    factors: MetricFactors
    lower: torch.Tensor
    solved: torch.Tensor
    width: int

    def contiguous(self) -> SpatialFactorization:
        """Return it as it comes back from a file."""
        factors = self.factors.contiguous()
        return SpatialFactorization(factors, self.lower.contiguous(), self.solved.contiguous(), self.width)

    def truncate(self, rank: int, storage: str = "two-factor", pivot_inputs: bool = False) -> FactorTensors:
        """Return the filters of the given rank, balanced.

        Args:
            rank: `k`.
            storage: `two-factor`, the only one.
            pivot_inputs: False, for there are no pivots.

        Returns:
            Tensors for `load_factors`.  # shape: (groups, k, in · kh) and (groups, out, k · kw)
        """
        size, first = rank * self.width, self.factors.right[..., :rank, :].double()
        second = torch.linalg.solve_triangular(
            self.lower[..., :size, :size].mT, self.solved[..., :size, :], upper=True
        ).mT
        by_rank = second.unflatten(-1, (rank, self.width))
        norms = first.norm(dim=-1), by_rank.norm(dim=(-3, -1))
        scale = (norms[1].clamp_min(SMALLEST_NORM) / norms[0].clamp_min(SMALLEST_NORM)).sqrt()
        up = (by_rank / scale[..., None, :, None]).flatten(-2)
        return FactorTensors(first * scale[..., None], up, None)


def has_spatial_candidates(shape: tuple[int, ...], kernel: Kernel) -> bool:
    """Return whether the spatial form of a kernel is worth its decomposition.

    Args:
        shape: of the kernel matrices: groups, out, in · kh · kw.
        kernel: sizes of the kernel.

    Returns:
        Whether its matrix is not too large.
    """
    _, out, size = shape
    return max(out * kernel[1], size // kernel[1]) <= LARGEST


def spatial_kernel(module: Any) -> Kernel | None:
    """Return the kernel of a dense layer for which the spatial form is a candidate; None for any other layer."""
    layout = layout_of(module)
    kernel = layout.kernel_size(module)
    possible = SPATIAL in layout.forms(module) and has_spatial_candidates(weight_matrices(module).shape, kernel)
    return kernel if possible else None


def spatial_matrix(weight: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """Return kernel matrices as those of the spatial form.

    Args:
        weight: W.  # shape: (..., out, in · kh · kw)
        kernel: `kh, kw`.

    Returns:
        The matrices.  # shape: (..., out · kw, in · kh)
    """
    return weight.unflatten(-1, (-1, kernel[1])).mT.flatten(-3, -2)


def spatial_metric(A: torch.Tensor, B: torch.Tensor, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `A_v` and `B ⊗ A_h`.

    Args:
        A: second moments of the patches.  # shape: (..., in · kh · kw, in · kh · kw)
        B: second moments of the output gradients.  # shape: (..., out, out)
        kernel: `kh, kw`.

    Returns:
        The metric of the input side and of the output side.  # shape: (..., in · kh, in · kh), (..., out · kw, …)
    """
    horizontal = _by_column(A, kernel[1]).diagonal(dim1=-4, dim2=-2).sum(-1).double()
    horizontal = horizontal / horizontal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(SMALLEST_NORM)
    product = torch.einsum("...op,...ij->...oipj", B.double(), horizontal)
    return vertical_moments(A, kernel[1]), product.flatten(-4, -3).flatten(-2, -1).to(B.dtype)


def vertical_moments(A: torch.Tensor, width: int) -> torch.Tensor:
    """Return `A_v`, the mean over the columns of a kernel.  # shape: (..., in · kh, in · kh)."""
    return _by_column(A, width).diagonal(dim1=-3, dim2=-1).mean(-1)


def _by_column(A: torch.Tensor, width: int) -> torch.Tensor:
    return A.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))


def factorize_spatially(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, kernel: Kernel, damping: float, largest: int | None = None
) -> SpatialFactorization:
    """Factorize kernels in their spatial form.

    Args:
        weight: W.  # shape: (groups, out, in · kh · kw)
        A: second moments of the patches, not damped.  # shape: (groups, in · kh · kw, in · kh · kw)
        B: second moments of the output gradients, not damped.  # shape: (groups, out, out)
        kernel: `kh, kw`.
        damping: relative damping of the metric that chooses the first filters.
        largest: rank; default the largest one that compresses.

    Returns:
        The nested filters.

    Raises:
        NumericalError: if an argument is not finite.
    """
    matrix = spatial_matrix(weight.double(), kernel)
    vertical, horizontal = spatial_metric(A, B, kernel)
    rank = _largest_rank(*matrix.shape[-2:]) if largest is None else largest
    factors = metric_svd(matrix, damped(vertical, damping), damped(horizontal, damping), rank)
    lower, solved = _second_filters(factors.right, weight, A, kernel[1])
    return SpatialFactorization(factors, lower, solved, kernel[1])


def _largest_rank(rows: int, columns: int) -> int:
    """Return the largest rank that compresses, but 1 at least."""
    return max(break_even_rank(rows, columns, "two-factor"), 1)


def _second_filters(
    first: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L and Y for the given first filters."""
    V, A = first.double(), A.double()  # rounding of float32 would exceed the ridge
    passed = torch.einsum("...rp,...pjq->...rjq", V, A.unflatten(-2, (-1, width)))  # V̂ A
    between = torch.einsum("...rjpi,...sp->...rjsi", passed.unflatten(-1, (-1, width)), V)
    channels = RIDGE * A.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, width))
    ridge = torch.einsum("...rp,...pj,...sp->...jrs", V, channels, V)  # the same in each column, and none between them
    between.diagonal(dim1=-3, dim2=-1).add_(ridge.movedim(-3, -1))
    gram = between.flatten(-2).flatten(-3, -2)
    cross = passed.flatten(-3, -2) @ weight.double().mT
    lower = _lower(gram)
    return lower, torch.linalg.solve_triangular(lower, cross, upper=False)


def _lower(gram: torch.Tensor) -> torch.Tensor:
    """Return the Cholesky factor of a matrix that may be singular by rounding: with as little damping as it takes."""
    damping = BETWEEN
    while True:
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damping))
        if not failed.any():
            return lower
        if damping > 1:
            raise NumericalError("the second moments between the filters of a kernel are not finite.")
        damping *= 10


def spatial_curve(
    weight: torch.Tensor, factorization: SpatialFactorization, A: torch.Tensor, B: torch.Tensor
) -> LossCurve:
    """Return the loss curve of the spatial form: its cost in the full A, at every rank that compresses.

    Args:
        weight: W.  # shape: (groups, out, in · kh · kw)
        factorization: its filters.
        A: second moments of the patches, not damped.
        B: second moments of the output gradients, not damped.

    Returns:
        The curve.
    """
    groups, out, size = weight.shape
    width, W, solved = factorization.width, weight.to(A.dtype), factorization.solved
    total = ((W @ A @ W.mT).double() * B.double()).sum()
    taken = (solved @ B.double() * solved).sum(-1).unflatten(-1, (-1, width)).sum((0, -1)).cumsum(0)
    left = 0.5 * (total - torch.cat([taken.new_zeros(1), taken])).clamp_min(0.0)
    return LossCurve(
        out_features=out * width,
        in_features=size // width,
        storage="two-factor",
        first_order=None,
        second_order=np.asarray(left.cpu().numpy()),
        groups=groups,
        form=SPATIAL,
        width=width,
    )


def solved_second(
    first: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second filters that go best with given first ones, and the second moments between the two.

    Args:
        first: of one group.  # shape: (k, in · kh)
        weight: the kernel matrix of the group.  # shape: (out, in · kh · kw)
        A: second moments of its patches.
        width: `kw`.

    Returns:
        The filters, and the second moments.  # shape: (out, k · kw), (k · kw, k · kw)
    """
    lower, solved = _second_filters(first, weight, A, width)
    up: Any = torch.linalg.solve_triangular(lower.mT, solved, upper=True).mT
    return up, lower @ lower.mT


def spatial_needs(shape: tuple[int, ...], kernel: Kernel) -> int:
    """Return the numbers that nested filters hold.

    Args:
        shape: of the kernel matrices: groups, out, in · kh · kw.
        kernel: `kh, kw`.

    Returns:
        The count, at the largest rank that compresses.
    """
    groups, out, size = shape
    rows, columns = out * kernel[1], size // kernel[1]
    rank = _largest_rank(rows, columns)
    return groups * (rank * (rows + columns) + rank * kernel[1] * (rank * kernel[1] + out))
