"""How long the dense and the compressed model take for a batch of the data at hand."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..data import batch_examples, run_batch
from ..layers import NarrowLinear, evaluating, in_place, is_factorized
from ..ranks import Run, speed_in_turns
from ..report import Speed
from .calibration import Calibration

logger = logging.get_logger(__name__)

MAX_SECONDS = 3.0  # for all turns; three of them are made in any case


def measured_speed(
    calibration: Calibration,
    layers: Mapping[str, nn.Module],
    fused: Mapping[str, nn.Module],
    config: LosslessLowRankConfig,
) -> Speed | None:
    """Measure both models in turns on the first calibration batch, and say so where the compressed one is slow.

    That is where it is slower than the dense one, or than a latency budget for the whole model asked for.

    Args:
        calibration: the calibration of a model, which is dense and on the accelerator's device.
        layers: the layers that compress it, by name.
        fused: what the dense model has in the place of unfused modules, which take more time.
        config: what was asked for.

    Returns:
        The record, measured on the main process; None where nothing is compressed.
    """
    if not layers:
        return None
    model, accelerator = calibration.dense.model, calibration.accelerator
    measured: list[Any] = [None]
    if accelerator.is_main_process:
        batch = calibration.first_batch()
        main = batch.get(model.main_input_name)
        shape = main.shape if isinstance(main, torch.Tensor) else (batch_examples(batch),)
        run = partial(run_batch, model, batch, quick=False)
        with evaluating(model):
            there = all(p.device == accelerator.device for module in fused.values() for p in module.parameters())
            dense = partial(in_place, model, fused) if fused and there else nullcontext
            runs: list[Run] = [(dense, run), (partial(in_place, model, layers), run)]
            measured = [speed_in_turns(runs, shape, accelerator.device, max_seconds=MAX_SECONDS)]
    broadcast_object_list(measured)
    speed: Speed = measured[0]
    factorized = any(isinstance(layer, NarrowLinear) or is_factorized(layer) for layer in layers.values())
    if factorized:  # rounding alone leaves the work as it was
        _say_if_slow(speed, config)
    return speed


def _say_if_slow(speed: Speed, config: LosslessLowRankConfig) -> None:
    by_time = config.size == "latency"
    advice = (
        "By themselves its layers are faster, in this model they are not: leave it as it is, if time is all you want."
        if by_time
        else "Narrow layers and few rows do not pay: use size='latency', which leaves those dense, or "
        "storage='fastest'."
    )
    if speed.is_slower:
        logger.warning(
            "the compressed model takes %.2f times as long as the dense one for a batch of %s. %s",
            speed.ratio,
            speed.setting,
            advice,
        )
    elif by_time and config.scope == "model" and speed.misses(config.keep_ratio):
        logger.warning(
            "the compressed model takes %.2f of the time of the dense one for a batch of %s, not the %g asked for: "
            "layers gain less in this model than by themselves.",
            speed.ratio,
            speed.setting,
            config.keep_ratio,
        )
