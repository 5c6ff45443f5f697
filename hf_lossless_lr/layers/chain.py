"""A convolution as several plain ones, one after another: what decompositions of kernels come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .convolution import GEOMETRY, along
from .patches import padded, pads_itself


class Step(NamedTuple):
    """One convolution of a chain.

    Attributes:
        weight: its kernel; with fewer inputs than there are channels, it is one in groups.  # shape: (out, in, ·, ·)
        axes: axes (0 for the height, 1 for the width) along which it has the kernel size, stride, padding and dilation
            of the dense layer; along others it is pointwise.
    """

    weight: torch.Tensor
    axes: tuple[int, ...] = ()


class ConvolutionChain(nn.Sequential):
    """Plain convolutions in the place of a dense one, of the same input and output shapes.

    Along each axis one step has the geometry of the dense layer, its padding too: no step but the last has a bias, so
    zeros stay zeros until then. The chain has the attributes of the dense layer that model code reads: `stride`,
    `in_channels` … and a `weight`, that of the first step, which says dtype and device.

    Args:
        convolution: the dense layer, a `Conv2d` in one group, whose geometry and bias are taken.
        steps: the steps, in order; each axis is in one of them.
    """

    def __init__(self, convolution: Any, steps: Sequence[Step]) -> None:
        super().__init__()
        for name in (*GEOMETRY, "in_channels", "out_channels", "groups"):
            setattr(self, name, getattr(convolution, name))
        self.pads_itself = pads_itself(convolution)
        geometry = {name: getattr(self, name) for name in GEOMETRY}
        dense, channels = convolution.weight, convolution.in_channels
        for weight, axes in steps:
            kw: dict[str, Any] = {**along(geometry, axes), "groups": channels // weight.shape[1]}
            layer = nn.Conv2d(channels, len(weight), bias=False, device=dense.device, dtype=dense.dtype, **kw)
            self.append(layer)
            with torch.no_grad():
                layer.weight.copy_(weight)
            channels = len(weight)
        if convolution.bias is not None:
            layer.bias = nn.Parameter(convolution.bias.detach().clone())

    @property
    def weight(self) -> Any:
        """The kernel of the first step."""
        return self[0].weight

    @property
    def bias(self) -> Any:
        """The bias of the dense layer, if it has one."""
        return self[-1].bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the steps."""
        return super().forward(padded(self, input) if self.pads_itself else input)
