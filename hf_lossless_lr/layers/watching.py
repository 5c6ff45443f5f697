"""Weights that a model reads while it runs, however it comes by the layer: in a loop, by an index or a made-up name.

What `readers` finds in the source are reads on every way that is taken in the settings of a model; of these, it knows
only `self.….weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .readers import GUARDED

ANSWERED = {getattr(torch.Tensor, name).__get__ for name in (*GUARDED, "is_cuda", "is_meta", "layout")}
ANSWERED |= {torch.Tensor.is_floating_point, torch.Tensor.is_complex}
"""What a guard answers as a weight would."""


class _Watched(torch.Tensor):
    """A weight that notes when it is asked for more than a guard could answer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ANSWERED:
            given = [*args, *(kwargs or {}).values()]
            given += [each for part in given if isinstance(part, (list, tuple)) for each in part]
            for each in given:
                if isinstance(each, cls) and "note" in vars(each):
                    vars(each)["note"]()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@contextmanager
def weights_read(layers: Mapping[str, Any]) -> Iterator[set[str]]:
    """Note whose weight is read, for its numbers or its shape, outside of a call of the layer itself.

    Args:
        layers: layers by name; as they were afterwards.

    Yields:
        The names of those whose weight was read so far.
    """
    read, handles = set[str](), []

    def watched(name: str, weight: torch.Tensor) -> torch.Tensor:
        found = weight.detach().requires_grad_(weight.requires_grad).as_subclass(_Watched)
        vars(found).update(note=lambda: read.add(name), _is_param=True)
        return found

    def own_call(module: nn.Module, _: Any) -> None:
        vars(module).pop("weight", None)

    try:
        for name, layer in layers.items():
            if layer.weight.is_meta:  # it is offloaded
                continue
            vars(layer)["weight"] = watched(name, layer.weight)  # found before the parameter, which stays as it is
            back = partial(_put_back, vars(layer)["weight"])
            handles.append(layer.register_forward_pre_hook(own_call))
            handles.append(layer.register_forward_hook(back, always_call=True))
        yield read
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            own_call(layer, None)


def _put_back(weight: torch.Tensor, module: nn.Module, *_: Any) -> None:
    vars(module)["weight"] = weight
