"""The budget of a compression: what it counts (parameters, bytes, FLOPs, latency), and of which part of the model."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list

from ..checkpoint import LosslessLowRankConfig
from ..data import batch_examples
from ..layers import checkpoint_bytes, in_place, weight_matrices
from ..ranks import (
    Budget,
    LatencyTable,
    byte_size,
    flop_sizes,
    forward_flops,
    forward_seconds,
    latency_sizes,
    parameter_sizes,
    unreached_size,
)
from .calibration import Calibration
from .embeddings import rounded_embeddings


def budget_of(
    calibration: Calibration, config: LosslessLowRankConfig, latencies: LatencyTable | None = None
) -> Budget:
    """Return what a budget counts.

    FLOPs and latency are those of the first calibration batch, padding included. Latency is measured on the main
    process, on the device and in the dtype of the model.

    Args:
        calibration: the calibration of a model, which is dense and on the accelerator's device.
        config: size, scope, rank multiple; number format of the embeddings, which the whole model's bytes count.
        latencies: what was measured of layers before.

    Returns:
        The budget.
    """
    dense, factors, accelerator = calibration.dense, calibration.factors, calibration.accelerator
    targets, curves, whole = factors.targets.chosen, factors.curves, config.scope == "model"
    if config.size == "parameters":
        targeted = sum(curve.dense_parameters for curve in curves.values())
        return Budget(parameter_sizes(curves), float(dense.parameters - targeted) if whole else 0.0)
    if config.size == "bytes":
        return _bytes(calibration, whole, config.embeddings)
    batch = calibration.first_batch()
    examples = batch_examples(batch)
    flops = forward_flops(dense.model, targets, batch, examples)
    if config.size == "flops":
        return Budget(flop_sizes(curves, flops.rows, flops.widening), flops.fixed if whole else 0.0)
    measured: list[Any] = [None]
    if accelerator.is_main_process:
        reached = {name: curve for name, curve in curves.items() if flops.rows[name]}
        sizes = latency_sizes(targets, reached, flops.inputs, config.rank_multiple or 1, table=latencies)
        sizes |= {name: unreached_size(curve) for name, curve in curves.items() if name not in reached}
        total = forward_seconds(dense.model, batch) if whole else 0.0
        measured = [Budget(sizes, max(0.0, total - sum(size.dense for size in sizes.values())) if whole else 0.0)]
    broadcast_object_list(measured)
    return measured[0]


def _bytes(calibration: Calibration, whole: bool, embeddings: str) -> Budget:
    curves, model = calibration.factors.curves, calibration.dense.model
    itemsizes = {name: weight_matrices(module).itemsize for name, module in calibration.factors.targets.chosen.items()}
    sizes = {name: byte_size(curve, itemsizes[name]) for name, curve in curves.items()}
    if not whole:
        return Budget(sizes)
    total, targeted = checkpoint_bytes(model), sum(size.dense for size in sizes.values())
    with in_place(model, rounded_embeddings(model, embeddings)):
        outside = checkpoint_bytes(model) - targeted
    return Budget(sizes, outside, total)
