"""What takes the place of a dense layer in a compressed model: the shared body of all layer types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import ConfigurationError
from .storage import CHANNEL, STORAGES

METHOD = "lossless_lr"
"""Name of our format among Transformers' quantization methods."""


def called_with(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the input that a layer, dense or factorized, was called with: `layer(x)`, or by the name it has there."""
    if args:
        return args[0]
    by_name = kwargs.get("input")  # of a Linear and a Conv2d
    return kwargs["x"] if by_name is None else by_name  # of a Conv1D


class Factorized(nn.Module):
    """Shared body of the factorized layers: `down` to the rank, `up` from it, and a guard called `weight`.

    * `two-factor`: `y = up(down(x)) + bias`.
    * `pivoted`, by outputs: `z = down(x)` are `rank` of the outputs themselves, `up` computes the others from them,
      and `permutation` restores their order: `y = cat(z, up(z))[permutation] + bias`.
    * `pivoted`, by inputs (`pivots_inputs`): `permutation` puts `rank` of the inputs first, `down` adds what the
      others contribute to them: `u, v = x[permutation].split(rank)`, `y = up(u + down(v)) + bias`.

    The guard is a one-element buffer under the dense weight's name. Model code that reads `.weight.dtype` works, and a
    stock Transformers that does not know this package refuses the checkpoint with a shape mismatch instead of filling
    the layer with random numbers.
    """

    own_tensors: ClassVar[tuple[str, ...]] = ("down.weight", "up.weight", "down.codes", "up.codes", "permutation")
    """Tensors below a layer that no dense layer has."""

    guard_shape: ClassVar[tuple[int, ...]] = (1,)
    """Shape of the guard."""

    feature_dim = -1
    form = CHANNEL
    groups = 1
    pivots_inputs = False
    layer_type: str
    down: Any  # a linear layer or a convolution, or what holds its weight in another form
    up: Any
    bias: nn.Parameter | None
    permutation: torch.Tensor | None

    def __init__(self, out_features: int, in_features: int, rank: int, storage: str) -> None:
        super().__init__()
        if storage not in STORAGES:
            raise ConfigurationError(f"storage: {storage!r} is unknown; choose one of {', '.join(STORAGES)}.")
        limit = min(out_features, in_features) - (storage == "pivoted")
        if not 1 <= rank <= limit:
            raise ConfigurationError(
                f"rank: a {storage} layer with {in_features} inputs and {out_features} outputs takes ranks from 1 to "
                f"{limit}, got {rank}."
            )
        self.out_features, self.in_features, self.rank, self.storage = out_features, in_features, rank, storage

    def _finish(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Register the bias, the permutation and the guard; `down` and `up` exist already."""
        outputs = self.groups * self.out_features
        parameter = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", parameter)
        permuted = self.in_features if self.pivots_inputs else outputs
        order = torch.arange(permuted, device=device, dtype=torch.int32)
        self.register_buffer("permutation", order if self.storage == "pivoted" else None)
        self.register_buffer("weight", torch.zeros(self.guard_shape, device=device, dtype=dtype))

    @property
    def weight(self) -> torch.Tensor:
        """The guard, in the dtype of the factors: FSDP may compute in another one, and leaves buffers as they are."""
        guard = self._buffers.get("weight")
        if guard is None:
            raise AttributeError("weight")  # before it is registered
        dtype = getattr(self.down, "weight", guard).dtype  # codes have none
        return guard.to(dtype) if dtype.is_floating_point else guard

    def _stored_sizes(self) -> tuple[int, int]:
        """Return the inputs of `down` and the outputs of `up`: what pivots stand for is not stored."""
        pivots = self.rank if self.storage == "pivoted" else 0
        if self.pivots_inputs:
            return self.in_features - pivots, self.out_features
        return self.in_features, self.out_features - pivots

    def forward(self, input: torch.Tensor | None = None, *, x: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the factorized map; same input and output shapes as the dense layer, and the names of its input."""
        rows: Any = x if input is None else input
        # For a few rows, the way to an attribute of a module counts: not by `__getattr__`, and not twice.
        down, up, permutation = self._modules["down"], self._modules["up"], self._buffers["permutation"]
        if permutation is None:
            return self._with_bias(up, _applied(down, rows))
        if self.pivots_inputs:
            rows = rows.index_select(-1, permutation)
            return self._with_bias(up, rows[..., : self.rank] + _applied(down, rows[..., self.rank :]))
        z = _applied(down, rows)
        y = torch.cat([z, _applied(up, z)], dim=self.feature_dim).index_select(self.feature_dim, permutation)
        return self._plus_bias(y)

    def _with_bias(self, up: Any, z: torch.Tensor) -> torch.Tensor:
        """Apply `up` and the bias; in one product, where that can be, which spares a pass over the outputs."""
        if is_plain(up, nn.Linear):
            return F.linear(z, parameter_of(up, "weight"), parameter_of(self, "bias"))
        return self._plus_bias(up(z))

    def _plus_bias(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)  # another one under autocast

    def _order_stored(self, permutation: torch.Tensor) -> torch.Tensor:
        """Return the order as it is stored, of all matrices of the layer together."""
        return permutation

    @torch.no_grad()
    def load_factors(
        self,
        down: torch.Tensor,
        up: torch.Tensor,
        permutation: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Copy factors into the layer, casting them once to its dtype.

        Args:
            down: right factor, pivot rows, or coefficients of other inputs.  # shape: (..., rank, in or in - rank)
            up: left factor, pivot columns, or coefficients of other outputs.  # shape: (..., out or out - rank, rank)
            permutation: order of the outputs or of the inputs, for pivoted storage.  # shape: (..., out) or (in,)
            bias: bias of the dense layer, if it has one.  # shape: (out,)

        Raises:
            ConfigurationError: if the storage and the permutation do not go together.
        """
        if (permutation is None) != (self.permutation is None):
            raise ConfigurationError(
                f"load_factors: a {self.storage} layer takes {'no' if self.permutation is None else 'a'} permutation."
            )
        self.down.weight.copy_(down.reshape(self.down.weight.shape))
        self.up.weight.copy_(up.reshape(self.up.weight.shape))
        if self.permutation is not None and permutation is not None:
            self.permutation.copy_(self._order_stored(permutation).reshape(self.permutation.shape))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name below the layer, and the shape, of each tensor that a checkpoint holds of it."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}

    @classmethod
    def is_complete(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether tensors of these names and shapes are a whole layer: its guard and one that only it has."""
        return shapes.get("weight") == cls.guard_shape and any(name in shapes for name in cls.own_tensors)

    def dense_weight(self) -> torch.Tensor:
        """Return the matrix that the factors stand for, in float32 or wider.  # shape: (out, in)."""
        dtype = torch.promote_types(self.down.weight.dtype, torch.float32)
        down, up = self.down.weight.flatten(1).to(dtype), self.up.weight.flatten(1).to(dtype)
        if self.permutation is None:
            return up @ down
        if self.pivots_inputs:
            return torch.cat([up, up @ down], dim=1).index_select(1, torch.argsort(self.permutation))
        return torch.cat([down, up @ down]).index_select(0, self.permutation)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, storage={self.storage}"
        )


def is_plain(factor: Any, layer_type: type[nn.Module]) -> bool:
    """Return whether a factor is of that type and nothing hangs on it: no adapter, no hook, no other weight."""
    return (
        type(factor) is layer_type
        and getattr(factor.forward, "__func__", None) is layer_type.forward
        and not has_hooks(factor)
    )


def has_hooks(module: Any) -> bool:
    """Return whether a hook is called with a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def parameter_of(module: Any, name: str) -> Any:
    """Return a parameter, by the short way if it can be; or the tensor that FSDP or DataParallel put in its place."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def _applied(factor: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply a factor; a plain one without the cost of calling a module, which counts for a few rows."""
    return F.linear(x, parameter_of(factor, "weight")) if is_plain(factor, nn.Linear) else factor(x)


def layers_in(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Find the factorized layers among the tensors of a checkpoint, whole ones or not.

    Args:
        shapes: name of each tensor to its shape.

    Returns:
        Name of a layer to the shapes of the tensors below it.
    """
    kinds = _kinds(Factorized)
    endings = {f".{name}" for kind in kinds for name in kind.own_tensors}
    names = {key.removesuffix(ending) for key in shapes for ending in endings if key.endswith(ending)}
    guards = {kind.guard_shape for kind in kinds}
    names |= {key.removesuffix(".weight") for key, s in shapes.items() if key.endswith(".weight") and s in guards}
    layers: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in names}
    for key, shape in shapes.items():
        parts = key.split(".")
        for length in range(1, len(parts)):
            name = ".".join(parts[:length])
            if name in layers:
                layers[name][".".join(parts[length:])] = shape
    return layers


def _kinds(kind: type[Factorized]) -> list[type[Factorized]]:
    return [kind, *(further for below in kind.__subclasses__() for further in _kinds(below))]


def is_factorized(module: nn.Module) -> bool:
    """Return whether a module is one of the factorized layers."""
    return isinstance(module, Factorized)
