"""`Stored`: a plain layer or an embedding whose weight is the codes, scales and zeros that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from ..formats import FORMATS, decode, stored_grid
from .factorized import Factorized, called_with
from .narrow import NarrowLinear
from .rounded import as_matrix, from_matrix, set_grid

VECTOR = 32  # bytes


class Stored(nn.Module):
    """A module in the place of one with a rounded weight; its tensors are those of a checkpoint.

    It runs as it is, at the price of decoding its weight in every call, and `to_float` gives the plain module. Codes
    of `int8` are not decoded for activations in bfloat16 on a CPU, which has a product for them, nor are the rows of
    an embedding that nobody asks for.

    A weight of its own is left as a guard with one element: model code that reads its dtype or its device works, other
    weights can be tied to it, and a Transformers that does not know this package refuses the checkpoint.

    Args:
        module: the plain module; only its sizes count.
        number_format: the number format of its weight, a key of `FORMATS`.
        guarded: whether it has a guard; a factor has none, for its layer has one.
    """

    guard_shape: ClassVar[tuple[int, ...]] = Factorized.guard_shape
    """Shape of the guard."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, module: nn.Module, number_format: str, guarded: bool = True) -> None:
        super().__init__()
        weight: Any = module.weight
        self.number_format, self.kind, self.guarded = number_format, FORMATS[number_format], guarded
        self.matrix_shape = as_matrix(module, weight).shape
        vars(self)["template"] = module  # no submodule: its tensors are not those of a checkpoint
        if guarded:
            guard = torch.zeros(self.guard_shape, dtype=weight.dtype, device=weight.device)
            self.weight = nn.Parameter(guard, requires_grad=False)
        for name, (shape, dtype) in self.kind.tensors(*self.matrix_shape).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=weight.device))
        for name, parameter in module.named_parameters(recurse=False):
            if name != "weight":
                self.register_parameter(name, parameter)
        if "bias" not in self._parameters and hasattr(module, "bias"):
            self.bias = None

    def __getattr__(self, name: str) -> Any:
        """Return what the plain module has besides tensors: model code asks for its sizes and settings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            template = vars(self).get("template")
            value = getattr(template, name, None)
            if name.startswith("__") or not hasattr(template, name) or isinstance(value, torch.Tensor):
                raise
            return value

    @property
    def template(self) -> Any:
        """The plain module, with a weight that means nothing."""
        return vars(self)["template"]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name below the module, and the shape, of each tensor that a checkpoint holds of it."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}

    @classmethod
    def is_complete(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether tensors of these names and shapes are a whole module: its guard and its codes."""
        return shapes.get("weight") == cls.guard_shape and "codes" in shapes

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self.kind.tensors(*self.matrix_shape)}

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight in the shape of the plain module."""
        matrix = decode(self._tensors(), self.matrix_shape[1], self.kind).to(dtype)
        return from_matrix(self.template, matrix, self.template.weight.shape)

    def align(self) -> None:
        """Move the codes to where products can load them: in a file, they begin anywhere."""
        self.codes = self.codes.clone()

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """Return the plain module with the decoded weight, which is known to lie on its grids."""
        module = self.template
        module.weight = nn.Parameter(self.decoded(dtype))
        for name, parameter in self._parameters.items():
            if name != "weight":
                module.register_parameter(name, parameter)
        set_grid(module, stored_grid(self._tensors(), self.kind))
        return module.train(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply the module; it takes what the plain one does."""
        module = self.template
        if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:  # it scales rows, or shifts places
            return functional_call(module, {"weight": self.decoded(self.weight.dtype)}, args, kwargs)
        rows = called_with(args, kwargs)
        if isinstance(module, nn.Embedding):
            dtype = self.weight.dtype if self.guarded else torch.float32
            chosen = {n: F.embedding(rows, t).flatten(0, -2) for n, t in self._tensors().items()}
            return decode(chosen, self.matrix_shape[1], self.kind).to(dtype).unflatten(0, rows.shape)
        if self.kind.symmetric and type(module) is nn.Linear and _has_product(rows, self.codes):
            aligned, scale = _aligned(rows.reshape(-1, rows.shape[-1])), self.scale[:, 0].view(torch.bfloat16)
            y = torch._weight_int8pack_mm(aligned, self.codes, scale).reshape(*rows.shape[:-1], -1)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        bias: Any = {} if self.bias is None else {"bias": self.bias}  # a replica of DataParallel has no parameters
        return functional_call(module, {"weight": self.decoded(rows.dtype), **bias}, (rows,))


def _has_product(x: torch.Tensor, codes: torch.Tensor) -> bool:
    """Return whether PyTorch multiplies such activations by int8 codes as they are, and faster than by numbers.

    Its product has no gradient. It loads whole vectors from where they must begin, and would end the process
    elsewhere. A compiler fuses the decoding itself.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    return x.numel() > 0 and x.shape[-1] % VECTOR == 0 and codes.data_ptr() % VECTOR == 0


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % VECTOR == 0 else x.clone()


def is_complete(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether tensors of these names and shapes, below one name, are a whole layer of a compressed model."""
    return any(kind.is_complete(shapes) for kind in (Factorized, Stored, NarrowLinear))


def stored_in(model: nn.Module) -> dict[str, Stored]:
    """Return the modules whose weights are as a checkpoint holds them, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Stored)}
