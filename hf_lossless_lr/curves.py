"""Predicted loss and size of one layer for all ranks: the only place with a cost formula.

Arrays are numpy float64, indexed by the rank `k = 0 … m` with `m = min(out, in)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

STORAGES = ("pivoted", "two-factor")
NEGLIGIBLE_SAVING = 0.05  # `auto` drops the pivots where they save less than this share of two factors


def choose_storage(out_features: int, in_features: int, rank: int, storage: str) -> str:
    """Resolve `auto` for one layer: pivoted, unless its saving is negligible and two factors compress as well.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: `k`.
        storage: `auto`, or a storage that is returned as it is.

    Returns:
        `pivoted` or `two-factor`.
    """
    if storage != "auto":
        return storage
    pivoted = rank * (out_features + in_features - rank)
    two_factor = rank * (out_features + in_features)
    negligible = two_factor - pivoted < NEGLIGIBLE_SAVING * two_factor
    return "two-factor" if negligible and two_factor < out_features * in_features else "pivoted"


def factorized_parameters(out_features: int, in_features: int, rank: int, storage: str) -> int:
    """Return the numbers stored for a weight of the given rank, without its bias.

    `k (out + in)` for `two-factor` and `k (out + in − k)` for `pivoted` storage; `auto` is one of the two.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: `k`.
        storage: `pivoted`, `two-factor` or `auto`.

    Returns:
        The number of parameters.
    """
    saved = rank if choose_storage(out_features, in_features, rank, storage) == "pivoted" else 0
    return rank * (out_features + in_features - saved)


def break_even_rank(out_features: int, in_features: int, storage: str) -> int:
    """Return the largest rank that stores fewer numbers than the dense weight; 0 if there is none.

    The paper's compression condition `k < NM / (N + M)` for `two-factor`, and `k < min(N, M)` for `pivoted` and
    `auto` storage.

    Args:
        out_features: rows of the weight, `N`.
        in_features: columns of the weight, `M`.
        storage: `pivoted`, `two-factor` or `auto`.

    Returns:
        The largest compressing rank.
    """
    if storage != "two-factor":
        return min(out_features, in_features) - 1
    return (out_features * in_features - 1) // (out_features + in_features)


@dataclass(frozen=True)
class LayerSize:
    """What a budget counts of one layer, for every rank: parameters, FLOPs or seconds.

    Attributes:
        by_rank: size of the factorized layer.  # shape: (m + 1,)
        dense: size of the dense layer.
    """

    by_rank: np.ndarray
    dense: float

    def at(self, rank: int | None) -> float:
        """Return the size at `rank`, or of the dense layer for None."""
        return self.dense if rank is None else float(self.by_rank[rank])


@dataclass(frozen=True)
class LossCurve:
    """What replacing one layer by its rank-`k` form is predicted to cost, for every `k`.

    Attributes:
        out_features: rows of the weight.
        in_features: columns of the weight.
        storage: how the factors are stored: `pivoted`, `two-factor` or `auto`.
        first_order: `⟨G, Ŵ_k − W⟩` in nats.  # shape: (m + 1,)
        second_order: `½ tr(B D A Dᵀ)` in nats, at least 0.  # shape: (m + 1,)
        max_noise: `max |Ŵ_k − W|` elementwise, only where a rule needs it.  # shape: (m + 1,)
    """

    out_features: int
    in_features: int
    storage: str
    first_order: np.ndarray
    second_order: np.ndarray
    max_noise: np.ndarray | None = None

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense weight."""
        return self.out_features * self.in_features

    @property
    def break_even_rank(self) -> int:
        """Largest rank that compresses this layer in its storage."""
        return break_even_rank(self.out_features, self.in_features, self.storage)

    def parameters(self, rank: int | None) -> int:
        """Return the parameters of the weight at `rank`, or of the dense weight for None."""
        if rank is None:
            return self.dense_parameters
        return factorized_parameters(self.out_features, self.in_features, rank, self.storage)

    @property
    def size(self) -> LayerSize:
        """Parameters of the weight at every rank, as a size."""
        counts = [self.parameters(rank) for rank in range(min(self.out_features, self.in_features) + 1)]
        return LayerSize(np.array(counts, dtype=np.float64), float(self.dense_parameters))


def parameter_sizes(curves: Mapping[str, LossCurve]) -> dict[str, LayerSize]:
    """Return the parameters of every layer: the sizes of a budget in parameters."""
    return {name: curve.size for name, curve in curves.items()}
