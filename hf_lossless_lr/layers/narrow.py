"""`NarrowLinear`: a linear layer of which only some outputs, or only some inputs, are in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .factorized import Factorized
from .model_state import random_state_kept

OUTPUTS, INPUTS = SIDES = ("outputs", "inputs")
PLACE_BYTES = 4  # of an entry of `places`


class NarrowLinear(nn.Module):
    """A linear layer with fewer outputs, or inputs, inside, in the place of one with all of them.

    * `outputs`: `y = cat(inner(x), 0)[places]`, where `places` has the number of the inner output, or their count for
      an output that is 0.
    * `inputs`: `y = inner(x[places])`.

    `inner` is a plain layer, or what takes the place of one: it may be factorized, and rounded. A guard is left under
    the name of the dense weight, as in `Factorized`.

    Args:
        dense: the dense layer; only its sizes, its device and its dtype count.
        features: how many outputs, or inputs, are in use.
        side: `outputs` or `inputs`.
    """

    weight: torch.Tensor
    places: torch.Tensor
    inner: Any

    def __init__(self, dense: Any, features: int, side: str) -> None:
        super().__init__()
        weight, of_outputs = dense.weight, side == OUTPUTS
        self.out_features, self.in_features = weight.shape
        self.features, self.side = features, side
        inputs, outputs = (self.in_features, features) if of_outputs else (features, self.out_features)
        kw: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        with random_state_kept(weight.device):
            self.inner = nn.Linear(inputs, outputs, bias=dense.bias is not None, **kw)
        first = torch.arange(self.out_features if of_outputs else features, device=weight.device, dtype=torch.int32)
        self.register_buffer("places", first.clamp_max(features))
        self.register_buffer("weight", weight.detach().new_zeros(Factorized.guard_shape))

    @classmethod
    def takes(cls, dense: nn.Module, features: int = 0, side: str = OUTPUTS) -> bool:
        """Return whether such a layer may take the place of a dense one, with so many outputs or inputs."""
        if type(dense) is not nn.Linear:
            return False
        return features < (dense.out_features if side == OUTPUTS else dense.in_features)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the layer inside."""
        return self.inner.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the map; same input and output shapes as the dense layer."""
        if self.side == INPUTS:
            return self.inner(input.index_select(-1, self.places))
        y = self.inner(input)
        return torch.cat([y, torch.zeros_like(y[..., :1])], dim=-1).index_select(-1, self.places)

    @torch.no_grad()
    def place(self, places: torch.Tensor) -> None:
        """Say which outputs, or inputs, are in use.

        Args:
            places: their numbers in the dense layer, in ascending order.  # shape: (features,)
        """
        if self.side == INPUTS:
            self.places.copy_(places)
        else:
            self.places.fill_(self.features)
            self.places[places] = torch.arange(self.features, device=places.device, dtype=self.places.dtype)

    def refusal(self) -> str | None:
        """Return what is wrong with the places, as a damaged file may have them; None if nothing is."""
        places = self.places
        if places.dtype != torch.int32:
            return f"has the dtype {places.dtype}; it must be in int32"
        if self.side == INPUTS:
            right = bool((places[0] >= 0) & (places[-1] < self.in_features) & (places.diff() > 0).all())
        else:
            used = torch.arange(self.features, device=places.device, dtype=places.dtype)
            right = torch.equal(places[places < self.features], used) and bool((places <= self.features).all())
        return None if right else "has a place that is missing, doubled, out of order or out of range"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name below the layer, and the shape, of each tensor that a checkpoint holds of it."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}

    @classmethod
    def is_complete(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether tensors of these names and shapes are a whole layer: its guard and its places."""
        return shapes.get("weight") == Factorized.guard_shape and "places" in shapes

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """Return the plain dense layer that this stands for; what is inside is dense already."""
        inner = self.inner
        kw: dict[str, Any] = {"device": inner.weight.device, "dtype": inner.weight.dtype}
        layer = nn.Linear(self.in_features, self.out_features, bias=inner.bias is not None, **kw)
        layer.weight.zero_()
        used = (self.places < self.features).nonzero().flatten()
        if self.side == INPUTS:
            layer.weight[:, self.places] = inner.weight
        else:
            layer.weight[used] = inner.weight[self.places[used]]
        if inner.bias is not None:
            layer.bias.zero_()
            if self.side == INPUTS:
                layer.bias.copy_(inner.bias)
            else:
                layer.bias[used] = inner.bias[self.places[used]]
        return layer.requires_grad_(inner.weight.requires_grad).train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.side}={self.features}"
