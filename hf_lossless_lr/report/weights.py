"""What became of each weight of a model, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """What became of one targeted layer.

    Attributes:
        layer_type: `Linear`, `Conv1D`, `Conv1d`, `Conv2d`, or a subclass of one.
        out_features: rows of the matrix that is factorized: of the weight, of each group, of its spatial form.
        in_features: columns of the same.
        rank: rank kept, or None where the layer stayed dense.
        storage: storage of the factors, or None.
        dense_parameters: parameters of the dense weight, without bias.
        parameters: parameters of the weight now.
        first_order: predicted first-order loss change, in nats; None where the objective does not use it.
        second_order: predicted second-order loss increase, in nats.
        format: number format of the weight or of the factors.
        rounding: predicted loss increase by the rounding to that format, in nats.
        dense_bytes: bytes of the dense weight as it was given; None in a report of before, as the next one.
        bytes: bytes of the weight in a checkpoint now.
        form: which matrix of a kernel is factorized: `channel` or `spatial`.
        groups: number of these matrices, all of one rank.
    """

    layer_type: str
    out_features: int
    in_features: int
    rank: int | None
    storage: str | None
    dense_parameters: int
    parameters: int
    first_order: float | None
    second_order: float
    format: str = "float"
    rounding: float = 0.0
    dense_bytes: int | None = None
    bytes: int | None = None
    form: str = "channel"
    groups: int = 1


@dataclass(frozen=True)
class SkippedWeight:
    """A weight that was no target.

    Attributes:
        reason: why.
        parameters: its number of elements; 0 where they count under another name. None in a report of before.
        share: the same as a share of all parameters of the dense model.
        format: number format that it is stored in.
    """

    reason: str
    parameters: int | None = None
    share: float | None = None
    format: str = "float"
