"""`FactorizedConv2d`, and how `nn.Conv2d` is seen as a matrix."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import TargetError
from .factorized import Factorized
from .layout import fill_dense, register


class FactorizedConv2d(Factorized):
    """A two-dimensional convolution as a narrower convolution followed by a pointwise one.

    The kernel `(out, in, kh, kw)` is seen as the matrix `(out, in * kh * kw)`.

    Args:
        convolution: the dense layer whose geometry (channels, kernel, stride, padding, dilation) is taken over.
        rank: rank of the kernel matrix.
        storage: `pivoted` or `two-factor`.

    Raises:
        ConfigurationError: if the rank or the storage is not possible.
    """

    feature_dim = -3
    layer_type = "Conv2d"

    def __init__(self, convolution: nn.Conv2d, rank: int, storage: str = "pivoted") -> None:
        weight = convolution.weight
        super().__init__(weight.shape[0], weight[0].numel(), rank, storage)
        kw: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        self.geometry: dict[str, Any] = {
            "kernel_size": convolution.kernel_size,
            "stride": convolution.stride,
            "padding": convolution.padding,
            "dilation": convolution.dilation,
        }
        self.down = nn.Conv2d(convolution.in_channels, rank, **self.geometry, **kw)
        self.up = nn.Conv2d(rank, self._stored_sizes()[1], 1, **kw)
        self._finish(convolution.bias is not None, weight.device, weight.dtype)


class _Conv2dLayout:
    by_default = False
    pivots_narrow_side = False

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)[None]

    def input_rows(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        if isinstance(module.padding, str):
            raise TargetError(f"a convolution with padding={module.padding!r} is not supported; use explicit sizes.")
        patches = F.unfold(
            x, module.kernel_size, dilation=module.dilation, padding=module.padding, stride=module.stride
        )
        return patches.transpose(1, 2).unsqueeze(-2)

    def input_key(self, module: nn.Module, x: torch.Tensor) -> Hashable:
        return id(x), id(module)  # the patches depend on the geometry

    def random_input(self, module: Any, rows: int) -> torch.Tensor:
        height = math.isqrt(rows)  # of the output of one image, as square as the rows allow
        outputs = (height, -(-rows // height))
        geometry = zip(outputs, module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
        sides = [max(1, (n - 1) * step + spread * (k - 1) + 1 - 2 * pad) for n, k, step, pad, spread in geometry]
        weight = module.weight
        return torch.randn(1, module.in_channels, *sides, device=weight.device, dtype=weight.dtype)

    def output_rows(self, y: torch.Tensor) -> torch.Tensor:
        return y.flatten(2).transpose(1, 2).unsqueeze(-2)

    def factorized(self, module: Any, rank: int, storage: str) -> FactorizedConv2d:
        if module.groups != 1 or module.padding_mode != "zeros":
            raise TargetError(
                f"a convolution with groups={module.groups} and padding_mode={module.padding_mode!r} cannot be "
                "factorized; only groups=1 and zero padding can. Add it to `ignore`."
            )
        return FactorizedConv2d(module, rank, storage)

    def dense(self, module: FactorizedConv2d) -> nn.Module:
        down: Any = module.down
        kw: dict[str, Any] = {"device": down.weight.device, "dtype": down.weight.dtype}
        layer = nn.Conv2d(down.in_channels, module.out_features, bias=module.bias is not None, **module.geometry, **kw)
        return fill_dense(layer, module, module.dense_weight().reshape(layer.weight.shape))


register(nn.Conv2d, _Conv2dLayout())
