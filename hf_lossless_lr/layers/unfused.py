"""What takes the place of a module that holds weights of several layers in one tensor, and computes the same.

What is inside are ordinary layers, to be observed, factorized and saved as any other. Each kind of such a module is a
subclass of `Unfused`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import nn

from ..errors import TargetError
from .model_state import evaluating, random_state_kept
from .offloaded import without_hook


class Unfused(nn.Module):
    """A module in the place of a fused one. Its layers' weights are views of the fused ones, until `own_weights`.

    The fused parameters are left as guards of other shapes, so that what does not know this package refuses the
    checkpoint. Other parameters and the submodules are those of the fused module.

    Args:
        fused: the fused module; unchanged.

    Raises:
        TargetError: if its parameters are not those of its kind.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        refusal = self.refusal(fused)
        if refusal is not None:
            raise TargetError(refusal)
        template, parameters = without_hook(copy(fused)), dict(fused.named_parameters(recurse=False))
        template._parameters = dict(template._parameters)
        for name, p in parameters.items():
            template._parameters[name] = nn.Parameter(p.to("meta"), p.requires_grad)
        template._modules = dict(fused._modules)
        vars(self)["template"] = template  # no submodule: its parameters are not those of a checkpoint
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.unfuse(parameters)
        self.training = fused.training

    @property
    def template(self) -> Any:
        """The fused module, without numbers."""
        return vars(self)["template"]

    @classmethod
    @abstractmethod
    def is_kind(cls, module: nn.Module) -> bool:
        """Return whether a module seems to be of the kind that this class takes the place of."""

    @classmethod
    def refusal(cls, fused: Any) -> str | None:
        """Return why a module is not unfused, by its parameters and by how it is called; None if nothing speaks."""
        reason = "is called through a hook" if "forward" in vars(fused) else cls.unlike(fused)
        return None if reason is None else f"{type(fused).__name__} {reason}"

    @classmethod
    @abstractmethod
    def unlike(cls, fused: Any) -> str | None:
        """Return what is unlike its kind in the parameters of a fused module, in words that follow its name."""

    @abstractmethod
    def unfuse(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make the layers and the guards, and keep the other parameters, of those of the fused module."""

    @abstractmethod
    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the layers whose weights were fused, with their names below this module."""

    @abstractmethod
    def fused_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the fused module by name, from layers that are dense again."""

    @abstractmethod
    def trials(self, like: torch.Tensor) -> Iterable[tuple[Any, ...]]:
        """Yield random arguments of calls, for a comparison with the fused module.

        Args:
            like: a weight, whose device and dtype the arguments have.
        """

    def beside(self) -> list[tuple[str, ...]]:
        """Return the names of layers that do the same for other rows: experts beside one another."""
        return []

    def guard(self, name: str, like: torch.Tensor, shape: tuple[int, ...] | None = None) -> None:
        """Leave zeros under the name of a fused parameter, in two by two by … numbers if nothing else is said."""
        self.register_buffer(name, like.detach().new_zeros((2,) * like.ndim if shape is None else shape))

    @torch.no_grad()
    def own_weights(self) -> None:
        """Let weights no longer be views of fused ones, which cannot be let go of otherwise."""
        for _, layer in self.layers():
            for parameter in layer.parameters() if type(layer) is nn.Linear else ():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """Return the fused module with the weights of the layers, which are dense again."""
        module = copy(self.template)
        module._modules = {name: self._modules[name] for name in module._modules}
        module._parameters = dict(module._parameters)
        for name, value in self.fused_parameters().items():
            module._parameters[name] = nn.Parameter(value, self.template._parameters[name].requires_grad)
        module.training = self.training  # of this module alone: those inside are shared
        return module


def linear(weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Parameter) -> nn.Linear:
    """Return a layer whose weight and bias are views of fused ones.

    Args:
        weight: its weight.  # shape: (out, in)
        bias: its bias.  # shape: (out,)
        like: the fused weight.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), like.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return layer


@torch.no_grad()
def computes_the_same(fused: nn.Module, unfused: Unfused) -> bool:
    """Return whether both answer random rows in the same way, in evaluation mode.

    Args:
        fused: the fused module.
        unfused: what may take its place.
    """
    weight = next(fused.parameters())
    with random_state_kept(weight.device):
        trials = list(unfused.trials(weight))
    with evaluating(fused), evaluating(unfused):
        return all(_answers_agree(fused, unfused, inputs) for inputs in trials)


def _answers_agree(fused: nn.Module, unfused: Unfused, inputs: tuple[Any, ...]) -> bool:
    try:
        expected = _tensors(fused(*inputs))
    except Exception:  # noqa: BLE001 # whatever a class of another kind may say to such an input
        return False
    try:
        found = _tensors(unfused(*inputs))
    except AttributeError:  # a method of the fused class that is used calls one that is not
        return False
    return len(expected) == len(found) and all(_agree(x, y) for x, y in zip(expected, found, strict=True))


def _tensors(outputs: Any) -> list[torch.Tensor]:
    parts = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _agree(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    return bool((expected - found).abs().max() <= tolerance)
