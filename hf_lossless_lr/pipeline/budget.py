"""The budget of a compression: what it counts (parameters, FLOPs, latency), and over which part of the model."""

from __future__ import annotations

import math
from typing import Any

from accelerate.utils import broadcast_object_list

from ..checkpoint import LosslessLowRankConfig
from ..data import batch_examples
from ..ranks import Budget, flop_sizes, forward_flops, forward_seconds, latency_sizes, parameter_sizes
from .calibration import Calibration


def budget_of(calibration: Calibration, config: LosslessLowRankConfig) -> Budget:
    """Return the sizes that the configured size counts.

    FLOPs and latency are those of the first calibration batch, padding included. Latency is measured on the main
    process, on the device and in the dtype of the model; once for a calibration, so that its ratios go by one table.

    Args:
        calibration: the calibration of a model, which is dense and on the accelerator's device.
        config: for `size`, `scope` and `rank_multiple`.

    Returns:
        The budget.
    """
    key = config.size, config.scope, config.rank_multiple
    if key not in calibration.budgets:
        calibration.budgets[key] = _count(calibration, config)
    return calibration.budgets[key]


def _count(calibration: Calibration, config: LosslessLowRankConfig) -> Budget:
    model, targets, curves = calibration.model, calibration.targets, calibration.curves
    whole = config.scope == "model"
    if config.size == "parameters":
        dense = sum(curve.dense_parameters for curve in curves.values())
        return Budget(parameter_sizes(curves), float(calibration.dense_parameters - dense) if whole else 0.0)
    batch = {
        name: value.to(calibration.accelerator.device) if hasattr(value, "to") else value
        for name, value in next(iter(calibration.data.calibration)).items()
    }
    examples = batch_examples(batch)
    flops = forward_flops(model, targets, batch, examples)
    if config.size == "flops":
        return Budget(flop_sizes(curves, flops.rows), flops.fixed if whole else 0.0)
    measured: list[Any] = [None]
    if calibration.accelerator.is_main_process:
        rows = {name: max(1, math.ceil(count * examples)) for name, count in flops.rows.items()}
        sizes = latency_sizes(targets, curves, rows, config.rank_multiple)
        total = forward_seconds(model, batch) if whole else 0.0
        measured = [Budget(sizes, max(0.0, total - sum(size.dense for size in sizes.values())) if whole else 0.0)]
    broadcast_object_list(measured)
    return measured[0]
