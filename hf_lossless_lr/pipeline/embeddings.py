"""Embeddings, rounded to a number format row by row; what shares their weight (an output layer) follows."""

from __future__ import annotations

from inspect import isfunction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..formats import FLOAT, FORMATS, search_grid
from ..layers import copied, set_grid


@torch.no_grad()
def rounded_embeddings(model: PreTrainedModel, number_format: str) -> dict[str, nn.Module]:
    """Return copies of the embeddings of a model with rounded weights, and of the modules that share them.

    The rows of a table are looked up, not multiplied, so each number is rounded to the nearest one.

    Args:
        model: the dense model.
        number_format: `float` (nothing is rounded) or a key of `FORMATS`.

    Returns:
        Name to copy; copies share a weight where the originals do.
    """
    if number_format == FLOAT:
        return {}
    kind, copies = FORMATS[number_format], dict[str, nn.Module]()
    for sharing in _tables(model):
        weight: Any = next(iter(sharing.values())).weight
        matrix = weight.detach()
        grid = search_grid(matrix, torch.ones(matrix.shape[1], device=matrix.device), kind)
        values = grid.columns(matrix.shape[1]).nearest(matrix).to(matrix.dtype)
        parameter = nn.Parameter(values, weight.requires_grad)
        for name, module in sharing.items():  # other tensors stay shared: a bias may be tied, too
            others = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
            copies[name] = copied(module, others | {id(weight): parameter})
        set_grid(copies[_holder(model, sharing)], grid)
    return copies


def _tables(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the modules that share a weight, for each weight of an embedding that checkpoints have."""
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # such as sines of positions
    tables: dict[int, dict[str, nn.Module]] = {}
    modules = [(name, module, module._parameters.get("weight")) for name, module in model.named_modules()]
    for name, module, weight in modules:
        if weight is not None and weight.is_floating_point() and f"{name}.weight" not in unsaved:
            tables.setdefault(id(weight), {})[name] = module
    return [sharing for sharing in tables.values() if any(map(_looks_up, sharing.values()))]


def _looks_up(module: nn.Module) -> bool:
    """Return whether a module is an embedding, or one that does more in its forward pass and is used by nothing else.

    What takes the place of a rounded module while it is stored has no other methods.
    """
    if not isinstance(module, nn.Embedding):
        return False
    own = type(module).__mro__[: type(module).__mro__.index(nn.Embedding)]
    return {name for kind in own for name, value in vars(kind).items() if isfunction(value)} <= {"__init__", "forward"}


def _holder(model: PreTrainedModel, sharing: dict[str, nn.Module]) -> str:
    """Return the module under whose name a checkpoint holds a weight: what others are tied to."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return next((name for name in sharing if f"{name}.weight" not in tied), next(iter(sharing)))
