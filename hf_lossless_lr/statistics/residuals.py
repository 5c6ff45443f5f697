"""Residual connections, found by running a model: what the output of a layer is added to."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data import run_batch
from ..layers import evaluating

LOOK_AHEAD = 12  # tensors of the size of an output among which the sum is sought
LOOK_BACK = 60  # the same, for the other summand
SAMPLE = 4096  # numbers that stand for a tensor


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


def handed_over(args: Any, kwargs: Mapping[str, Any], output: tuple[Any, ...]) -> torch.Tensor | None:
    """Return what a hook sees a module receive or, where it is given an output, return."""
    return first_tensor(output or (*args, *kwargs.values()))


@torch.no_grad()
def find_residuals(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], batch: Mapping[str, Any], rows: int | None = None
) -> dict[str, Residual]:
    """Find the layers `y = W x + b` whose output is added to something, `y + r`, that some module receives or returns.

    The model is run once, and of what its modules receive and return around each layer, some thousand numbers are
    compared bit for bit.

    Args:
        model: the dense model.
        layers: the layers in question, by name.
        batch: keyword arguments of its forward; one example is enough.
        rows: how many rows an output must have; None for any number.

    Returns:
        Where `r` is to be seen, for each layer that has one, if both that place and the layer are called once.
    """
    search, handles = _Search(layers, rows), []
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
    once = {place for place, calls in search.calls.items() if calls == 1}
    return {n: place for n, place in search.found.items() if place in once and Residual(n, True) in once}


class _Open(NamedTuple):
    """A layer whose sum is sought.

    Attributes:
        name: its name.
        output: sample of `y`.
        summands: samples of what may be added to it.
    """

    name: str
    output: torch.Tensor
    summands: list[tuple[Residual, torch.Tensor]]


class _Search:
    """What modules handed over last, by size, and the layers whose sums are sought among what they hand over next."""

    def __init__(self, layers: Mapping[str, nn.Module], rows: int | None) -> None:
        self.layers, self.rows = layers, rows
        self.found: dict[str, Residual] = {}
        self.calls: Counter[Residual] = Counter()
        self.seen: dict[Hashable, deque[tuple[Residual, torch.Tensor]]] = defaultdict(partial(deque, maxlen=LOOK_BACK))
        self.open: dict[Hashable, list[tuple[_Open, int]]] = defaultdict(list)

    def noting(self, name: str) -> Any:
        """Return a hook that notes what a module receives or returns."""

        def note(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            tensor = handed_over(args, kwargs, output)
            if tensor is not None and tensor.numel():
                self._take(Residual(name, bool(output)), tensor)

        return note

    def _take(self, place: Residual, tensor: torch.Tensor) -> None:
        self.calls[place] += 1
        key = tensor.numel(), tensor.dtype, tensor.device
        sample = tensor.flatten()[:: max(1, tensor.numel() // SAMPLE)].clone()  # the tensor may be changed in place
        self._compare(key, sample)
        if place.output and place.module in self.layers and self.rows in (None, tensor.numel() // tensor.shape[-1]):
            summands = [(other, r) for other, r in reversed(self.seen[key]) if r.any()]
            self.open[key].append((_Open(place.module, sample, summands), LOOK_AHEAD))
        self.seen[key].append((place, sample))

    def _compare(self, key: Hashable, sample: torch.Tensor) -> None:
        still = []
        for layer, left in self.open[key]:
            if torch.equal(layer.output, sample):  # on its way, as through a dropout
                still.append((layer, left))
                continue
            place = next((place for place, r in layer.summands if torch.equal(layer.output + r, sample)), None)
            if place is not None:
                self.found[layer.name] = place
            elif left > 1:
                still.append((layer, left - 1))
        self.open[key] = still
