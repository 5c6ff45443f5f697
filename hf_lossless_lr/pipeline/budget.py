"""The budget of a compression: what it counts (parameters, FLOPs, latency), and over which part of the model."""

from __future__ import annotations

import math
from typing import Any

from accelerate.utils import broadcast_object_list

from ..data import batch_examples
from ..ranks import Budget, flop_sizes, forward_flops, forward_seconds, latency_sizes, parameter_sizes, unreached_size
from .calibration import Calibration


def budget_of(calibration: Calibration, size: str, scope: str, rank_multiple: int) -> Budget:
    """Return what a budget counts.

    FLOPs and latency are those of the first calibration batch, padding included. Latency is measured on the main
    process, on the device and in the dtype of the model.

    Args:
        calibration: the calibration of a model, which is dense and on the accelerator's device.
        size: `parameters`, `flops` or `latency`.
        scope: `targeted` layers, or the whole `model`.
        rank_multiple: multiple that ranks are restricted to.

    Returns:
        The budget.
    """
    dense, factors, accelerator = calibration.dense, calibration.factors, calibration.accelerator
    targets, curves, whole = factors.targets.chosen, factors.curves, scope == "model"
    if size == "parameters":
        targeted = sum(curve.dense_parameters for curve in curves.values())
        return Budget(parameter_sizes(curves), float(dense.parameters - targeted) if whole else 0.0)
    batch = calibration.first_batch()
    examples = batch_examples(batch)
    flops = forward_flops(dense.model, targets, batch, examples)
    if size == "flops":
        return Budget(flop_sizes(curves, flops.rows), flops.fixed if whole else 0.0)
    measured: list[Any] = [None]
    if accelerator.is_main_process:
        rows = {name: math.ceil(count * examples) for name, count in flops.rows.items()}
        reached = {name: curve for name, curve in curves.items() if rows[name]}
        sizes = latency_sizes(targets, reached, rows, rank_multiple)
        sizes |= {name: unreached_size(curve) for name, curve in curves.items() if not rows[name]}
        total = forward_seconds(dense.model, batch) if whole else 0.0
        measured = [Budget(sizes, max(0.0, total - sum(size.dense for size in sizes.values())) if whole else 0.0)]
    broadcast_object_list(measured)
    return measured[0]
