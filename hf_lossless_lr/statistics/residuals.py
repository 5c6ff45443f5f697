"""Residual connections, found by running a model: what the output of a layer is added to."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from functools import partial
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

    The model is run once, and what its modules receive and return around each layer is compared, bit for bit.

    Args:
        model: the dense model.
        layers: the layers in question, by name.
        batch: keyword arguments of its forward; one example is enough.

    Returns:
        Where `r` is to be seen, for each layer that is called once and has one.
    """
    search = _Search(layers)
    handles = []
    for name, module in model.named_modules():
        if name:
            note = search.noting(name)
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        with evaluating(model):
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: residual for name, residual in search.found.items() if search.calls[name] == 1}


class _Open(NamedTuple):
    """A layer whose sum is sought.

    Attributes:
        name: its name.
        output: `y`.
        summands: what may be added to it.
    """

    name: str
    output: torch.Tensor
    summands: list[tuple[Residual, torch.Tensor]]


class _Search:
    """What modules handed over last, by shape, and the layers whose sums are sought among what they hand over next."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.found: dict[str, Residual] = {}
        self.calls: Counter[str] = Counter()
        self.seen: dict[Any, deque[tuple[Residual, torch.Tensor]]] = defaultdict(partial(deque, maxlen=LOOK_BACK))
        self.open: list[tuple[_Open, int]] = []

    def noting(self, name: str) -> Any:
        """Return a hook that notes what a module receives or returns."""

        def note(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            tensor = first_tensor(output or (*args, *kwargs.values()))
            if tensor is not None:
                self._take(Residual(name, bool(output)), tensor)

        return note

    def _take(self, place: Residual, tensor: torch.Tensor) -> None:
        still = []
        for layer, left in self.open:
            if tensor.shape == layer.output.shape and tensor.dtype == layer.output.dtype:
                left -= 1
                for summand, r in layer.summands:
                    if torch.equal(layer.output + r, tensor):
                        self.found[layer.name], left = summand, 0
                        break
            if left > 0:
                still.append((layer, left))
        self.open = still
        tensor = tensor.clone()  # it may be changed in place
        kept = self.seen[tensor.shape, tensor.dtype]
        if place.output and place.module in self.layers:
            self.calls[place.module] += 1
            self.open.append((_Open(place.module, tensor, [*reversed(kept)]), LOOK_AHEAD))
        kept.append((place, tensor))
