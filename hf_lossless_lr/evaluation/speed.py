"""How long models take from end to end, dense against compressed, measured in turns in one run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from ..errors import ConfigurationError, DataError
from ..layers import evaluating
from ..ranks import TURNS, forward_flops, speed_in_turns
from ..report import Speed

LAYER_TURNS = 5
MOST_THREADS = 1024  # many more end the process

Batch = Mapping[str, torch.Tensor]


def measure_speed(
    models: Sequence[PreTrainedModel],
    batch: Batch,
    turns: int = TURNS,
    threads: int | None = None,
    memory: bool = False,
    layers: bool = False,
) -> Speed:
    """Measure how long one or two models take for a batch, in turns.

    Times differ from machine to machine and from minute to minute: what holds is the ratio of one run.

    Args:
        models: the dense model, and the compressed one; on one device. Left as they were.
        batch: keyword arguments of their forward, on that device.
        turns: how often each is measured, after two turns that do not count.
        threads: threads of the processor; default as they are.
        memory: whether to measure the peak memory of a pass, too.
        layers: whether to measure the layers one by one, too, which takes longer.

    Returns:
        The record; FLOPs are those of matrix products, convolutions and attention.

    Raises:
        ConfigurationError: if there are no or far too many threads.
        DataError: if the batch is empty.
    """
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    if not tensors or not tensors[0].numel():
        raise DataError("the batch to measure with is empty.")
    main = batch.get(models[0].main_input_name, tensors[0])
    device = next(models[0].parameters()).device
    with _threads(threads), evaluating(models[0]), evaluating(models[-1]), torch.no_grad():
        speed = speed_in_turns([(nullcontext, partial(model, **batch)) for model in models], main.shape, device, turns)
        flops = tuple(round(forward_flops(model, {}, batch, examples=1).fixed) for model in models)
        speed = replace(speed, flops=flops)
        if memory:
            speed = replace(speed, peak_bytes=tuple(_peak_bytes(model, batch, device) for model in models))
        if layers:
            speed = replace(speed, layers=tuple(_layer_seconds(model, batch, device) for model in models))
    return speed


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is not None and not 1 <= count <= MOST_THREADS:
        raise ConfigurationError(f"threads: must be from 1 to {MOST_THREADS:,}, got {count:,}.")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if count is None else count)
        yield
    finally:
        torch.set_num_threads(before)


def _peak_bytes(model: PreTrainedModel, batch: Batch, device: torch.device) -> int:
    """Return the most that a pass has allocated at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(**batch)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(**batch)
    results: Any = recorded.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _layer_seconds(model: PreTrainedModel, batch: Batch, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each layer that has a weight, in the order of the model."""
    times: dict[str, list[float]] = {}
    begun: dict[str, float] = {}

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def begin(name: str) -> Any:
        return lambda *_: begun.__setitem__(name, now())

    def end(name: str) -> Any:
        return lambda *_: times.setdefault(name, []).append(now() - begun[name])

    hooks = []
    for name, module in _layers(model):
        hooks += [module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end(name))]
    try:
        for _ in range(LAYER_TURNS + 1):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: median(found) * max(1, len(found) // (LAYER_TURNS + 1)) for name, found in times.items()}


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules with a weight of their own: a factorized layer rather than its factors."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and isinstance(getattr(module, "weight", None), torch.Tensor) and not name.startswith(inside or "\0"):
            inside = (*inside, f"{name}.")
            yield name, module
