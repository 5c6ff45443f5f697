"""The grids on which the numbers of a layer lie: known beside its weight, so that saving rounds to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..formats import FLOAT, FORMATS, Grid
from .factorized import is_factorized
from .layout import find_layout
from .narrow import NarrowLinear
from .whole import without_wrappers

ATTRIBUTE = "number_grid"  # no buffer: neither a cast nor a state dict is to see it


def set_grid(module: nn.Module, grid: Grid | None) -> None:
    """Say that the weight of a module lies on grids, or on none.

    Args:
        module: a plain layer or embedding; of a factorized layer, its `down` or `up`.
        grid: the grids of its matrix.
    """
    if grid is not None:
        vars(module)[ATTRIBUTE] = grid
    else:
        vars(module).pop(ATTRIBUTE, None)


def grid_of(module: nn.Module) -> Grid | None:
    """Return the grids on which the weight of a module lies, if any."""
    return vars(module).get(ATTRIBUTE)


def format_of(module: nn.Module) -> str:
    """Return the number format of a module's weight."""
    grid = grid_of(module)
    return FLOAT if grid is None else next(name for name, kind in FORMATS.items() if kind == grid.kind)


def rounded_modules(model: nn.Module) -> Iterator[tuple[str, Any, Grid]]:
    """Yield each module whose weight lies on grids, under each of its names; those of wrappers are no part of them."""
    for name, module in model.named_modules(remove_duplicate=False):
        grid = grid_of(module)
        if grid is not None:
            yield without_wrappers(name), module, grid


def grids_in(model: nn.Module) -> dict[str, Grid]:
    """Return the grids of all modules below, and of the model itself, by the name of the module."""
    return {name: grid for name, _, grid in rounded_modules(model)}


def restore_grids(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """Make the grids below a module those that `grids_in` found."""
    for name, module in model.named_modules():
        set_grid(module, grids.get(without_wrappers(name)))


def as_matrix(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return a module's weight as the one matrix that a number format stores, to be read only: it may be a copy.

    Args:
        module: a layer of a known type, or an embedding.
        weight: its weight, or a tensor of that shape.

    Returns:
        The matrix, those of a layer below one another.  # shape: (rows, columns)
    """
    layout = find_layout(module)
    return weight.flatten(1) if layout is None else layout.matrices(module, weight).flatten(0, 1)


def from_matrix(module: Any, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo `as_matrix` for a weight of the given shape."""
    weight = matrix.new_empty(shape)
    as_matrix(module, weight).copy_(matrix)  # no copy of a weight that is contiguous
    return weight


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors that a checkpoint of a model holds, each of them once."""
    grids, modules = grids_in(model), model.named_modules(remove_duplicate=False)
    module_of = {without_wrappers(name): module for name, module in modules}  # the innermost one of a name
    total, seen = 0, set[int]()
    for key, tensor in model.state_dict(keep_vars=True).items():
        name, _, kind = without_wrappers(key).rpartition(".")
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if kind == "weight" and name in grids:
            guard = 0 if is_factorized(module_of[name.rpartition(".")[0]]) else tensor.dtype.itemsize
            total += grids[name].kind.stored_bytes(*as_matrix(module_of[name], tensor).shape) + guard
        else:
            total += tensor.numel() * tensor.dtype.itemsize
    return total


def stored_bytes(layer: Any) -> int:
    """Return the bytes that a checkpoint holds of the weight of a layer, factorized or dense: no bias and no guard."""
    parts = (layer, layer.inner) if isinstance(layer, NarrowLinear) else (layer,)
    guarded = [part for part in parts if is_factorized(part) or isinstance(part, NarrowLinear) or grid_of(part)]
    bias = 0 if layer.bias is None else layer.bias.numel() * layer.bias.itemsize
    return checkpoint_bytes(layer) - sum(part.weight.itemsize for part in guarded) - bias
