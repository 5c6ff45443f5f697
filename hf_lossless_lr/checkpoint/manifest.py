"""The manifest of a model as it is now: layers may have been removed, replaced or moved since it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers import Stored, find_layout, is_factorized
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
    modules, found = dict(model.named_modules(remove_duplicate=False)), dict[str, dict[str, Any]]()
    for name, record in records.items():
        module = modules[name] if name in modules else _behind_wrappers(model, name)
        if module is not None:
            known = not any(isinstance(part, Stored) for part in module.modules())
            new = record_of(module) if known else None
            if new is not None or not known or not _is_plain(module):
                found[name] = record if new is None else new.to_dict()
    listed = {id(part) for name in found if name in modules for part in modules[name].modules()}
    for name, module in model.named_modules():
        new = None if id(module) in listed else record_of(module)
        if new is not None:
            found[name] = new.to_dict()
            listed |= {id(part) for part in module.modules()}
    return found


def _behind_wrappers(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)  # a wrapper may answer for what it is wrapped around
    except AttributeError:
        return None


def _is_plain(module: nn.Module) -> bool:
    return not is_factorized(module) and (type(module) is nn.Embedding or find_layout(module) is not None)
