"""Weights that Accelerate keeps off their device (`device_map`, `disk_offload`), at hand for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import nn

from ..errors import TargetError
from .model_state import own_forward
from .replacement import finish


@contextmanager
def at_hand(model: nn.Module) -> Iterator[None]:
    """Give a model its offloaded weights for the time of the body; they are offloaded again afterwards.

    What is on disk is mapped into memory, not read: pages come with their first use, and the system takes them back
    where memory is short. What is in memory is used where it lies. Modules that leave the model meanwhile are
    offloaded again, too; those that come in stay in memory.

    Args:
        model: a model; nothing is done where no weight of it is offloaded.

    Raises:
        TargetError: if a weight has no values.
    """
    hooks = _hooks(model)
    tables = [(table, dict(table)) for module in model.modules() for table in (module._parameters, module._buffers)]
    undo: list[Any] = [partial(table.update, were) for table, were in tables]
    undo += [own_forward(module) for module, _ in hooks]
    try:
        _bring(hooks)
        _tie(model, {id(table) for table, were in tables if any(t is not None and t.is_meta for t in were.values())})
        for module, _ in hooks:
            _call_without_hook(module)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise TargetError(
                f"this {type(model).__name__} is on the meta device and has no values. Load its weights first."
            )
        yield
    finally:
        finish(undo if hooks else ())


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy of a module whose weights are at hand; what offloads the original does not know it.

    Args:
        module: the module.
        memo: what is not copied, as for `copy.deepcopy`.
    """
    hook = getattr(module, "_hf_hook", None)  # has all weights of the model, which are not copied
    return without_hook(deepcopy(module, {**(memo or {}), id(hook): hook}))


def without_hook(copy: Any) -> Any:
    """Return a copy of a module, which no longer knows what offloads the original."""
    if hasattr(copy, "_hf_hook"):
        for name in ("_hf_hook", "_old_forward", "forward"):
            vars(copy).pop(name, None)
    return copy


def check_offloaded(model: nn.Module) -> None:
    """Refuse a model whose offloaded weights cannot be worked with.

    Args:
        model: the model; one without such weights passes.

    Raises:
        TargetError: if they work elsewhere than on the CPU, or come a whole block at a time.
    """
    hooks, weights = [hook for _, hook in _hooks(model)], f"weights of this {type(model).__name__} are offloaded"
    devices = {"cpu" if hook.execution_device is None else str(hook.execution_device) for hook in hooks} - {"cpu"}
    if devices:  # that of an accelerator may be a number alone
        raise TargetError(
            f"{weights} by its device_map, for they have no room on {min(devices)}. Load it without a device_map: "
            "with ACCELERATE_USE_CPU=true it is compressed on the CPU, and max_memory and work_dir keep on disk what "
            "is large."
        )
    if any(hook.place_submodules for hook in hooks):
        raise TargetError(f"{weights} a whole block at a time. Offload it without `preload_module_classes`.")


def files_of_offloaded(model: nn.Module) -> set[Path]:
    """Return the checkpoints that a model still reads: who writes them anew takes its weights away."""
    loaders = (_named(hook.weights_map, "")[0] for _, hook in _hooks(model))
    found = (
        entry for loader in loaders if isinstance(loader, OffloadedWeightsLoader) for entry in loader.index.values()
    )
    return {Path(entry["safetensors_file"]).resolve() for entry in found if entry.get("safetensors_file") is not None}


def _hooks(model: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """Return the hooks that bring the weights of a module for its forward pass."""
    found = ((module, getattr(module, "_hf_hook", None)) for module in model.modules())
    every = ((module, each) for module, hook in found for each in getattr(hook, "hooks", [hook]))
    return [(module, hook) for module, hook in every if isinstance(hook, AlignDevicesHook) and hook.offload]


def _call_without_hook(module: nn.Module) -> None:
    """Let a module be called as it was before Accelerate wrapped its `forward`."""
    own: Any = vars(module)
    before = own["_old_forward"]
    if getattr(before, "__func__", None) is type(module).forward:
        own.pop("forward", None)
    else:
        own["forward"] = before


def _bring(hooks: list[tuple[nn.Module, AlignDevicesHook]]) -> None:
    """Put values in the place of tensors on the meta device; what was shared is shared again."""
    brought: dict[int, torch.Tensor] = {}
    absent: list[tuple[Any, str, torch.Tensor]] = []  # by the tensor: of several names of one, one has the value
    for module, hook in hooks:
        for prefix, owner in module.named_modules() if hook.place_submodules else [("", module)]:
            for table in (owner._parameters, owner._buffers):
                for name, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    absent.append((table, name, tensor))
                    path = f"{prefix}.{name}" if prefix else name
                    value = None if id(tensor) in brought else _mapped(hook.weights_map, path)
                    if value is not None:
                        is_weight = isinstance(tensor, nn.Parameter)
                        brought[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_weight else value
    for table, name, tensor in absent:
        if id(tensor) in brought:
            table[name] = brought[id(tensor)]


def _tie(model: nn.Module, offloaded: set[int]) -> None:
    """Let tied weights be one again: off their modules, each is on the meta device by itself."""
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        path, _, weight = name.rpartition(".")
        table: Any = model.get_submodule(path)._parameters
        if id(table) in offloaded:
            table[weight] = model.get_parameter(source)


def _mapped(weights: Any, name: str) -> torch.Tensor | None:
    """Return a weight, if it is there; one in a file of its own is mapped, as one in a safetensors file is anyway."""
    whole, key = _named(weights, name)
    if isinstance(whole, OffloadedWeightsLoader) and key not in whole.state_dict:
        found = whole.index.get(key, {})
        shape = found.get("shape")
        if shape and found.get("safetensors_file") is None:
            path, dtype = Path(whole.save_folder) / f"{key}.dat", getattr(torch, found["dtype"])
            return torch.from_file(str(path), size=torch.Size(shape).numel(), dtype=dtype).view(shape)
    try:
        return weights[name]
    except KeyError:
        return None


def _named(weights: Any, name: str) -> tuple[Any, str]:
    """Return where all weights of a model are, and by which name one of a module is there."""
    return (weights.dataset, weights.prefix + name) if isinstance(weights, PrefixedDataset) else (weights, name)
