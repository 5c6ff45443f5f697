"""From W, G, A and B to nested factors, their predicted loss at every rank, and the refit to shifted inputs.

`linalg` and `decomposition` know tensors only.
"""

from .batch_norms import batch_norms, shifted_batch_norms
from .curves import LossCurve, RoundingCost
from .decomposition import MetricFactors, metric_svd
from .dimensions import DenseLayer, FewerDimensions, NarrowLayer, dimension_counts, fewer_dimensions
from .factorize import Factorization, factorize, loss_curve
from .filling import fill
from .linalg import damped
from .metrics import METRICS
from .refit import RefitTarget, refit, refit_groups
from .refitted import RefittedLayers
from .rounding import RoundedFactors, round_dense, round_factors, rounding_costs
from .shelf import Forms, ShelvedFactorizations
from .signal import silent_layers
from .spatial import (
    SpatialFactorization,
    factorize_spatially,
    spatial_curve,
    spatial_kernel,
    spatial_matrix,
    spatial_metric,
    spatial_needs,
)

__all__ = [
    "METRICS",
    "DenseLayer",
    "Factorization",
    "FewerDimensions",
    "Forms",
    "LossCurve",
    "MetricFactors",
    "NarrowLayer",
    "RefitTarget",
    "RefittedLayers",
    "RoundedFactors",
    "RoundingCost",
    "ShelvedFactorizations",
    "SpatialFactorization",
    "batch_norms",
    "damped",
    "dimension_counts",
    "factorize",
    "factorize_spatially",
    "fewer_dimensions",
    "fill",
    "loss_curve",
    "metric_svd",
    "refit",
    "refit_groups",
    "round_dense",
    "round_factors",
    "rounding_costs",
    "shifted_batch_norms",
    "silent_layers",
    "spatial_curve",
    "spatial_kernel",
    "spatial_matrix",
    "spatial_metric",
    "spatial_needs",
]
