"""The metrics that a weight can be factorized in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..statistics import LayerStatistics
from .linalg import damped, damped_diagonal

Side = torch.Tensor | None


def _activation_diagonal(stats: LayerStatistics, damping: float) -> tuple[Side, Side]:
    return damped_diagonal(stats.input_covariance.diagonal(dim1=-2, dim2=-1), damping), None


def _fisher(stats: LayerStatistics, damping: float) -> tuple[Side, Side]:
    return None, damped_diagonal(stats.grad_covariance.diagonal(dim1=-2, dim2=-1), damping)


METRICS: dict[str, Callable[[LayerStatistics, float], tuple[Side, Side]]] = {
    "kronecker": lambda stats, damping: (
        damped(stats.input_covariance, damping),
        damped(stats.grad_covariance, damping),
    ),
    "activation": lambda stats, damping: (damped(stats.input_covariance, damping), None),
    "activation-diagonal": _activation_diagonal,
    "fisher": _fisher,
    "identity": lambda stats, damping: (None, None),
}
"""Name of a metric to its sides `(A, B)`; None is the identity."""
