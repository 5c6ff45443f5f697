"""Factorized convolutions, and how `nn.Conv1d` and `nn.Conv2d` are seen as matrices: one for each group of channels.

A subclass counts as its base where it answers as its layout says (`targets` tries it): timm's `Conv2dSame`, which pads
its input by itself, for one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ConfigurationError
from .factorized import Factorized, is_plain, parameter_of
from .layout import fill_dense, register
from .model_state import random_state_kept
from .patches import output_sizes, padded, padding_of, pads_itself, patches, sampled
from .storage import CHANNEL, SPATIAL

GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
UNPADDED = {"padding": 0, "padding_mode": "zeros"}


class FactorizedConv(Factorized):
    """A convolution as two narrower ones, of the same rank in each group of channels.

    * form `channel`: a convolution with the dense geometry to `rank` channels, then a pointwise one. The kernel
      `(out, in, *kernel)` is the matrix `(out, in * prod(kernel))`, which may be stored with pivots.
    * form `spatial`, of two-dimensional ones: `(kh, 1)` to `rank` channels, then `(1, kw)`. The kernel is the matrix
      `(out * kw, in * kh)`, stored as two factors.

    It has the attributes of the dense convolution that model code reads: `stride`, `kernel_size`, `in_channels` …

    Args:
        convolution: the dense layer, whose geometry (channels, kernel, stride, padding, dilation, groups) is taken.
        rank: rank of the kernel matrix of each group.
        storage: `pivoted` or `two-factor`.
        form: `channel` or `spatial`.

    Raises:
        ConfigurationError: if the rank, the storage or the form is not possible.
    """

    layer: ClassVar[Any]
    kernel_size: tuple[int, ...]

    def __init__(self, convolution: Any, rank: int, storage: str = "pivoted", form: str = CHANNEL) -> None:
        weight, groups, kernel = convolution.weight, convolution.groups, convolution.kernel_size
        out, inputs = weight.shape[0] // groups, weight.shape[1]
        sizes = (out, inputs * math.prod(kernel))
        if form == SPATIAL:
            if not has_spatial_form(convolution) or storage != "two-factor":
                raise ConfigurationError(
                    f"form: a convolution with the kernel {tuple(kernel)} in {storage} storage has no spatial form; "
                    "it takes a two-dimensional kernel, larger than 1 on both sides, and two-factor storage."
                )
            sizes = (out * kernel[1], inputs * kernel[0])
        super().__init__(*sizes, rank, storage)
        self.form, self.groups = form, groups
        self.dense_type: type[nn.Module] = _plain_type(convolution)
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.out_features, self.in_features = out, inputs * math.prod(kernel)
        for name in GEOMETRY:
            setattr(self, name, getattr(convolution, name))
        self.pads_itself = pads_itself(convolution)
        geometry = {name: getattr(self, name) for name in GEOMETRY} | (UNPADDED if self.pads_itself else {})
        down, up, wide = geometry, {"kernel_size": 1}, groups * rank
        if form == SPATIAL:
            down, up = along(geometry, [0]), along(geometry, [1])
        stored = groups * (out - (rank if storage == "pivoted" else 0))
        kw: dict[str, Any] = {"groups": groups, "bias": False, "device": weight.device, "dtype": weight.dtype}
        self.down = self.layer(self.in_channels, wide, **down, **kw)
        self.up = self.layer(wide, stored, **up, **kw)
        self._finish(convolution.bias is not None, weight.device, weight.dtype)

    def forward(self, input: torch.Tensor | None = None, *, x: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the factorized map; same input and output shapes as the dense layer."""
        seen: Any = x if input is None else input
        return super().forward(padded(self, seen) if self.pads_itself else seen)

    def _with_bias(self, up: Any, z: torch.Tensor) -> torch.Tensor:
        if is_plain(up, self.layer):
            return up._conv_forward(z, parameter_of(up, "weight"), parameter_of(self, "bias"))
        return self._plus_bias(up(z))

    def _plus_bias(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *(1 for _ in self.kernel_size))

    def _order_stored(self, permutation: torch.Tensor) -> torch.Tensor:
        """Return an order of the outputs of each group as one of all pivots, and behind them all other outputs."""
        order = permutation.reshape(self.groups, self.out_features)
        group = torch.arange(self.groups, device=order.device)[:, None]
        others = self.groups * self.rank + group * (self.out_features - self.rank) + order - self.rank
        return torch.where(order < self.rank, group * self.rank + order, others).flatten()

    def dense_weight(self) -> torch.Tensor:
        """Return the kernel matrix of each group, in float32 or wider.  # shape: (groups * out, in * kernel)."""
        dtype = torch.promote_types(self.down.weight.dtype, torch.float32)
        down, up = (
            factor.weight.to(dtype).reshape(self.groups, -1, factor.weight[0].numel())
            for factor in (self.down, self.up)
        )
        if self.form == SPATIAL:
            down = down.unflatten(-1, (-1, self.kernel_size[0]))
            up = up.unflatten(-1, (self.rank, -1))
            return torch.einsum("gorw,grih->goihw", up, down).flatten(2).flatten(0, 1)
        if self.permutation is None:
            return (up @ down).flatten(0, 1)
        rows = torch.cat([down.flatten(0, 1), (up @ down).flatten(0, 1)])
        return rows.index_select(0, self.permutation)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Conv2d` does."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, rank={self.rank}, bias={self.bias is not None}, storage={self.storage}, "
            f"form={self.form}"
        )


class FactorizedConv1d(FactorizedConv):
    """A one-dimensional convolution as a narrower one followed by a pointwise one. See `FactorizedConv`."""

    feature_dim, layer_type, layer = -2, "Conv1d", nn.Conv1d


class FactorizedConv2d(FactorizedConv):
    """A two-dimensional convolution as two narrower ones. See `FactorizedConv`."""

    feature_dim, layer_type, layer = -3, "Conv2d", nn.Conv2d


def has_spatial_form(module: Any) -> bool:
    """Return whether a convolution may become `(kh, 1)` and then `(1, kw)`, other than in the channel form."""
    return len(module.kernel_size) == 2 and min(module.kernel_size) > 1


def _plain_type(convolution: Any) -> type[nn.Module]:
    """Return the type of the dense layer that a factorized one turns into."""
    if pads_itself(convolution):
        return type(convolution)
    return nn.Conv1d if isinstance(convolution, nn.Conv1d) else nn.Conv2d


def along(geometry: dict[str, Any], axes: Collection[int]) -> dict[str, Any]:
    """Return a geometry that does nothing along other axes."""
    neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    return {
        name: value
        if isinstance(value, (str, int))
        else tuple(each if place in axes else neutral[name] for place, each in enumerate(value))
        for name, value in geometry.items()
    }


class _ConvLayout:
    by_default = True
    pivots_narrow_side = False

    def __init__(self, factorized: type[FactorizedConv]) -> None:
        self.type = factorized
        self.axes = -1 - factorized.feature_dim

    def refusal(self, module: Any) -> str | None:
        if module.weight.shape[1] == 1 and module.groups > 1:
            return "depthwise: each channel has a kernel of its own, and nothing to factorize"
        return None

    def forms(self, module: Any) -> tuple[str, ...]:
        return (CHANNEL, SPATIAL) if has_spatial_form(module) else (CHANNEL,)

    def kernel_size(self, module: Any) -> tuple[int, ...]:
        return tuple(module.kernel_size)

    def matrices(self, module: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(module.groups, -1, weight[0].numel())  # a copy of one that is not contiguous

    def row_shape(self, module: Any, x: torch.Tensor) -> torch.Size:
        return torch.Size([self._examples(x).shape[0], *output_sizes(module, tuple(x.shape[-self.axes :]))])

    def positions(self, module: Any, x: torch.Tensor) -> torch.Tensor | None:
        return sampled(torch.Size(output_sizes(module, tuple(x.shape[-self.axes :]))).numel())

    def input_rows(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        return patches(module, self._examples(x), self.positions(module, x))

    def input_key(self, module: Any, x: torch.Tensor) -> Hashable:
        geometry = (getattr(module, name) for name in (*GEOMETRY, "groups"))
        return id(x), pads_itself(module), *map(str, geometry)

    def random_input(self, module: Any, rows: int) -> torch.Tensor:
        side = max(1, math.isqrt(rows)) if self.axes == 2 else rows  # of one example's outputs: as square as can be
        outputs = (side, -(-rows // side))[: self.axes]
        if pads_itself(module):
            sizes = [n * step for n, step in zip(outputs, module.stride, strict=True)]
        else:
            pads = map(sum, padding_of(module, outputs))
            axes = zip(outputs, module.kernel_size, module.stride, pads, module.dilation, strict=True)
            sizes = [max(1, (n - 1) * step + spread * (k - 1) + 1 - pad) for n, k, step, pad, spread in axes]
        weight = module.weight
        return torch.randn(1, module.in_channels, *sizes, device=weight.device, dtype=weight.dtype)

    def output_rows(self, module: Any, y: torch.Tensor) -> torch.Tensor:
        return self._examples(y).flatten(2).mT.unflatten(-1, (module.groups, -1))

    def _examples(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.ndim == self.axes + 2 else x[None]

    def factorized(self, module: Any, rank: int, storage: str, form: str = CHANNEL) -> FactorizedConv:
        with random_state_kept(module.weight.device):
            return self.type(module, rank, storage, form)

    def dense(self, module: FactorizedConv) -> nn.Module:
        weight = module.down.weight
        geometry = {name: getattr(module, name) for name in GEOMETRY}
        kw: dict[str, Any] = {"groups": module.groups, "device": weight.device, "dtype": weight.dtype}
        bias, dense_type = module.bias is not None, module.dense_type
        layer: Any = dense_type(module.in_channels, module.out_channels, bias=bias, **geometry, **kw)
        return fill_dense(layer, module, module.dense_weight().reshape(layer.weight.shape))


register(nn.Conv1d, _ConvLayout(FactorizedConv1d))
register(nn.Conv2d, _ConvLayout(FactorizedConv2d))
