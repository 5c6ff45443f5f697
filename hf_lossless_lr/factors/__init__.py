"""From W, G, A and B to nested factors, their predicted loss at every rank, and the refit to shifted inputs.

`linalg` knows tensors only.
"""

from .curves import LossCurve
from .factorize import Factorization, factorize, loss_curve
from .metrics import METRICS
from .refit import RefitTarget, refit, refit_groups
from .signal import silent_layers

__all__ = [
    "METRICS",
    "Factorization",
    "LossCurve",
    "RefitTarget",
    "factorize",
    "loss_curve",
    "refit",
    "refit_groups",
    "silent_layers",
]
