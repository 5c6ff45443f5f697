"""What is hung on a model for as long as Transformers loads it, set and unset in this file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers import NarrowLinear, Stored, is_factorized


def mark_loading(model: PreTrainedModel) -> None:
    """Keep what Transformers does to a model while it loads away from what the checkpoint has.

    An output layer that is tied to the guard of a rounded table does not get its bias cut to that size. Compressed
    layers are not initialized: a model may know what to initialize by the name of a class, or by its having a weight;
    nor do modules around them initialize them, that may compute with the size of a weight.
    """
    vars(model)["_adjust_bias"] = _leave_bias
    for module in model.modules():
        if _is_compressed(module):
            for part in module.modules():
                vars(part)["_is_hf_initialized"] = True  # as Transformers flags all modules in the end
        elif isinstance(module, PreTrainedModel):
            vars(module)["_init_weights"] = partial(_init_rest, type(module)._init_weights, module)


def unmark_loading(model: PreTrainedModel) -> None:
    """Undo `mark_loading`; a table has all of its rows again."""
    vars(model).pop("_adjust_bias", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).pop("_init_weights", None)


def initialize_templates(model: PreTrainedModel) -> None:
    """Give the plain modules behind rounded ones the buffers that no checkpoint has, such as the scale of a table.

    Transformers does that for all modules of a model, and these are none of them while it is loaded.
    """
    for owner in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        for stored in (part for part in _own_modules(owner) if isinstance(part, Stored)):
            buffers, device = stored.template._buffers, stored.codes.device
            missing = {name: buffer for name, buffer in buffers.items() if buffer is not None and buffer.is_meta}
            buffers.update({name: torch.empty_like(buffer, device=device) for name, buffer in missing.items()})
            if missing and not stored.codes.is_meta:
                owner._init_weights(stored.template)


def _own_modules(owner: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules below a model, without those of a model within it, which has its own way to initialize."""
    for child in owner.children():
        if not isinstance(child, PreTrainedModel):
            yield child
            yield from _own_modules(child)


def _is_compressed(module: nn.Module) -> bool:
    return is_factorized(module) or isinstance(module, (Stored, NarrowLinear))


def _init_rest(init_weights: Callable[..., None], model: PreTrainedModel, module: nn.Module) -> None:
    """Initialize a module, unless all that it could initialize was in the checkpoint, some of it compressed."""
    children = list(module.children())
    if any(map(_is_compressed, children)):
        near = [part for part in (module, *children) if not _is_compressed(part)]
        tensors = (tensor for part in near for tensor in (*part.parameters(False), *part.buffers(False)))
        if all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            return
    init_weights(model, module)


def _leave_bias(output_embeddings: nn.Module, input_embeddings: nn.Module) -> None:
    """Stand in for what cuts or pads a bias to as many entries as the tied weight has rows."""
