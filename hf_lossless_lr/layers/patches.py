"""What a convolution sees: its input, padded as it pads it, at the places of its kernel, for some of its outputs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

POSITIONS = 64  # of a feature map that stand for all: as good as all (docs/method.md), and no cost grows with pictures
PADS_ITSELF = ("Conv2dSame", "Conv2dSameExport")  # types of timm: pad for `ceil(input / stride)` outputs

Sides = tuple[tuple[int, int], ...]  # before and behind, for each axis


def pads_itself(module: Any) -> bool:
    """Return whether a convolution, dense or factorized, pads its input by itself, as TensorFlow does."""
    return bool(getattr(module, "pads_itself", type(module).__name__ in PADS_ITSELF))


def padding_of(module: Any, sizes: tuple[int, ...]) -> Sides:
    """Return the padding of a convolution.

    Args:
        module: the convolution.
        sizes: of its input along the axes of the kernel.

    Returns:
        The numbers before and behind, for each axis.
    """
    spread = [dilation * (k - 1) for dilation, k in zip(module.dilation, module.kernel_size, strict=True)]
    if pads_itself(module):
        steps = zip(sizes, module.stride, spread, strict=True)
        totals = [max((-(-size // step) - 1) * step + reach + 1 - size, 0) for size, step, reach in steps]
    elif module.padding == "same":
        totals = spread
    elif module.padding == "valid":
        totals = [0] * len(sizes)
    else:
        return tuple((each, each) for each in module.padding)
    return tuple((total // 2, total - total // 2) for total in totals)


def padded(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return an input of a convolution with its padding.  # shape: (examples, channels, *sizes)."""
    sides = padding_of(module, tuple(x.shape[2:]))
    flat = [number for before, behind in reversed(sides) for number in (before, behind)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, flat, mode=mode) if any(flat) else x


def output_sizes(module: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the outputs along the axes of the kernel, for an input of the given sizes."""
    geometry = zip(sizes, padding_of(module, sizes), module.kernel_size, module.dilation, module.stride, strict=True)
    return tuple((size + sum(pad) - spread * (k - 1) - 1) // step + 1 for size, pad, k, spread, step in geometry)


@lru_cache(maxsize=256)
def sampled(outputs: int) -> torch.Tensor | None:
    """Return which of a number of output positions stand for all, the same ones for every example; None for all."""
    if outputs <= POSITIONS:
        return None
    return torch.randperm(outputs, generator=torch.Generator().manual_seed(outputs))[:POSITIONS].sort().values


def patches(module: Any, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Return what the kernel of a convolution lies over, at some of its outputs.

    Args:
        module: the convolution.
        x: its input.  # shape: (examples, channels, *sizes)
        positions: places among the flattened outputs; None for all.

    Returns:
        The patches.  # shape: (examples, positions, groups, channels / groups * kernel)
    """
    outputs = output_sizes(module, tuple(x.shape[2:]))
    places = torch.arange(torch.Size(outputs).numel()) if positions is None else positions
    axes = torch.unravel_index(places, outputs)
    index: list[Any] = [slice(None), slice(None)]
    for axis, place in enumerate(axes):
        reach = torch.arange(module.kernel_size[axis]) * module.dilation[axis]
        own = place[:, None] * module.stride[axis] + reach  # of each output, along its own axis of the kernel
        shape = [len(places), *(len(reach) if other == axis else 1 for other in range(len(axes)))]
        index.append(own.reshape(shape).to(x.device))
    seen = padded(module, x)[tuple(index)].unflatten(1, (module.groups, -1))
    return seen.movedim(3, 1).flatten(3)
