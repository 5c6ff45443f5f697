"""From a weight and its statistics to nested factors and a loss curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..errors import ConfigurationError, NumericalError
from ..statistics import LayerStatistics
from .curves import LossCurve
from .decomposition import MetricFactors, is_finite, metric_svd
from .linalg import pivoted_form, quadratic_tails
from .metrics import METRICS

SMALLEST_NORM = 1e-100  # below it a factor counts as zero, where balancing would divide by it


class FactorTensors(NamedTuple):
    """What `FactorizedLinear.load_factors` takes; shapes are given there."""

    down: torch.Tensor
    up: torch.Tensor
    permutation: torch.Tensor | None


@dataclass(frozen=True)
class Factorization:
    """Nested factors of one weight, or of each matrix of it; every rank is a slice.

    Attributes:
        factors: left and right factors of full rank, in float64.
    """

    factors: MetricFactors

    def contiguous(self) -> Factorization:
        """Return it as it comes back from a file."""
        return Factorization(self.factors.contiguous())

    def weight(self, rank: int) -> torch.Tensor:
        """Return the approximation of the given rank.  # shape: (..., out, in)."""
        return self.factors.left[..., :rank] @ self.factors.right[..., :rank, :]

    def truncate(self, rank: int, storage: str, pivot_inputs: bool = False) -> FactorTensors:
        """Return the factors of the given rank in the given storage.

        Args:
            rank: `k`, from 1 to `min(out, in)` (below it for pivoted storage).
            storage: `pivoted` or `two-factor`.
            pivot_inputs: whether pivots are columns of the weight rather than rows.

        Returns:
            Tensors for `load_factors`, with the leading dimensions of the factors.
        """
        left, right = self.factors.left[..., :rank], self.factors.right[..., :rank, :]
        if left.ndim > 2:
            parts = [Factorization(MetricFactors(*each)) for each in zip(*self.factors, strict=True)]
            down, up, order = zip(*(part.truncate(rank, storage, pivot_inputs) for part in parts), strict=True)
            return FactorTensors(
                torch.stack(down), torch.stack(up), None if storage == "two-factor" else torch.stack(order)
            )
        if storage == "pivoted" and pivot_inputs:
            form = pivoted_form(right.T, left.T)
            return FactorTensors(form.coefficients.T, form.skeleton.T, torch.argsort(form.permutation))
        if storage == "pivoted":
            form = pivoted_form(left, right)
            return FactorTensors(form.skeleton, form.coefficients, form.permutation)
        # Balance the two factors, so that neither loses precision in a narrow dtype; a zero one stays zero.
        left_norms, right_norms = (norms.clamp_min(SMALLEST_NORM) for norms in (left.norm(dim=0), right.norm(dim=1)))
        scale = (left_norms / right_norms).sqrt()
        return FactorTensors(right * scale[:, None], left / scale, None)


def factorize(weight: torch.Tensor, stats: LayerStatistics, metric: str, damping: float) -> Factorization:
    """Factorize one weight in one of the named metrics.

    | metric | A (inputs) | B (output gradients) | known as |
    |---|---|---|---|
    | `identity` | I | I | SVD |
    | `fisher` | I | row Fisher, `diag(B)` | FWSVD |
    | `activation-diagonal` | `diag(A)` | I | ASVD (α = ½) |
    | `activation` | A | I | DRONE, SVD-LLM |
    | `kronecker` | A | B | K-FAC SVD, GFWSVD |

    Args:
        weight: the dense weight.  # shape: (..., out, in)
        stats: its statistics.
        metric: a key of `METRICS`.
        damping: relative damping of A and B.

    Returns:
        The nested factors.

    Raises:
        ConfigurationError: if the metric is unknown.
        NumericalError: if the weight or the statistics are not finite.
    """
    if metric not in METRICS:
        raise ConfigurationError(f"metric: {metric!r} is unknown; choose one of {', '.join(METRICS)}.")
    input_metric, output_metric = METRICS[metric](stats, damping)
    factors = metric_svd(weight, input_metric, output_metric)
    if not all(is_finite(factor) for factor in factors):
        raise NumericalError(f"the factorization of a {tuple(weight.shape)} weight is not finite; raise `damping`.")
    return Factorization(factors)


def loss_curve(
    weight: torch.Tensor,
    factorization: Factorization,
    stats: LayerStatistics,
    storage: str = "pivoted",
    with_noise: bool = False,
) -> LossCurve:
    r"""Predict the loss of one layer for every rank, which all of its matrices have.

    With `l_i`, `r_i` the columns and rows of the factors and `D_k = −Σ_{i>k} l_i r_i`:
    first order `⟨G, D_k⟩ = −Σ_{i>k} l_iᵀ G r_iᵀ`, second order `½ tr(B D_k A D_kᵀ)`.

    Args:
        weight: the dense weight.  # shape: (..., out, in)
        factorization: its factors.
        stats: its statistics, not damped.
        storage: storage whose parameters are counted: one of `STORAGE_CHOICES`.
        with_noise: whether to compute `max |D_k|`, which only the paper's rules need.

    Returns:
        The curve.
    """
    left, right, _ = factorization.factors
    first = None
    if stats.weight_grad is not None:
        slopes = ((left.mT.double() @ stats.weight_grad.double()) * right).sum(-1)
        first = -torch.cat([slopes.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(slopes[..., :1])], dim=-1)
    second = quadratic_tails(factorization.factors, stats.input_covariance, stats.grad_covariance)
    noise = _max_noise(weight.double(), factorization.factors) if with_noise else None
    *matrices, out_features, in_features = weight.shape
    return LossCurve(
        out_features=out_features,
        in_features=in_features,
        storage=storage,
        first_order=None if first is None else _over_matrices(first),
        second_order=_over_matrices(second),
        max_noise=noise,
        groups=math.prod(matrices),
    )


def _over_matrices(costs: torch.Tensor) -> np.ndarray:
    return np.asarray(costs.reshape(-1, costs.shape[-1]).sum(0).cpu().numpy())


def _max_noise(weight: torch.Tensor, factors: MetricFactors) -> np.ndarray:
    """Return `max |Ŵ_k − W|` for every rank.  # shape: (m + 1,)."""
    remainder = weight.clone()
    noise = [remainder.abs().max()]
    for rank in range(factors.left.shape[-1]):
        remainder -= factors.left[..., rank, None] * factors.right[..., rank, None, :]
        noise.append(remainder.abs().max())
    return torch.stack(noise).cpu().numpy()
