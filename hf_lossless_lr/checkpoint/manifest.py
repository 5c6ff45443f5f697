"""The manifest of a model as it is now: layers may have been removed, replaced or moved since it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers import NarrowLinear, Stored, Unfused, find_layout, is_factorized, without_wrappers
from .config import record_of


def current_records(model: nn.Module, records: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the records of the compressed modules that a model has.

    Args:
        model: a model that is or was compressed.
        records: its records so far. Those of modules that something is wrapped around, or that are as a checkpoint
            has them, stay.

    Returns:
        Name of each compressed module to its record, under the name that it had so far if it has that still.
    """
    found, listed = dict[str, dict[str, Any]](), set[int]()
    for name, record in records.items():
        module = module_at(model, name)
        if module is None:
            continue
        as_stored = any(isinstance(part, Stored) for part in module.modules())
        new = None if as_stored else record_of(module)
        if new is not None or as_stored or not _is_plain(module):
            found[name] = record if new is None else new.to_dict()
            listed |= {id(part) for part in module.modules()}
    for name, module in model.named_modules():
        new = None if id(module) in listed else record_of(module)
        if new is not None:
            found[without_wrappers(name)] = new.to_dict()
            listed |= {id(part) for part in module.modules()}
    return found


def current_unfused(model: nn.Module) -> list[str]:
    """Return the names of the modules whose fused weights are a layer each, as a checkpoint has them."""
    return list(_of_kind(model, Unfused))


def narrow_records(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the records of the layers with fewer outputs or inputs inside, by their names in a checkpoint."""
    found = _of_kind(model, NarrowLinear)
    return {name: {"side": layer.side, "features": layer.features} for name, layer in found.items()}


def _of_kind(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {without_wrappers(name): module for name, module in model.named_modules() if isinstance(module, kind)}


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a name, for which a wrapper around it may answer; None where there is none any more."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_plain(module: nn.Module) -> bool:
    return not is_factorized(module) and (isinstance(module, nn.Embedding) or find_layout(module) is not None)
