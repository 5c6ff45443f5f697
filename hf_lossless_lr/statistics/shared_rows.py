"""Layers that work once for a whole batch rather than for each example: projections of relative positions, for one.

Their gradients are sums over the examples of a batch, and their rows reach as far as its longest example: statistics
of such a layer depend on the batches, unless examples go through the model one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data import IGNORE_INDEX, batch_examples, run_batch
from ..layers import called_with

Batch = Mapping[str, Any]


@torch.no_grad()
def layers_with_shared_rows(model: PreTrainedModel, targets: Mapping[str, nn.Module], batch: Batch) -> list[str]:
    """Return the layers that have the same inputs for one example, another one, and the two together.

    Args:
        model: the model, in evaluation mode.
        targets: layers to look at, by name.
        batch: a batch; one that cannot be taken apart, or has one example only, shows nothing.

    Returns:
        Their names.
    """
    if not targets or not _comes_apart(batch) or batch_examples(batch) < 2:
        return []
    one, other, both = (_inputs(model, targets, _examples(batch, slice(*part))) for part in ((0, 1), (1, 2), (0, 2)))
    return [name for name in both if _common(one.get(name, []), both[name]) & _common(other.get(name, []), both[name])]


def one_by_one(model: PreTrainedModel, batch: Batch) -> list[dict[str, Any]]:
    """Return the examples of a batch as batches of their own, without the padding behind them.

    Args:
        model: the model.
        batch: a batch that comes apart.

    Returns:
        The examples.
    """
    return [_unpadded(model, _examples(batch, slice(i, i + 1))) for i in range(batch_examples(batch))]


def _comes_apart(batch: Batch) -> bool:
    count = batch_examples(batch)
    return all(value.shape[:1] == (count,) for value in batch.values() if isinstance(value, torch.Tensor))


def _examples(batch: Batch, part: slice) -> dict[str, Any]:
    return {name: value[part] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _unpadded(model: PreTrainedModel, example: dict[str, Any]) -> dict[str, Any]:
    """Cut an example at its last token, and its targets, where they are a sequence of their own, at their last."""
    mask, labels = example.get("attention_mask"), example.get("labels")
    own = {}
    if model.config.is_encoder_decoder and isinstance(labels, torch.Tensor) and labels.ndim == 2:
        names = ("labels", "decoder_input_ids", "decoder_attention_mask")
        own = {name: example[name] for name in names if isinstance(example.get(name), torch.Tensor)}
        target_mask = example.get("decoder_attention_mask", labels != IGNORE_INDEX)
        own = _cut(own, target_mask)
    if isinstance(mask, torch.Tensor) and mask.ndim in (2, 3):
        example = _cut(example, mask)
    return example | own


def _cut(tensors: dict[str, Any], mask: torch.Tensor) -> dict[str, Any]:
    """Cut everything that is shaped as a mask, with or without features, behind the last column that counts."""
    dims = mask.ndim
    columns = mask.flatten(0, -2).bool().any(0).nonzero()
    end = int(columns[-1]) + 1 if len(columns) else mask.shape[-1]

    def shortened(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.shape[:dims] == mask.shape:
            return value.narrow(dims - 1, 0, end)
        return value

    return {name: shortened(value) for name, value in tensors.items()}


def _inputs(model: PreTrainedModel, targets: Mapping[str, nn.Module], batch: Batch) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            seen.setdefault(name, []).append(called_with(args, kwargs))

        return hook

    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in targets.items()]
    try:
        run_batch(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _common(alone: list[torch.Tensor], together: list[torch.Tensor]) -> set[int]:
    """Return which calls for two examples together have the same input as one for an example alone."""
    return {
        index
        for index, x in enumerate(together)
        if any(x.shape == y.shape and torch.allclose(x, y, equal_nan=True) for y in alone)
    }
