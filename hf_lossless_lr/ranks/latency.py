"""Latency as the size of a layer, measured on the device of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ..factors import LossCurve
from ..layers import choose_storage, evaluating, layout_of, random_state_kept
from ..report import Speed
from .sizes import LayerSize

GRID = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # ranks whose latency is measured, as shares of the largest one
REPEATS = 7
RUN_SECONDS = 2e-3  # a run calls a fast layer repeatedly, for about this long
MAX_CALLS = 100

TURNS, FEWEST_TURNS, WARM_UP = 15, 3, 2  # of models that are compared

Run = tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any]]
Timer = Callable[[nn.Module, torch.Tensor, int], float]
LatencyTable = dict[tuple[Any, ...], LayerSize]  # by layer, inputs, dtype, device and threads


def run_seconds(layer: nn.Module, x: torch.Tensor, calls: int) -> float:
    """Return the seconds of one call, as the mean over `calls` successive ones."""
    return _seconds(partial(layer, x), x.device, calls)


def _seconds(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def forward_seconds(model: nn.Module, batch: Mapping[str, Any], repeats: int = REPEATS) -> float:
    """Return the median seconds of a forward pass, after a first one that does not count.

    Less the dense latencies of the targeted layers, it is the fixed part of a latency budget for the whole model.

    Args:
        model: the model.
        batch: keyword arguments of its forward, on its device.
        repeats: how many passes are measured.

    Returns:
        Seconds per batch.
    """
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        runs = [_seconds(partial(model, **batch), device, 1) for _ in range(repeats + 1)]
    return float(np.median(runs[1:]))


def speed_in_turns(
    runs: Sequence[Run], shape: Sequence[int], device: torch.device, turns: int = TURNS, max_seconds: float = math.inf
) -> Speed:
    """Measure runs in turns, so that what slows down the machine slows down all of them.

    Args:
        runs: for each model, what puts it in place (not measured) and what runs it.
        shape: of the input, for the record.
        device: where the models are.
        turns: how often each is measured, after two turns that do not count.
        max_seconds: when to stop earlier; three turns at least are measured.

    Returns:
        The record.
    """
    start, measured = time.perf_counter(), list[list[float]]()
    with torch.no_grad():
        while len(measured) < turns + WARM_UP:
            one = []
            for in_place, run in runs:
                with in_place():
                    one.append(_seconds(run, device, 1))
            measured.append(one)
            if len(measured) >= FEWEST_TURNS + WARM_UP and time.perf_counter() - start > max_seconds:
                break
    times = np.array(measured[WARM_UP:])
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75), axis=0).tolist()
    speed = Speed(
        shape=tuple(shape),
        device=device.type,
        threads=torch.get_num_threads(),
        turns=len(times),
        seconds=tuple(median),
        quartiles=tuple(zip(low, high, strict=True)),
    )
    if len(runs) < 2:
        return speed
    low, middle, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.5, 0.75)).tolist()
    return replace(speed, ratio=middle, ratio_quartiles=(low, high))


def latency_sizes(
    targets: Mapping[str, nn.Module],
    curves: Mapping[str, LossCurve],
    inputs: Mapping[str, Mapping[tuple[int, ...], int]],
    rank_multiple: int = 1,
    repeats: int = REPEATS,
    timer: Timer = run_seconds,
    table: LatencyTable | None = None,
) -> dict[str, LayerSize]:
    """Measure the seconds per batch of each layer, dense and factorized, on its device and in its dtype.

    A handful of ranks is measured, in turns with the dense layer, and the median of the runs taken. In between, the
    latency is interpolated; it never falls with the rank, and is nowhere below what was measured at that rank or a
    lower one. Layers alike in type, geometry, storage, ranks, inputs, dtype and device are measured once.

    Measurements differ from process to process: measure in one of them and broadcast the result. With a
    `rank_multiple` that suits the device (8 or more on a GPU), only its multiples are measured.

    Args:
        targets: the dense layers, on the device to measure.
        curves: a loss curve for each layer.
        inputs: shapes of what each layer receives in a batch, and how often: a convolution of many small pictures
            takes another time than that of a large one with as many rows.
        rank_multiple: multiple that ranks are restricted to.
        repeats: runs of each layer.
        timer: seconds of one call of a layer, given the layer, its input and how many calls to average over.
        table: what was measured before, which is not measured again; what is measured now is added.

    Returns:
        The sizes; infinite at ranks that do not compress, which are not measured.
    """
    table, sizes, threads = {} if table is None else table, {}, torch.get_num_threads()
    for name, curve in curves.items():
        module: Any = targets[name]
        # The representation of a module holds its sizes, its geometry and whether it has a bias.
        where = (module.weight.dtype, str(module.weight.device), threads)
        by_form = {}
        for each in (curve, *curve.others.values()):
            shapes = tuple(sorted(inputs[name].items()))
            key = (repr(module), shapes, *where, each.storage, each.form, each.multiple(rank_multiple))
            if key not in table:
                table[key] = _measure(module, each, inputs[name], rank_multiple, repeats, timer)
            by_form[each.form] = table[key]
        sizes[name] = replace(by_form.pop(curve.form), others=by_form)
    return sizes


def _measured_ranks(curve: LossCurve, multiple: int) -> list[int]:
    """Return the lowest and the highest rank, some between them, and both sides of a change of the storage."""
    multiple = curve.multiple(multiple)
    ranks = range(multiple, curve.break_even_rank + 1, multiple)
    shape = (curve.out_features, curve.in_features)
    storages = [choose_storage(*shape, rank, curve.storage) for rank in ranks]
    chosen = {max(round(share * len(ranks)), 1) - 1 for share in GRID} | {0} if ranks else set()
    for index, (here, there) in enumerate(pairwise(storages)):
        if here != there:
            chosen |= {index, index + 1}
    return [ranks[index] for index in sorted(chosen)]


@torch.no_grad()
def _measure(
    module: Any, curve: LossCurve, inputs: Mapping[tuple[int, ...], int], multiple: int, repeats: int, timer: Timer
) -> LayerSize:
    ranks, layout = _measured_ranks(curve, multiple), layout_of(module)
    storages = [choose_storage(curve.out_features, curve.in_features, rank, curve.storage) for rank in ranks]
    forms = zip(ranks, storages, strict=True)
    layers = [module, *(layout.factorized(module, rank, storage, curve.form) for rank, storage in forms)]
    seconds = [count * _median_seconds(layers, shape, repeats, timer) for shape, count in inputs.items()]
    dense, *by_rank = np.sum(seconds, axis=0).tolist()
    every = np.arange(len(curve.second_order))
    if not ranks:
        return LayerSize(np.full(len(every), np.inf), dense)
    return LayerSize(np.interp(every, ranks, np.maximum.accumulate(by_rank), right=np.inf), dense)


def _median_seconds(layers: Sequence[Any], shape: tuple[int, ...], repeats: int, timer: Timer) -> np.ndarray:
    """Return the median seconds of a call of each layer, the dense one first, with an input of that shape."""
    weight = layers[0].weight
    with random_state_kept(weight.device):
        x = torch.randn(shape, device=weight.device, dtype=weight.dtype)
    for layer in layers:  # warm-up
        timer(layer, x, 1)
    calls = int(np.clip(RUN_SECONDS / timer(layers[0], x, 1), 1, MAX_CALLS))
    return np.median([[timer(layer, x, calls) for layer in layers] for _ in range(repeats)], axis=0)
