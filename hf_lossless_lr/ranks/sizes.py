"""What a budget counts of each layer: its size at every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import ConfigurationError
from ..factors import LossCurve
from ..formats import FLOAT
from ..layers import CHANNEL, weight_bytes

Curves = Mapping[str, LossCurve]


class Choice(NamedTuple):
    """What one layer becomes.

    Attributes:
        rank: its rank, or None where it stays dense.
        format: the number format that its weight or its factors are stored in.
        form: which matrix of a kernel is factorized.
    """

    rank: int | None = None
    format: str = FLOAT
    form: str = CHANNEL


Choices = dict[str, Choice]


@dataclass(frozen=True)
class LayerSize:
    """What a budget counts of one layer, for every rank: parameters, FLOPs or seconds.

    Attributes:
        by_rank: size of the factorized layer.  # shape: (m + 1,)
        dense: size of the dense layer.
        rounded: the same in each other number format, where the size depends on it.
        others: the sizes of the other forms that the layer may take.
    """

    by_rank: np.ndarray
    dense: float
    rounded: Mapping[str, LayerSize] = field(default_factory=dict)
    others: Mapping[str, LayerSize] = field(default_factory=dict)

    def at(self, rank: int | None) -> float:
        """Return the size at `rank`, or of the dense layer for None."""
        return self.dense if rank is None else float(self.by_rank[rank])

    def in_form(self, form: str) -> LayerSize:
        """Return the size in a form."""
        return self if form == CHANNEL else self.others[form]

    def in_format(self, number_format: str) -> LayerSize:
        """Return the size in a number format."""
        return self if number_format == FLOAT else self.rounded[number_format]

    def of(self, choice: Choice) -> float:
        """Return the size of a choice."""
        return self.in_form(choice.form).in_format(choice.format).at(choice.rank)


MULTIPLES = {"cpu": 8}  # ranks that a device multiplies well
OTHER_MULTIPLE = 64  # of GPUs
STEPS = 32  # that are left at least up to the full rank, in multiples


def default_multiple(device: str, full_rank: int) -> int:
    """Return the multiple that ranks are taken from where none is asked for: a power of two.

    Args:
        device: type of the device.
        full_rank: the smaller side of the weight; in a narrow layer, large steps would cost too much.

    Returns:
        The multiple.
    """
    largest = min(MULTIPLES.get(device, OTHER_MULTIPLE), max(full_rank // STEPS, 1))
    return 1 << (largest.bit_length() - 1)


def parameter_size(curve: LossCurve) -> LayerSize:
    """Return the parameters of a layer's weight at every rank, as a size."""
    counts = [curve.parameters(rank) for rank in range(len(curve.second_order))]
    others = {form: parameter_size(other) for form, other in {**curve.others, **curve.paired}.items()}
    return LayerSize(np.array(counts, dtype=np.float64), float(curve.dense_parameters), others=others)


def parameter_sizes(curves: Curves) -> dict[str, LayerSize]:
    """Return the parameters of every layer: the sizes of a budget in parameters."""
    return {name: parameter_size(curve) for name, curve in curves.items()}


def byte_size(curve: LossCurve, itemsize: int) -> LayerSize:
    """Return the bytes of a layer's weight in a checkpoint, in each number format that it may have.

    Args:
        curve: its loss curve.
        itemsize: bytes of a number of the dense weight.

    Returns:
        The size; a rank that stores no fewer numbers than the dense weight has it, too.
    """

    def in_format(number_format: str) -> LayerSize:
        def stored(rank: int | None) -> float:
            out_features, in_features, storage = curve.out_features, curve.in_features, curve.storage
            stored_as = rank, storage, number_format, itemsize, curve.pivots_inputs, curve.width
            return float(curve.groups * weight_bytes(out_features, in_features, *stored_as) + curve.places_bytes)

        return LayerSize(np.array([stored(rank) for rank in range(len(curve.second_order))]), stored(None))

    plain = in_format(FLOAT)
    rounded = {name: in_format(name) for name in curve.rounding if name != FLOAT}
    others = {form: byte_size(other, itemsize) for form, other in {**curve.others, **curve.paired}.items()}
    return LayerSize(plain.by_rank, plain.dense, rounded, others)


class Budget(NamedTuple):
    """Sizes that a budget counts.

    Attributes:
        sizes: size of each target at every rank.
        fixed: size of everything outside the targets; 0 where only they are counted.
        whole: size of the dense model that ratios are of; None for that of the dense targets and `fixed`.
    """

    sizes: dict[str, LayerSize]
    fixed: float = 0.0
    whole: float | None = None


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
