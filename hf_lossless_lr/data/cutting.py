"""Examples of a batch on their own, and without the padding around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .labels import IGNORE_INDEX, batch_examples

Batch = Mapping[str, Any]

OWN = ("labels", "decoder_input_ids", "decoder_attention_mask")  # of a decoder's sequence


def comes_apart(batch: Batch) -> bool:
    """Return whether each tensor of a batch has one part for each example."""
    count = batch_examples(batch)
    return all(value.shape[:1] == (count,) for value in batch.values() if isinstance(value, torch.Tensor))


def part_of(batch: Batch, part: slice) -> dict[str, Any]:
    """Return some examples of a batch that comes apart."""
    return {name: value[part] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def sequence_masks(batch: Batch, decodes: bool) -> dict[str, torch.Tensor]:
    """Return which entries of a batch's sequences count: of its inputs, and of targets with a sequence of their own.

    Args:
        batch: the batch.
        decodes: whether the model is an encoder-decoder, whose targets are a sequence of their own at any length.

    Returns:
        Masks of `inputs` and `targets`, as far as they are known.
    """
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    masks = {}
    if isinstance(mask, torch.Tensor) and mask.ndim in (2, 3):
        masks["inputs"] = mask.bool()
    if isinstance(labels, torch.Tensor) and labels.ndim == 2:
        own = isinstance(mask, torch.Tensor) and labels.shape != mask.shape and not labels.is_floating_point()
        if decodes or own:
            given = batch.get("decoder_attention_mask")
            masks["targets"] = (labels != IGNORE_INDEX if given is None else given).bool()
    return masks


def unpadded(model: PreTrainedModel, example: Batch, front: bool = False) -> dict[str, Any]:
    """Cut an example at its last token, and its targets, where they are a sequence of their own, at their last.

    Args:
        model: the model.
        example: a batch of one.
        front: whether padding in front is cut off as well, which moves the tokens.

    Returns:
        The example.
    """
    masks = sequence_masks(example, model.config.is_encoder_decoder)
    own = set(OWN) if "targets" in masks else set()
    targets = {name: value for name, value in example.items() if name in own}
    inputs = {name: value for name, value in example.items() if name not in own}
    inputs = _cut(inputs, masks["inputs"], front) if "inputs" in masks else inputs
    return inputs | (_cut(targets, masks["targets"], front) if targets else {})


def _cut(tensors: dict[str, Any], mask: torch.Tensor, front: bool) -> dict[str, Any]:
    """Cut everything that is shaped as a mask, with or without features, around the columns that count."""
    dims = mask.ndim
    columns = mask.flatten(0, -2).any(0).nonzero()
    start = int(columns[0]) if len(columns) and front else 0
    end = int(columns[-1]) + 1 if len(columns) else mask.shape[-1]

    def shortened(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.shape[:dims] == mask.shape:
            return value.narrow(dims - 1, start, end - start)
        return value

    return {name: shortened(value) for name, value in tensors.items()}
