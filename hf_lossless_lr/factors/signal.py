"""Layers about which the calibration data say nothing: no rank of theirs has a cost that could be trusted."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..statistics import LayerStatistics

NEGLIGIBLE = 1e-12  # of the largest cost of a layer: below it is the rounding of float32 gradients

NO_INPUT = "its inputs are zero on all calibration data"
NO_GRADIENT = "no gradient of the loss reaches it"


def cost_of_removal(weight: torch.Tensor, statistics: LayerStatistics) -> float:
    """Return the predicted cost of removing a layer, `½ tr(B W A Wᵀ)`, in nats.

    Args:
        weight: W.  # shape: (..., out, in)
        statistics: its statistics.

    Returns:
        The cost, summed over the matrices of the layer.
    """
    W = weight.to(statistics.input_covariance.dtype)
    outputs = (W @ statistics.input_covariance @ W.mT).to(statistics.grad_covariance.dtype)
    return 0.5 * float((statistics.grad_covariance * outputs).sum(dtype=torch.float64))


def silent_layers(weights: Mapping[str, torch.Tensor], statistics: Mapping[str, LayerStatistics]) -> dict[str, str]:
    """Find the layers that the data say nothing about: the loss does not depend on them, or they never saw an input.

    Their predicted cost is 0 at every rank, which is no reason to give them rank 1.

    Args:
        weights: name of a layer to its weight.  # shape: (..., out, in)
        statistics: name of a layer to its statistics.

    Returns:
        Name of a layer to the reason.
    """
    costs, reasons = {}, {}
    for name, weight in weights.items():
        layer = statistics[name]  # which may be read from a disk
        costs[name] = cost_of_removal(weight, layer)
        if not layer.input_covariance.any():
            reasons[name] = NO_INPUT
    largest = max(costs.values(), default=0.0)
    for name, cost in costs.items():
        if name not in reasons and cost <= NEGLIGIBLE * largest and weights[name].any():
            reasons[name] = NO_GRADIENT
    return reasons
