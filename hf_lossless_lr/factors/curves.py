"""Predicted loss of one layer for all ranks.

Arrays are numpy float64, indexed by the rank `k = 0 … m` with `m = min(out, in)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..formats import FLOAT
from ..layers import CHANNEL, break_even_rank, factorized_parameters, storage_in


@dataclass(frozen=True)
class RoundingCost:
    """What it is predicted to cost that the stored numbers of one layer are rounded to a format.

    Attributes:
        by_rank: cost for the factors of every rank, in nats.  # shape: (m + 1,)
        dense: cost for the dense weight, in nats.
    """

    by_rank: np.ndarray
    dense: float

    def at(self, rank: int | None) -> float:
        """Return the cost at `rank`, or for the dense weight for None."""
        return self.dense if rank is None else float(self.by_rank[rank])


@dataclass(frozen=True)
class LossCurve:
    """What replacing one layer by its rank-`k` form is predicted to cost, for every `k`.

    Attributes:
        out_features: rows of the weight, or of each of its matrices.
        in_features: columns of the same.
        storage: how the factors are stored: one of `STORAGE_CHOICES`.
        first_order: `⟨G, Ŵ_k − W⟩` in nats, where G is known.  # shape: (m + 1,)
        second_order: `½ tr(B D A Dᵀ)` in nats, at least 0.  # shape: (m + 1,)
        max_noise: `max |Ŵ_k − W|` elementwise, only where a rule needs it.  # shape: (m + 1,)
        groups: number of matrices, all of one shape and rank.
        rank_multiple: multiple that ranks of this layer are restricted to.
        pivots_inputs: whether pivots, where there are any, are inputs of the layer rather than outputs.
        rounding: what each number format costs that the layer may be stored in, finest first; None where nothing.
        form: which matrix of a kernel this is about: `channel`, or `spatial`, of `(out · kw, in · kh)`.
        width: `kw` in the spatial form.
        others: the curves of the other forms that the layer may take.
        pair: names of the two layers, of which this is one, that may take a form together; else nothing.
        paired: the curves of such forms; see `dimensions`.
        base: predicted cost of the form itself, which is part of that of every rank, in nats.
        places_bytes: bytes of what a form stores beside the weight: where its features belong.
    """

    out_features: int
    in_features: int
    storage: str
    first_order: np.ndarray | None
    second_order: np.ndarray
    max_noise: np.ndarray | None = None
    groups: int = 1
    rank_multiple: int = 1
    pivots_inputs: bool = False
    rounding: Mapping[str, RoundingCost | None] = field(default_factory=lambda: {FLOAT: None})
    form: str = CHANNEL
    width: int = 1
    others: Mapping[str, LossCurve] = field(default_factory=dict)
    pair: tuple[str, ...] = ()
    paired: Mapping[str, LossCurve] = field(default_factory=dict)
    base: float = 0.0
    places_bytes: int = 0

    def in_form(self, form: str) -> LossCurve:
        """Return the curve of a form of the layer."""
        return self if form == self.form else {**self.others, **self.paired}[form]

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense weight."""
        return self.groups * self.out_features * self.in_features

    @property
    def break_even_rank(self) -> int:
        """Largest rank that compresses this layer in its storage."""
        return self.break_even_rank_in(FLOAT)

    def break_even_rank_in(self, number_format: str) -> int:
        """Return the largest rank that stores fewer numbers than the dense weight, in a number format."""
        return break_even_rank(self.out_features, self.in_features, storage_in(number_format, self.storage))

    def multiple(self, asked: int) -> int:
        """Return what ranks of this layer are a multiple of where `asked` is the multiple for all layers."""
        return max(asked, self.rank_multiple)

    def predicted_loss(self, rank: int | None, number_format: str = FLOAT) -> float:
        """Return the second-order term and the cost of the rounding at `rank`, or of the dense weight, in nats."""
        truncation = self.base if rank is None else float(self.second_order[rank])
        rounding = self.rounding[number_format]
        return truncation + (0.0 if rounding is None else rounding.at(rank))

    def parameters(self, rank: int | None, number_format: str = FLOAT) -> int:
        """Return the numbers stored of the weight at `rank`, or of the dense weight for None."""
        if rank is None:
            return self.dense_parameters
        storage = storage_in(number_format, self.storage)
        return self.groups * factorized_parameters(self.out_features, self.in_features, rank, storage)
