"""The memory plan: what of a calibration is held in memory, in how many passes over the data it is collected."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import PreTrainedModel

from ..data import DataSplits, first_batch
from ..errors import ConfigurationError, DataError
from ..factors import spatial_kernel, spatial_needs
from ..layers import weight_matrices
from ..report import MemoryPlan, readable_size
from ..statistics import Key, can_recompute, collect_statistics, precision_of
from .activations import Results, refit_memory

MARGIN = 0.1  # of the free memory, for everything else
RUN_AGAIN = 4 / 3  # of the time of a pass, where a second forward joins the first one and the backward
WORKSPACE = 80  # bytes of a solve for each number of both second moments: damped, rounded, products; as measured


@dataclass(frozen=True)
class Needs:
    """Bytes that one layer needs.

    Attributes:
        statistics: of A and B.
        factors: of nested factors.
        work: of its decomposition, for a while.
    """

    statistics: int
    factors: int
    work: int


def needs_of(module: nn.Module) -> Needs:
    """Return what the calibration of a layer needs.

    Args:
        module: the dense layer.

    Returns:
        The bytes.
    """
    groups, out, size = weight_matrices(module).shape
    rank = min(out, size)
    moments = [features**2 * precision_of(features).itemsize for features in (out, size)]
    factors = (out + size) * rank * precision_of(rank).itemsize
    work = WORKSPACE * (out**2 + size**2) + 3 * factors
    kernel = spatial_kernel(module)
    if kernel is not None:
        factors += 8 * spatial_needs((1, out, size), kernel)
        work += WORKSPACE * ((out * kernel[1]) ** 2 + (size // kernel[1]) ** 2)
    return Needs(groups * sum(moments), groups * factors, groups * work)


def memory_limit(max_memory: float | str | None, device: torch.device) -> int:
    """Return the bytes that this process may have on a device: those it has, and what is free, less a margin.

    Args:
        max_memory: bytes, or a text such as `10GiB`; None for that.
        device: the device of the model.

    Returns:
        The bytes.

    Raises:
        ConfigurationError: if the text is no size.
    """
    if max_memory is not None:
        return memory_bytes(max_memory)
    if device.type == "cuda":
        return int((1 - MARGIN) * torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_allocated(device)
    return int((1 - MARGIN) * psutil.virtual_memory().available) + psutil.Process().memory_info().rss


def memory_bytes(max_memory: float | str) -> int:
    """Return a size in bytes.

    Args:
        max_memory: bytes, or a text such as `10GiB`.

    Raises:
        ConfigurationError: if the text is no size.
    """
    try:
        text = isinstance(max_memory, str) and not max_memory.strip().isdecimal()
        limit = convert_file_size_to_int(max_memory) if text else int(max_memory)
    except (ValueError, TypeError, OverflowError):
        limit = 0
    if isinstance(max_memory, bool) or limit <= 0:
        raise ConfigurationError(f"max_memory: {max_memory!r} is no number of bytes, nor a text such as '10GiB'.")
    return int(limit)


def resident(device: torch.device) -> int:
    """Return the bytes that this process has on a device now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def plan_memory(
    model: PreTrainedModel,
    targets: Mapping[str, nn.Module],
    parts: DataSplits,
    accelerator: Accelerator,
    limit: int,
    refits: bool,
    keeps: bool = False,
    one_file: bool = False,
) -> tuple[MemoryPlan, list[Key]]:
    """Decide how the statistics are collected, where they and the factors are kept, and how much a refit may hold.

    Where all of it fits, that is one pass, and memory. Else the activations of the first batch are measured, and
    layers are taken in windows whose second moments fit beside them; statistics and factors go to disk. Where blocks
    that run again in the backward pass leave so much more room that it takes less time, they do. Where the batches
    that wait in a refit do not fit beside what is in memory then, statistics and factors go to disk if more of these
    batches fit so, and the refit takes as many as do.

    Args:
        model: the dense model, on the accelerator's device.
        targets: the layers, by name.
        parts: the data.
        accelerator: the processes and the device.
        limit: bytes that a process may have.
        refits: whether the layers will be refitted.
        keeps: whether statistics and factors are kept on disk in any case.
        one_file: whether the statistics stay in memory if they fit, to be written to one file.

    Returns:
        The plan, and the layers of each pass; the same on each process.

    Raises:
        ConfigurationError: if one layer does not fit.
    """
    needs = {name: needs_of(module) for name, module in targets.items()}
    base, work = resident(accelerator.device), max(each.work for each in needs.values())
    base = _largest(base, accelerator)
    statistics, factors = (sum(getattr(each, kind) for each in needs.values()) for kind in ("statistics", "factors"))
    layers = sum(weight_matrices(module).numel() * weight_matrices(module).itemsize for module in targets.values())
    held, batches = refit_memory(model, targets, parts, accelerator) if refits else (0, 0)
    held = _largest(held, accelerator)
    limit = -int(_largest(-limit, accelerator))  # one plan for all processes
    whole = base + statistics + factors + 2 * layers + work
    disk = statistics * 9 // 16 + factors
    in_memory = None
    if whole <= limit:
        taken = _taken(limit - whole, held, batches)
        expected = whole + held * (batches if taken is None else taken[0])
        in_memory = MemoryPlan(limit, expected, 1, disk if keeps else 0, refit_batches=taken)
        if taken is None or one_file:
            return in_memory, [tuple(targets)]
    kept = {name: each.statistics for name, each in needs.items()}
    free = limit - base - max(kept.values())  # of one product
    activations, seconds = _first_batch(model, targets, parts, accelerator)
    room, recomputes = free - activations, False
    if can_recompute(model) and (max(kept.values()) > room or len(windows_of(kept, room)) > 1):
        less, longer = _first_batch(model, targets, parts, accelerator, recompute=True)
        recomputes = _saves_time(kept, room, free - less)
        room, seconds = (free - less, longer) if recomputes else (room, seconds)
    windows = windows_of(kept, room)
    refitting = base + 2 * layers + work
    taken = _taken(limit - refitting, held, batches)
    refitting += held * (batches if taken is None else taken[0])
    expected = max(limit - max(room, 0) + min(room, statistics), refitting)
    passed = -(-len(parts.calibration) // accelerator.num_processes)
    seconds *= len(windows) * passed
    on_disk = MemoryPlan(limit, expected, len(windows), disk, seconds, taken, recomputes)
    if in_memory is not None and _refits_as_much(in_memory, on_disk):
        return in_memory, [tuple(targets)]
    return on_disk, windows


def _refits_as_much(plan: MemoryPlan, other: MemoryPlan) -> bool:
    """Return whether a plan takes no fewer batches for the refit than another, and keeps to the limit if that does."""
    taken, others = (math.inf if each.refit_batches is None else each.refit_batches[0] for each in (plan, other))
    return taken >= others and (plan.expected <= plan.limit or other.expected > other.limit)


def _saves_time(statistics: Mapping[str, int], room: int, more: int) -> bool:
    """Return whether the room that activations leave if blocks run again makes up for the time that this takes."""
    if max(statistics.values()) > min(room, more):
        return more > room
    passes, fewer = (len(windows_of(statistics, each)) for each in (room, more))
    return fewer * RUN_AGAIN < passes


def _taken(room: int, held: int, batches: int) -> tuple[int, int] | None:
    """Return how many batches a refit takes, one at least, and of how many; None for all of them."""
    fitting = max(room // held, 1) if held else batches
    return (fitting, batches) if fitting < batches else None


def _largest(number: float, accelerator: Accelerator) -> int:
    """Return the largest number that a process has."""
    numbers = accelerator.gather(torch.tensor([number], dtype=torch.float64, device=accelerator.device))
    return int(numbers.max())


def windows_of(statistics: Mapping[str, int], room: int) -> list[Key]:
    """Return windows of layers, in their order, whose statistics fit into a room; blocks stay whole where they can.

    Args:
        statistics: bytes of the statistics of each layer.
        room: bytes that there are for them.

    Returns:
        The names of the layers of each window.

    Raises:
        ConfigurationError: if one layer does not fit.
    """
    blocks: dict[str, list[str]] = {}
    for name in statistics:
        numbered = re.match(r".*?\.\d+(?=\.)", name)
        blocks.setdefault(numbered.group() if numbered else name, []).append(name)
    pieces: list[list[str]] = []
    for block in blocks.values():
        fits = sum(map(statistics.__getitem__, block)) <= room
        pieces += [block] if fits else [[name] for name in block]
    windows: list[list[str]] = []
    left = 0
    for piece in pieces:
        size = sum(map(statistics.__getitem__, piece))
        if size > room:
            raise ConfigurationError(
                f"max_memory: the statistics of {piece[0]!r} take {readable_size(size)}, and beside the model and the "
                f"activations of a batch there are {readable_size(max(room, 0))}. "
                f"Give {readable_size(size - room)} more, or a smaller batch_size."
            )
        if size > left:
            windows.append([])
            left = room
        windows[-1] += piece
        left -= size
    return [tuple(window) for window in windows]


def _first_batch(
    model: PreTrainedModel,
    targets: Mapping[str, nn.Module],
    parts: DataSplits,
    accelerator: Accelerator,
    recompute: bool = False,
) -> tuple[int, float]:
    """Return the bytes that the forward and backward pass of the first batch hold at most, and the seconds of both."""
    name = next(iter(targets))  # where the backward ends
    batch = first_batch(parts.calibration)
    start = time.perf_counter()
    with suppress(DataError), Results(model) as results:  # without a labelled unit in it, there is no backward pass
        collect_statistics(model, {name: targets[name]}, batch, accelerator, any_called=False, recompute=recompute)
    return _largest(results.most, accelerator), time.perf_counter() - start
