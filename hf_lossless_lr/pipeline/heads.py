"""Poolers and task heads, which stay dense: a refit fits them to what they get behind factorized layers."""

from __future__ import annotations

from collections import Counter

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from ..data import DataSplits, run_watching, subset
from ..layers import HEADS, Targets, evaluating, find_layout


def layers_behind(
    model: PreTrainedModel, targets: Targets, parts: DataSplits, accelerator: Accelerator
) -> dict[str, nn.Module]:
    """Return the layers of poolers and task heads that a forward pass calls once, behind all targets, in its order.

    Tied layers and output embeddings are none of them, nor is what is frozen or to be ignored.

    Args:
        model: the dense model, on the accelerator's device.
        targets: the layers to factorize, and why others are not.
        parts: the data.
        accelerator: the processes and the device.

    Returns:
        Name to layer; the same on each process.
    """
    heads = {name: model.get_submodule(name) for name, reason in targets.skipped.items() if reason in HEADS}
    heads = {n: m for n, m in heads.items() if find_layout(m) is not None and m.get_parameter("weight").requires_grad}
    calls: list[str] = []
    if heads:
        with evaluating(model), torch.no_grad():
            for batch in accelerator.prepare(subset(parts.calibration, [0])):  # one process has it
                run_watching(model, {**targets.chosen, **heads}, batch, lambda name, layer, x: calls.append(name))
    calls = gather_object(calls)
    last = max((place for place, name in enumerate(calls) if name in targets.chosen), default=len(calls))
    counts = Counter(calls)
    return {name: heads[name] for name in calls[last:] if name in heads and counts[name] == 1}
