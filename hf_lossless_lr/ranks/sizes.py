"""What a budget counts of each layer: its size at every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import ConfigurationError
from ..factors import LossCurve

Curves = Mapping[str, LossCurve]


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


def parameter_size(curve: LossCurve) -> LayerSize:
    """Return the parameters of a layer's weight at every rank, as a size."""
    counts = [curve.parameters(rank) for rank in range(len(curve.second_order))]
    return LayerSize(np.array(counts, dtype=np.float64), float(curve.dense_parameters))


def parameter_sizes(curves: Curves) -> dict[str, LayerSize]:
    """Return the parameters of every layer: the sizes of a budget in parameters."""
    return {name: parameter_size(curve) for name, curve in curves.items()}


class Budget(NamedTuple):
    """Sizes that a budget counts.

    Attributes:
        sizes: size of each target at every rank.
        fixed: size of everything outside the targets; 0 where only they are counted.
    """

    sizes: dict[str, LayerSize]
    fixed: float


Sizes = Mapping[str, LayerSize]


def sizes_of(curves: Curves, sizes: Sizes | None) -> Sizes:
    """Return the given sizes, or else the parameters.

    Args:
        curves: a loss curve for each layer.
        sizes: a size for each layer, or None.

    Returns:
        The sizes.

    Raises:
        ConfigurationError: if a layer has no size.
    """
    if sizes is None:
        return parameter_sizes(curves)
    for name in curves:
        if name not in sizes:
            raise ConfigurationError(f"sizes: there is none for the layer {name!r}; give one for each loss curve.")
    return sizes
