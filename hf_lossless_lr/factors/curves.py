"""Predicted loss of one layer for all ranks.

Arrays are numpy float64, indexed by the rank `k = 0 … m` with `m = min(out, in)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..layers import break_even_rank, factorized_parameters


@dataclass(frozen=True)
class LossCurve:
    """What replacing one layer by its rank-`k` form is predicted to cost, for every `k`.

    Attributes:
        out_features: rows of the weight, or of each of its matrices.
        in_features: columns of the same.
        storage: how the factors are stored: `pivoted`, `two-factor` or `auto`.
        first_order: `⟨G, Ŵ_k − W⟩` in nats.  # shape: (m + 1,)
        second_order: `½ tr(B D A Dᵀ)` in nats, at least 0.  # shape: (m + 1,)
        max_noise: `max |Ŵ_k − W|` elementwise, only where a rule needs it.  # shape: (m + 1,)
        groups: number of matrices, all of one shape and rank.
    """

    out_features: int
    in_features: int
    storage: str
    first_order: np.ndarray
    second_order: np.ndarray
    max_noise: np.ndarray | None = None
    groups: int = 1

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense weight."""
        return self.groups * self.out_features * self.in_features

    @property
    def break_even_rank(self) -> int:
        """Largest rank that compresses this layer in its storage."""
        return break_even_rank(self.out_features, self.in_features, self.storage)

    def parameters(self, rank: int | None) -> int:
        """Return the parameters of the weight at `rank`, or of the dense weight for None."""
        if rank is None:
            return self.dense_parameters
        return self.groups * factorized_parameters(self.out_features, self.in_features, rank, self.storage)
