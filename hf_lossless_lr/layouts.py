"""How each dense layer type is seen as a matrix: the registry of what can be factorized.

No other file tests for a layer type: `layout_of(module)` answers what the matrix, its inputs and its output gradients
are, and builds the factorized or the dense counterpart.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .errors import TargetError
from .modules import Factorized, FactorizedConv2d, FactorizedLinear


class Layout(Protocol):
    """How a layer type is seen as a matrix `W (out, in)` acting on rows."""

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight, or its gradient, as a matrix.  # shape: (out, in)."""

    def input_rows(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the layer input with the matrix' columns as last dimension.  # shape: (..., in)."""

    def random_input(self, module: nn.Module, rows: int) -> torch.Tensor:
        """Return an input that is at least `rows` rows, and hardly more, on the module's device and in its dtype."""

    def output_rows(self, y: torch.Tensor) -> torch.Tensor:
        """Return a layer output, or its gradient, with the matrix' rows as last dimension.  # shape: (..., out)."""

    def factorized(self, module: nn.Module, rank: int, storage: str) -> FactorizedLinear | FactorizedConv2d:
        """Return an uninitialized factorized layer on the module's device and in its dtype."""

    def dense(self, module: Any) -> nn.Module:
        """Return the dense layer that a factorized one stands for."""


class _LinearLayout:
    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def input_rows(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    def random_input(self, module: Any, rows: int) -> torch.Tensor:
        weight = module.weight
        return torch.randn(rows, self.as_matrix(weight).shape[1], device=weight.device, dtype=weight.dtype)

    def output_rows(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def factorized(self, module: Any, rank: int, storage: str) -> FactorizedLinear:
        out_features, in_features = self.as_matrix(module.weight).shape
        return FactorizedLinear(
            in_features,
            out_features,
            rank,
            bias=module.bias is not None,
            storage=storage,
            layer_type=type(module).__name__,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )

    def dense(self, module: FactorizedLinear) -> nn.Module:
        weight = module.down.weight
        kw: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, **kw)
        return _fill(layer, module, module.dense_weight())


class _Conv1DLayout(_LinearLayout):
    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def dense(self, module: FactorizedLinear) -> nn.Module:
        layer = Conv1D(module.out_features, module.in_features).to(module.down.weight)
        return _fill(layer, module, module.dense_weight().T)


class _Conv2dLayout:
    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def input_rows(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        if isinstance(module.padding, str):
            raise TargetError(f"a convolution with padding={module.padding!r} is not supported; use explicit sizes.")
        patches = F.unfold(
            x, module.kernel_size, dilation=module.dilation, padding=module.padding, stride=module.stride
        )
        return patches.transpose(1, 2)

    def random_input(self, module: Any, rows: int) -> torch.Tensor:
        height = math.isqrt(rows)  # of the output of one image, as square as the rows allow
        outputs = (height, -(-rows // height))
        geometry = zip(outputs, module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
        sides = [max(1, (n - 1) * step + spread * (k - 1) + 1 - 2 * pad) for n, k, step, pad, spread in geometry]
        weight = module.weight
        return torch.randn(1, module.in_channels, *sides, device=weight.device, dtype=weight.dtype)

    def output_rows(self, y: torch.Tensor) -> torch.Tensor:
        return y.flatten(2).transpose(1, 2)

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
        return _fill(layer, module, module.dense_weight().reshape(layer.weight.shape))


@torch.no_grad()
def _fill(layer: Any, source: Factorized, weight: torch.Tensor) -> nn.Module:
    layer.weight.copy_(weight)
    if source.bias is None:
        if layer.bias is not None:  # Conv1D always has one
            layer.bias.zero_()
    else:
        layer.bias.copy_(source.bias)
    return layer


LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Linear: _LinearLayout(),
    Conv1D: _Conv1DLayout(),
    nn.Conv2d: _Conv2dLayout(),
}
"""Dense layer types that can be factorized. Matched exactly: a subclass may keep its weight in another form."""

_LAYOUT_BY_NAME = {layer_type.__name__: layout for layer_type, layout in LAYOUTS.items()}


def layout_of(module: nn.Module) -> Layout:
    """Return the layout of a dense layer.

    Args:
        module: a layer whose exact type is in `LAYOUTS`.

    Returns:
        Its layout.

    Raises:
        TargetError: if the type is not supported.
    """
    if type(module) not in LAYOUTS:
        known = ", ".join(_LAYOUT_BY_NAME)
        raise TargetError(f"layers of type {type(module).__name__} cannot be factorized; supported are {known}.")
    return LAYOUTS[type(module)]


def weight_matrix(module: Any) -> torch.Tensor:
    """Return the weight of a dense layer as a matrix that shares its memory.  # shape: (out, in)."""
    return layout_of(module).as_matrix(module.weight.detach())


def to_dense(module: nn.Module) -> nn.Module:
    """Return the plain dense layer that a factorized layer stands for.

    Args:
        module: a factorized layer.

    Returns:
        A layer of the original type, on the same device and in the same dtype.

    Raises:
        TargetError: if the module is not factorized.
    """
    if not isinstance(module, Factorized):
        raise TargetError(f"{type(module).__name__} is not a factorized layer.")
    return _LAYOUT_BY_NAME[module.layer_type].dense(module)
