"""How each dense layer type is seen as a matrix: the protocol, and the registry of what can be factorized.

No other room tests for a layer type: `layout_of(module)` answers what the matrix, its inputs and its output gradients
are, and builds the factorized or the dense counterpart.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import TargetError
from .factorized import Factorized
from .storage import CHANNEL


class Layout(Protocol):
    """How a layer type is seen as one or several matrices `W (out, in)` acting on rows.

    A linear layer is one matrix, a convolution in `g` groups `g` of them. Matrices of a layer have the same shape.

    Attributes:
        pivots_narrow_side: whether pivots are inputs where these are fewer than the outputs; else they are outputs.
    """

    pivots_narrow_side: bool

    def refusal(self, module: nn.Module) -> str | None:
        """Return why a layer of this type cannot be factorized; None if it can."""

    def forms(self, module: nn.Module) -> tuple[str, ...]:
        """Return the forms that a layer may be factorized in: `channel` first."""

    def kernel_size(self, module: nn.Module) -> tuple[int, ...]:
        """Return the sizes of a kernel; nothing for a layer that has none."""

    def matrices(self, module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight, or its gradient, as matrices, to be read only.  # shape: (groups, out, in)."""

    def row_shape(self, module: nn.Module, x: torch.Tensor) -> torch.Size:
        """Return the shape of the rows that the layer returns for an input, as a mask of these rows would have it."""

    def positions(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Return which rows of each example stand for all of them, as `input_rows` has them; None for all."""

    def input_rows(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the layer input as rows that the matrices act on.  # shape: (..., groups, in)."""

    def input_key(self, module: nn.Module, x: torch.Tensor) -> Hashable:
        """Return the same value for layers whose rows are the same, for the time of one forward pass."""

    def random_input(self, module: nn.Module, rows: int) -> torch.Tensor:
        """Return an input that is at least `rows` rows, and hardly more, on the module's device and in its dtype."""

    def output_rows(self, module: nn.Module, y: torch.Tensor) -> torch.Tensor:
        """Return all rows of a layer output, or of its gradient, by matrix.  # shape: (..., groups, out)."""

    def factorized(self, module: nn.Module, rank: int, storage: str, form: str = CHANNEL) -> Factorized:
        """Return an uninitialized factorized layer on the module's device and in its dtype, without a random draw."""

    def dense(self, module: Any) -> nn.Module:
        """Return the dense layer that a factorized one stands for."""


@torch.no_grad()
def fill_dense(layer: Any, source: Factorized, weight: torch.Tensor) -> nn.Module:
    """Copy a weight and the bias of a factorized layer into a dense one."""
    layer.weight.copy_(weight)
    if source.bias is None:
        if layer.bias is not None:  # Conv1D always has one
            layer.bias.zero_()
    else:
        layer.bias.copy_(source.bias)
    return layer


LAYOUTS: dict[type[nn.Module], Layout] = {}
"""Dense layer types that can be factorized, each entered by its own file.

A subclass has the layout of its base; whether it answers as that says is for the choice of targets to find out, for it
may keep its weight in another form.
"""


def register(layer_type: type[nn.Module], layout: Layout) -> None:
    """Enter a dense layer type.

    Args:
        layer_type: the type.
        layout: how it is seen as a matrix.
    """
    LAYOUTS[layer_type] = layout


def layout_of(module: nn.Module) -> Layout:
    """Return the layout of a dense layer.

    Args:
        module: a layer whose type is in `LAYOUTS`, or a subclass of one that is.

    Returns:
        Its layout.

    Raises:
        TargetError: if the type is not supported.
    """
    layout = find_layout(module)
    if layout is None:
        known = ", ".join(sorted(known.__name__ for known in LAYOUTS))
        raise TargetError(f"layers of type {type(module).__name__} cannot be factorized; supported are {known}.")
    return layout


def find_layout(module: nn.Module) -> Layout | None:
    """Return the layout of a dense layer, or None for a module that is none."""
    return next((LAYOUTS[kind] for kind in type(module).__mro__ if kind in LAYOUTS), None)


def weight_matrices(module: Any) -> torch.Tensor:
    """Return the weight of a dense layer as matrices, to be read only.  # shape: (groups, out, in)."""
    return layout_of(module).matrices(module, module.weight.detach())


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
    by_name = {layer_type.__name__: layout for layer_type, layout in LAYOUTS.items()}
    return by_name[module.layer_type].dense(module)
