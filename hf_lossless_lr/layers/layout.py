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


class Layout(Protocol):
    """How a layer type is seen as one or several matrices `W (out, in)` acting on rows.

    A linear layer is one matrix, a convolution in `g` groups `g` of them. Matrices of a layer have the same shape.

    Attributes:
        by_default: whether layers of this type are targets where none are named.
        pivots_narrow_side: whether pivots are inputs where these are fewer than the outputs; else they are outputs.
    """

    by_default: bool
    pivots_narrow_side: bool

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight, or its gradient, as matrices that share its memory.  # shape: (groups, out, in)."""

    def input_rows(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the layer input as rows that the matrices act on.  # shape: (..., groups, in)."""

    def input_key(self, module: nn.Module, x: torch.Tensor) -> Hashable:
        """Return the same value for layers whose rows are the same, for the time of one forward pass."""

    def random_input(self, module: nn.Module, rows: int) -> torch.Tensor:
        """Return an input that is at least `rows` rows, and hardly more, on the module's device and in its dtype."""

    def output_rows(self, y: torch.Tensor) -> torch.Tensor:
        """Return a layer output, or its gradient, as what the matrices return.  # shape: (..., groups, out)."""

    def factorized(self, module: nn.Module, rank: int, storage: str) -> Factorized:
        """Return an uninitialized factorized layer on the module's device and in its dtype."""

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

Matched exactly: a subclass may keep its weight in another form.
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
        module: a layer whose exact type is in `LAYOUTS`.

    Returns:
        Its layout.

    Raises:
        TargetError: if the type is not supported.
    """
    if type(module) not in LAYOUTS:
        known = ", ".join(sorted(known.__name__ for known in LAYOUTS))
        raise TargetError(f"layers of type {type(module).__name__} cannot be factorized; supported are {known}.")
    return LAYOUTS[type(module)]


def weight_matrices(module: Any) -> torch.Tensor:
    """Return the weight of a dense layer as matrices that share its memory.  # shape: (groups, out, in)."""
    return layout_of(module).matrices(module.weight.detach())


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
