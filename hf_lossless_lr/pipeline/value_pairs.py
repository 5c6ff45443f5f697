"""Pairs of layers between which attention takes means of values: found by turning the values of each head.

Attention is linear in its values, head by head. So if the outputs of a layer are turned within heads, what the output
projection receives is turned in the same way, and nothing else in the model changes: that is tried on an example. No
kind of attention has to be known, and where values are changed on their way, or used elsewhere, there is no pair.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile, zip_longest
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint import LosslessLowRankConfig
from ..data import DataSplits, run_batch, subset
from ..factors import DenseLayer, FewerDimensions, fewer_dimensions
from ..layers import DIMENSIONS, NarrowLinear, Targets, evaluating, random_state_kept, weight_matrices
from ..statistics import CalibrationStatistics

MOST_CANDIDATES = 4  # layers before an output projection that may be the values
CLOSE = 4  # times the precision to the power of 3/4: what sums of many numbers may differ by
ROUNDED = 2  # bytes of numbers that are summed in wider ones, so that their own precision is left
FAINT = 0.01  # of the largest head: what a smaller one loses by rounding is that of others


class ValuePair(NamedTuple):
    """Two layers, the second of which receives means of the outputs of the first.

    Attributes:
        values: name of the first.
        output: name of the second.
        heads: how many heads there are in what the second one receives, and in the values.
    """

    values: str
    output: str
    heads: tuple[int, int]


def form_of(count: int) -> str:
    """Return the name of the form with so many dimensions."""
    return f"{count} dimensions"


def count_of(form: str) -> int:
    """Return how many dimensions such a form has."""
    return int(form.partition(" ")[0])


def narrowed(
    pair: ValuePair, count: int, targets: Targets, statistics: CalibrationStatistics, damping: float
) -> FewerDimensions:
    """Return both layers of a pair with so many dimensions between them.

    Args:
        pair: the pair.
        count: dimensions of all heads with values.
        targets: the layers.
        statistics: their statistics.
        damping: relative damping of the second moments.
    """
    values, output = (
        DenseLayer(weight_matrices(targets.chosen[name]), statistics.layers[name])
        for name in (pair.values, pair.output)
    )
    return fewer_dimensions(values, output, pair.heads, count, damping)


def value_pairs(
    model: PreTrainedModel,
    config: LosslessLowRankConfig,
    targets: Targets,
    statistics: CalibrationStatistics,
    parts: DataSplits,
    accelerator: Accelerator,
) -> dict[str, ValuePair]:
    """Return the pairs of a model.

    Args:
        model: the dense model, on the accelerator's device.
        config: the forms that layers may take.
        targets: the layers.
        statistics: their statistics: those of layers that are called once in a pass count.
        parts: the data.
        accelerator: the processes and the device.

    Returns:
        Name of each layer of a pair to the pair; the same on each process. None if there is no such form.
    """
    if DIMENSIONS not in (config.forms or ()):
        return {}
    order = [name for group in statistics.groups for name in group]
    layers: dict[str, Any] = {
        n: targets.chosen[n] for n in order if n in targets.chosen and NarrowLinear.takes(targets.chosen[n])
    }
    alone = [group[0] for group in statistics.groups if len(group) == 1 and group[0] in layers]
    found: dict[str, ValuePair] = {}
    for batch in accelerator.prepare(subset(parts.calibration, [0])):  # one process has it
        found = _pairs_in(model, layers, alone, batch)
    found = dict(gather_object(list(found.items())))
    return {name: pair for pair in found.values() for name in (pair.values, pair.output)}


@torch.no_grad()
def _pairs_in(
    model: PreTrainedModel, layers: Mapping[str, Any], outputs: Sequence[str], batch: Any
) -> dict[str, ValuePair]:
    """Return the pair of each output projection, of some layers that may be one."""
    received, found = dict[str, torch.Tensor](), dict[str, ValuePair]()
    queues: dict[str, list[ValuePair]] = {}
    with evaluating(model), random_state_kept(next(iter(model.parameters())).device):
        with _hooks(layers, received), _called(model) as called:
            expected = _tensors(run_batch(model, batch, quick=False))
        for output in outputs:
            for pair in _candidates(output, layers, model):
                if _all_called(model.get_submodule(_module_of(pair)), called):
                    queues.setdefault(_module_of(pair), []).append(pair)

        def arrive(pairs: Sequence[ValuePair]) -> tuple[list[ValuePair], bool]:
            """Return the pairs whose turned values arrive as they should, and whether nothing else changes."""
            arrived = dict[str, bool]()
            with _turning(layers, pairs, received, arrived):
                after = _tensors(run_batch(model, batch, quick=False))
            same = 0 < len(after) == len(expected) and all(map(_close, after, expected))
            return [pair for pair in pairs if arrived.get(pair.output)], same

        for trial in zip_longest(*queues.values()):  # of each module one pair at a time
            taken = {name for pair in found.values() for name in (pair.values, pair.output)}
            pairs = [pair for pair in trial if pair is not None and taken.isdisjoint((pair.values, pair.output))]
            right, same = arrive(pairs) if pairs else ([], True)
            while 0 < len(right) < len(pairs):  # those that are none get what they got before, whatever reached them
                pairs = right
                right, same = arrive(pairs)
            if right and not same:  # by values that are read elsewhere
                right = [pair for pair in right if arrive([pair]) == ([pair], True)]
            found |= {pair.output: pair for pair in right}
    return found


def _candidates(output: str, layers: Mapping[str, Any], model: nn.Module) -> Iterator[ValuePair]:
    """Yield what may be the pair of a layer, the largest heads first."""
    names, size = list(layers), layers[output].in_features
    parts = output.split(".")
    for length in range(len(parts) - 1, 0, -1):  # the innermost module with other layers before this one
        if parts[length - 1].isdecimal():  # a block, of which attention is a part
            return
        above = ".".join(parts[:length])
        near = [n for n in names[: names.index(output)] if n.startswith(f"{above}.")]
        near = [n for n in near if layers[n].out_features > 1 and size % layers[n].out_features == 0]
        if near:
            break
    else:
        return
    around = [model.get_submodule(".".join(parts[:n])) for n in range(length, len(parts))]
    for name in reversed(near[-MOST_CANDIDATES:]):
        inner = name.split(".")
        modules = [*around, *(model.get_submodule(".".join(inner[:n])) for n in range(length, len(inner)))]
        values = layers[name].out_features
        numbers = {v for m in modules for v in vars(m).values() if type(v) is int and 0 < v <= values}
        sizes = {s for v in numbers for s in (v, values // v) if values % s == 0 and s > 1}
        for each in sorted(sizes, reverse=True):
            yield ValuePair(name, output, (size // each, values // each))


def _module_of(pair: ValuePair) -> str:
    """Return the name of the innermost module that has both layers."""
    names = pair.values.split("."), pair.output.split(".")
    return ".".join(part for part, _ in takewhile(lambda each: each[0] == each[1], zip(*names, strict=False)))


@contextmanager
def _hooks(layers: Mapping[str, Any], received: dict[str, torch.Tensor]) -> Iterator[None]:
    def keep(name: str) -> Any:
        return lambda module, args: received.update({name: args[0]})

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _called(model: nn.Module) -> Iterator[set[int]]:
    """Give the ids of the modules that are called in a body."""
    called = set[int]()
    handles = [each.register_forward_pre_hook(lambda module, _: called.add(id(module))) for each in model.modules()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _all_called(module: nn.Module, called: Container[int]) -> bool:
    """Return whether each layer in a module was called: another one may be the values of other examples (LED)."""
    return all(id(each) in called for each in module.modules() if any(p.ndim > 1 for p in each.parameters(False)))


@contextmanager
def _turning(
    layers: Mapping[str, Any],
    pairs: Sequence[ValuePair],
    received: Mapping[str, torch.Tensor],
    arrived: dict[str, bool],
) -> Iterator[None]:
    """Turn values on their way, and back where they arrive; note whether they arrived as they should have."""
    handles = []

    def at_values(turns: torch.Tensor) -> Any:
        return lambda module, args, y: _turned(y, turns)

    def at_output(name: str, turns: torch.Tensor) -> Any:
        def hook(module: Any, args: Any) -> Any:
            before = received[name]
            if args[0].shape != before.shape:  # an expert that gets other rows, as something before it changed
                arrived[name] = False
                return None
            expected, heads = _turned(before, turns), len(turns)
            arrived[name] = _close(args[0], expected, heads) and not _close(expected, before, heads)
            return (before, *args[1:])

        return hook

    try:
        for pair in pairs:
            values, (queries, keys) = layers[pair.values], pair.heads
            size = values.out_features // keys
            turns = torch.linalg.qr(torch.randn(keys, size, size, device=values.weight.device))[0]
            handles.append(values.register_forward_hook(at_values(turns)))
            turns = turns.repeat_interleave(queries // keys, dim=0)
            handles.append(layers[pair.output].register_forward_pre_hook(at_output(pair.output, turns)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Return rows with each head turned.  # shapes: (..., heads · size), (heads, size, size)."""
    heads = x.unflatten(-1, turns.shape[:2])
    return (heads.unsqueeze(-2) @ turns.to(x)).squeeze(-2).flatten(-2)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    values = outputs.values() if isinstance(outputs, Mapping) else vars(outputs).values()
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _close(x: torch.Tensor, y: torch.Tensor, heads: int = 1) -> bool:
    """Return whether two tensors are the same but for rounding: by the mean square of the differences in each head.

    By the largest entry, a gate over values that is nearly constant would not show in bfloat16.
    """
    if x.shape != y.shape:
        return False
    if torch.equal(x, y):
        return True
    eps = torch.finfo(x.dtype).eps
    tolerance = eps if x.dtype.itemsize <= ROUNDED else CLOSE * eps**0.75
    x, y = torch.atleast_1d(x, y)
    x, y = (each.double().reshape(-1, heads, each.shape[-1] // heads) for each in (x, y))
    errors, sizes = ((each**2).mean((0, 2)).sqrt() for each in (x - y, y))
    return bool((errors <= tolerance * sizes.clamp_min(FAINT * float(sizes.max()))).all())
