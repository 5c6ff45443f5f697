"""Calibration statistics as plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Key = tuple[str, ...]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer, for each of its matrices, on its device; G in float64, others as `precision_of` says.

    Attributes:
        weight_grad: G, where it was asked for.  # shape: (groups, out, in)
        input_covariance: A; the same tensor for layers that share their input.  # shape: (groups, in, in)
        grad_covariance: B.  # shape: (groups, out, out)
        tokens: rows behind A.
        units: labelled units behind G and B.
    """

    weight_grad: torch.Tensor | None
    input_covariance: torch.Tensor
    grad_covariance: torch.Tensor
    tokens: int
    units: int


@dataclass(frozen=True)
class CalibrationStatistics:
    """Statistics of all targets, and of the data behind them.

    Attributes:
        layers: target name to its statistics.
        loss: mean loss of the dense model over labelled units, in nats.
        examples: number of examples.
        units: number of labelled units.
        data_fingerprint: SHA-256 over the batches, independent of their order.
        groups: targets that receive the same input, in the order of the forward pass; only those called once a pass.
        uncalled: targets that no forward pass called; they have no statistics.
    """

    layers: Mapping[str, LayerStatistics]
    loss: float
    examples: int
    units: int
    data_fingerprint: str
    groups: tuple[Key, ...] = ()
    uncalled: tuple[str, ...] = ()
