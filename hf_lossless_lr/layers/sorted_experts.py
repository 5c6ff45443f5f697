"""Experts that get their rows one expert after the other, with one fused weight: a linear layer each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .unfused import Unfused, linear


class UnfusedSortedExperts(Unfused):
    """A module in the place of JetMoe's experts, with layers `0`, `1` and so on.

    The rows come sorted by expert, together with how many each of them gets.
    """

    def unfuse(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make a layer for each expert, and the guard."""
        weight = parameters["weight"]
        self.num_experts = len(weight)
        for number, matrix in enumerate(weight):
            self.add_module(str(number), linear(matrix, None, weight))
        self.guard("weight", weight)

    @classmethod
    def is_kind(cls, module: nn.Module) -> bool:
        """Return whether a module has a weight of as many matrices as it says to have experts."""
        weight, count = module._parameters.get("weight"), getattr(module, "num_experts", None)
        return weight is not None and weight.ndim == 3 and isinstance(count, int) and len(weight) == count

    @classmethod
    def unlike(cls, fused: Any) -> str | None:
        """Return what is unlike such experts in the parameters of a module."""
        if not cls.is_kind(fused):
            return "has no fused experts"
        others = sorted(name for name, _ in fused.named_parameters(recurse=False) if name != "weight")
        return f"has other parameters than a weight: {', '.join(others)}" if others else None

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the layers of all experts."""
        for number in range(self.num_experts):
            yield str(number), self.get_submodule(str(number))

    def fused_parameters(self) -> dict[str, torch.Tensor]:
        """Return the weights of all experts together."""
        return {"weight": torch.stack([layer.weight for _, layer in self.layers()])}

    def trials(self, like: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield rows for all experts but one."""
        sizes = [(number + 2) % self.num_experts for number in range(self.num_experts)]
        yield like.new_empty(sum(sizes), like.shape[-1]).normal_(), sizes

    def beside(self) -> list[tuple[str, ...]]:
        """Return the names of all layers: they stand beside one another."""
        return [tuple(name for name, _ in self.layers())]

    def forward(self, inputs: torch.Tensor, expert_size: Sequence[int]) -> torch.Tensor:
        """Send each part of the rows through its expert.

        Args:
            inputs: rows, sorted by expert.  # shape: (rows, in)
            expert_size: how many rows each expert gets.

        Returns:
            What the experts return, in the same order.  # shape: (rows, out)
        """
        parts = zip(self.layers(), inputs.split(list(expert_size)), strict=True)
        waits = self.training and torch.is_grad_enabled()  # DDP: for gradients of experts without rows, too
        return torch.cat([layer(rows) for (_, layer), rows in parts if waits or len(rows)])
