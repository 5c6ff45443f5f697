"""Layers whose rows are no tokens: there are as many with padding as without (patches of pictures, boxes, latents)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .cutting import comes_apart, part_of, sequence_masks, unpadded
from .forward import run_watching
from .kinds import REFUSALS
from .padding import PaddingMasks, leaves_out, watching_masks

Calls = list[tuple[torch.Size, bool]]  # the shape of each input, and whether a mask leaves out some of its rows


@torch.no_grad()
def learn_steady_rows(
    masks: PaddingMasks, model: PreTrainedModel, layers: Iterable[nn.Module], batch: Mapping[str, Any]
) -> dict[str, set[int] | None]:
    """Learn, once for each kind of padding, which layers' rows it does not touch, whatever their number.

    The example with the most padding goes through the model as it is, and without. Nothing is learned from a batch
    that does not come apart.

    Args:
        masks: the masks of the model.
        model: the model, in evaluation mode.
        layers: layers to look at.
        batch: a batch.

    Returns:
        What the masks do not know yet, as they take it.
    """
    learned = {}
    for side, mask in sequence_masks(batch, model.config.is_encoder_decoder).items():
        if side in masks.steady or bool(mask.all()) or not comes_apart(batch):
            continue
        most = int(mask.flatten(1).sum(1).argmin())
        example = part_of(batch, slice(most, most + 1))
        without = unpadded(model, example, front=True)
        if any(value.shape != example[name].shape for name, value in without.items() if hasattr(value, "shape")):
            learned[side] = _steady(masks, model, list(layers), example, without)
    return learned


def _steady(
    masks: PaddingMasks,
    model: PreTrainedModel,
    layers: list[nn.Module],
    example: Mapping[str, Any],
    without: Mapping[str, Any],
) -> set[int] | None:
    """Return the ids of the layers with as many rows for an example with and without its padding, none of them hidden.

    None where the model takes the example in one form only.
    """
    trial = copy(masks)
    trial.steady, trial.unmatched = {}, set()
    try:
        padded, short = (_calls(trial, model, layers, batch) for batch in (example, without))
    except REFUSALS:
        return None
    shapes = {place: [shape for shape, _ in calls] for place, calls in padded.items()}
    return {
        place
        for place, calls in short.items()
        if [shape for shape, _ in calls] == shapes.get(place) and not any(hidden for _, hidden in calls)
    }


def _calls(
    masks: PaddingMasks, model: PreTrainedModel, layers: list[nn.Module], batch: Mapping[str, Any]
) -> dict[int, Calls]:
    noted: dict[int, list[tuple[torch.Size, Any]]] = {}

    def note(place: int, layer: nn.Module, x: torch.Tensor) -> None:
        noted.setdefault(place, []).append((x.shape, masks.of(layer, x)))

    masks.start(batch)
    with watching_masks(model, masks.encoder, lambda: masks):
        run_watching(model, {id(layer): layer for layer in layers}, batch, note)
    return {place: [(shape, leaves_out(mask())) for shape, mask in calls] for place, calls in noted.items()}
