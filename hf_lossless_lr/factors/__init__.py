"""From W, G, A and B to nested factors, their predicted loss at every rank, and the refit to shifted inputs.

`linalg` and `decomposition` know tensors only.
"""

from .curves import LossCurve, RoundingCost
from .factorize import Factorization, factorize, loss_curve
from .filling import fill
from .linalg import damped
from .metrics import METRICS
from .refit import RefitTarget, refit, refit_groups
from .rounding import RoundedFactors, round_dense, round_factors, rounding_costs
from .shelf import ShelvedFactorizations
from .signal import silent_layers

__all__ = [
    "METRICS",
    "Factorization",
    "LossCurve",
    "RefitTarget",
    "RoundedFactors",
    "RoundingCost",
    "ShelvedFactorizations",
    "damped",
    "factorize",
    "fill",
    "loss_curve",
    "refit",
    "refit_groups",
    "round_dense",
    "round_factors",
    "rounding_costs",
    "silent_layers",
]
