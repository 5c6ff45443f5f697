"""Rounded weights in memory, as floating-point numbers, and in files, as codes; both ways without a loss."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import CheckpointError
from ..formats import Grid, decode, encode, search_grid, stored_grid
from ..layers import (
    Stored,
    as_matrix,
    from_matrix,
    is_factorized,
    read_by_others,
    replace_modules,
    rounded_modules,
    set_grid,
    stored_in,
    without_wrappers,
)

logger = logging.get_logger(__name__)


def encoded_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with rounded weights as the tensors that a checkpoint holds of them, and its names.

    Args:
        model: the model of the state dict.
        state: its state dict; not changed.

    Returns:
        The encoded one; what shares an encoded weight is left out, for loading ties it again.
    """
    encoded: dict[str, Any] = {without_wrappers(name): tensor for name, tensor in state.items()}
    replaced, changed = set[int](), list[str]()
    for name, module, grid in rounded_modules(model):
        weight = encoded.get(f"{name}.weight")
        if weight is None or weight.device.type == "meta" or weight.data_ptr() in replaced:
            continue
        replaced.add(weight.data_ptr())
        tensors, lies_on_grids = _encode(as_matrix(module, weight.detach()), grid)
        changed += [] if lies_on_grids else [name]
        encoded |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        if not is_factorized(model.get_submodule(name.rpartition(".")[0])):
            encoded[f"{name}.weight"] = weight.new_zeros(Stored.guard_shape)
    if changed:
        logger.warning(
            "%d weights are no longer on the grids that they were rounded to (they were trained, for example) and are "
            "rounded anew, to the nearest: %s%s. What is loaded will not be quite what is in memory.",
            len(changed),
            ", ".join(changed[:3]),
            ", …" * (len(changed) > 3),
        )
    return {key: tensor for key, tensor in encoded.items() if not _is_among(tensor, replaced)}


def tied_again(model: PreTrainedModel, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict in which tied weights are one tensor again: what gathers a model copies each by itself.

    Args:
        model: the model.
        state: its state dict, as FSDP puts it together; not changed.
    """
    tied, plain = dict[str, torch.Tensor](), (torch.Tensor, nn.Parameter)
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        pair: Any = state.get(name), state.get(source)
        if all(type(tensor) in plain and not tensor.is_meta for tensor in pair) and torch.equal(*pair):
            tied[name] = state[source]
    return state | tied if tied else state


def _is_among(tensor: Any, addresses: set[int]) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and tensor.data_ptr() in addresses


def _encode(matrix: torch.Tensor, grid: Grid) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the tensors that hold a matrix, and whether they do so exactly.

    If not, the grids of the rows that are not on them are chosen anew; the others stay what they were.
    """
    grid = _for_rows(grid.to(matrix.device), matrix)
    tensors = encode(matrix, grid)
    moved = (decode(tensors, matrix.shape[1], grid.kind).to(matrix.dtype) != matrix).any(1)
    if not moved.any():
        return tensors, True
    anew = search_grid(matrix[moved], torch.ones(matrix.shape[1], device=matrix.device), grid.kind)
    scale, zero = (old.index_put((moved,), new) for old, new in ((grid.scale, anew.scale), (grid.zero, anew.zero)))
    return encode(matrix, Grid(grid.kind, scale, zero)), False


def _for_rows(grid: Grid, matrix: torch.Tensor) -> Grid:
    """Return the grids of a matrix that may have other rows behind its first ones by now, as a resized embedding."""
    old = min(len(grid.scale), len(matrix))
    if old == len(matrix):
        return Grid(grid.kind, grid.scale[:old], grid.zero[:old])
    new = search_grid(matrix[old:], torch.ones(matrix.shape[1], device=matrix.device), grid.kind)
    return Grid(grid.kind, torch.cat([grid.scale, new.scale]), torch.cat([grid.zero, new.zero]))


def load_encoded(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Decode what a checkpoint holds of rounded weights, before `load_state_dict` of a model in memory reads it.

    Args:
        model: the model.
        state: the state dict; changed in place.
        prefix: of its keys.
    """
    for name, module, grid in rounded_modules(model):
        keys = {part: f"{prefix}{name}.{part}" for part in grid.kind.tensors(1, 1)}
        if all(key in state for key in keys.values()):
            tensors, shape = {part: state.pop(key) for part, key in keys.items()}, module.weight.shape
            matrix = decode(tensors, as_matrix(module, module.weight).shape[1], grid.kind)
            state[f"{prefix}{name}.weight"] = from_matrix(module, matrix.to(module.weight.dtype), shape)
            set_grid(module, stored_grid(tensors, grid.kind))


@torch.no_grad()
def dequantize_stored(model: PreTrainedModel, keep: Container[str] = ()) -> None:
    """Put plain modules in the place of those whose weights are codes; ones that are offloaded stay as they are.

    Args:
        model: a loaded model, changed in place.
        keep: number formats whose modules stay, too, unless other modules share their weights, or read them.

    Raises:
        CheckpointError: if weights that modules share are offloaded.
    """
    stored, plain = stored_in(model), dict[str, nn.Module]()
    uses = Counter(id(module._parameters.get("weight")) for module in model.modules())
    readers = read_by_others(model) if keep else {}
    for name, module in stored.items():
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        guard: Any = module.weight if module.guarded else parent.weight
        shared = module.guarded and uses[id(guard)] > 1
        read = module.guarded and id(module) in readers  # factors are the layer's own business
        if guard.is_meta or module.codes.is_meta:
            if shared:
                raise CheckpointError(
                    f"{name!r} is stored in the format {module.number_format!r} and its weight is tied to another "
                    "module's, so it cannot be offloaded. Give a device_map that keeps it in memory (a CPU's will "
                    "do), or compress without `embeddings`."
                )
            continue
        if shared or read or module.number_format not in keep:
            plain[name] = module.to_float(guard.dtype)
        else:
            module.align()
            guard.requires_grad_(False)
    if plain:
        replace_modules(model, plain)
        tie_as_before(model)


def tie_as_before(model: PreTrainedModel) -> None:
    """Tie the weights of a loaded model whose modules were replaced; what its checkpoint had apart stays apart."""
    tie: Any = model.tie_weights
    known = "recompute_mapping" in inspect.signature(tie).parameters  # older versions have no mapping
    tie(**({"recompute_mapping": False} if known else {}))
