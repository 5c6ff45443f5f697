"""Residual connections, found by running a model: what the output of a layer is added to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data import run_batch
from ..layers import evaluating

LOOK_AHEAD, LOOK_BACK = (
    12,
    60,
)  # tensors of the shape of the output among which the sum and the other summand are sought


class Residual(NamedTuple):
    """Where the other summand is to be seen before the layer runs.

    Attributes:
        module: name of a module.
        output: whether it is the output of that module rather than its input.
    """

    module: str
    output: bool


class _Seen(NamedTuple):
    name: str
    output: bool
    tensor: torch.Tensor


def first_tensor(values: Any) -> torch.Tensor | None:
    """Return the first floating-point tensor that a module receives or returns, alone or in a tuple."""
    if isinstance(values, torch.Tensor):
        return values if values.is_floating_point() else None
    found = map(first_tensor, values) if isinstance(values, (tuple, list)) else ()
    return next((tensor for tensor in found if tensor is not None), None)


@torch.no_grad()
def find_residuals(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> dict[str, Residual]:
    """Find the layers `y = W x + b` whose output is added to something, `y + r`, that some module receives or returns.

    The model is run once, and all that its modules receive and return is compared, bit for bit.

    Args:
        model: the dense model.
        layers: the layers in question, by name.
        batch: keyword arguments of its forward; one example is enough.

    Returns:
        Where `r` is to be seen, for each layer that is called once and has one.
    """
    seen = _all_seen(model, batch)
    calls: dict[str, list[int]] = {}
    for place, one in enumerate(seen):
        if one.output and one.name in layers:
            calls.setdefault(one.name, []).append(place)
    found = {name: _residual(seen, places[0]) for name, places in calls.items() if len(places) == 1}
    return {name: residual for name, residual in found.items() if residual is not None}


def _residual(seen: list[_Seen], place: int) -> Residual | None:
    y = seen[place].tensor
    sums = [one.tensor for one in _alike(seen[place + 1 :], y, LOOK_AHEAD)]
    for one in _alike(reversed(seen[:place]), y, LOOK_BACK):
        if any(torch.equal(y + one.tensor, total) for total in sums):
            return Residual(one.name, one.output)
    return None


def _alike(seen: Any, y: torch.Tensor, most: int) -> Iterator[_Seen]:
    """Yield those that could be added to `y`: of its shape and its dtype."""
    for one in seen:
        if most > 0 and one.tensor.shape == y.shape and one.tensor.dtype == y.dtype:
            most -= 1
            yield one


def _all_seen(model: PreTrainedModel, batch: Mapping[str, Any]) -> list[_Seen]:
    """Return what the modules receive and return, in its order, as it is at that moment."""
    seen: list[_Seen] = []

    def note_of(name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            tensor = first_tensor(output or (*args, *kwargs.values()))
            if tensor is not None:
                seen.append(_Seen(name, bool(output), tensor.clone()))  # it may be changed in place

        return note

    handles = []
    for name, module in model.named_modules():
        if name:
            note = note_of(name)
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        with evaluating(model):
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen
