"""Experts of a mixture whose weights are fused into 3-D parameters, as one linear layer each.

Transformers keeps the weights of all experts of a layer in `gate_up_proj` (or `up_proj`) and `down_proj`, with the
expert as first axis. `UnfusedExperts` takes the place of such a module and computes the same; what is inside are
ordinary layers, to be observed, factorized and saved as any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .unfused import Unfused, linear

PROJECTIONS = {"in_proj": ("gate_up_proj", "up_proj"), "out_proj": ("down_proj",)}
"""Layers of an expert to the fused parameters that they may come from."""


class Routed(NamedTuple):
    """What an expert was sent.

    Attributes:
        rows: which rows.  # shape: (rows,)
        total: of how many.
    """

    rows: torch.Tensor
    total: int


_ROUTED: ContextVar[Routed | None] = ContextVar("routed", default=None)


def routed_rows() -> Routed | None:
    """Return what the expert that is running now was sent; None outside of any."""
    return _ROUTED.get()


@contextmanager
def _sent(routed: Routed) -> Iterator[None]:
    before = _ROUTED.set(routed)
    try:
        yield
    finally:
        _ROUTED.reset(before)


class Expert(nn.Module):
    """The two layers of one expert; what is between them is in `UnfusedExperts`."""

    in_proj: nn.Module
    out_proj: nn.Module


class UnfusedExperts(Unfused):
    """A module in the place of fused experts, with layers `0.in_proj`, `0.out_proj`, `1.in_proj` and so on.

    `in_proj` has the outputs of gate and up in the order of the fused weight. How they are joined, and what else the
    fused class has (activations, a norm), stays its own.

    The guards have two by two numbers for each expert and half: Transformers may split and merge them as it does fused
    weights when it saves and loads (older versions lose dimensions of one number).
    """

    def unfuse(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make two layers for each expert, and the guards."""
        self.num_experts: int = self.template.num_experts
        self.names = {layer: _parameter_of(self.template, layer) for layer in PROJECTIONS}
        self.transposed = _is_transposed(self.template)
        self.config = getattr(self.template, "config", None)
        for number in range(self.num_experts):
            expert = Expert()
            for layer, name in self.names.items():
                weight, bias = parameters[name][number], parameters.get(f"{name}_bias")
                weight = weight.mT if self.transposed else weight
                setattr(expert, layer, linear(weight, None if bias is None else bias[number], parameters[name]))
            self.add_module(str(number), expert)
        for layer, name in self.names.items():
            halves = 2 if layer == "in_proj" and name == "gate_up_proj" else 1
            shape = (self.num_experts, 2, 2 * halves) if self.transposed else (self.num_experts, 2 * halves, 2)
            self.guard(name, parameters[name], shape)

    @classmethod
    def is_kind(cls, module: nn.Module) -> bool:
        """Return whether a module has a fused parameter of experts, and says how many there are."""
        return "down_proj" in module._parameters and isinstance(getattr(module, "num_experts", None), int)

    @classmethod
    def unlike(cls, fused: Any) -> str | None:
        """Return what is unlike fused experts in the parameters of a module."""
        parameters = dict(fused.named_parameters(recurse=False))
        if not cls.is_kind(fused):
            return "has no fused experts"
        names = {name for layer in PROJECTIONS if (name := _parameter_of(fused, layer)) is not None}
        biases = {f"{name}_bias" for name in names if f"{name}_bias" in parameters}
        if len(names) < len(PROJECTIONS) or names | biases != set(parameters) or len(biases) not in (0, len(names)):
            return f"has other parameters than fused experts: {', '.join(sorted(parameters))}"
        if any(p.ndim != (2 if n in biases else 3) or len(p) != fused.num_experts for n, p in parameters.items()):
            return "has parameters of other shapes than fused experts"
        return None

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the layers of all experts, with their names below this module."""
        for number in range(self.num_experts):
            for layer in PROJECTIONS:
                yield f"{number}.{layer}", getattr(self.get_submodule(str(number)), layer)

    def fused_parameters(self) -> dict[str, torch.Tensor]:
        """Return the weights, and biases, of all experts together."""
        values, experts = {}, [self.get_submodule(str(number)) for number in range(self.num_experts)]
        for layer, name in self.names.items():
            own: list[Any] = [getattr(expert, layer) for expert in experts]
            weight = torch.stack([each.weight for each in own])
            values[name] = weight.mT.contiguous() if self.transposed else weight
            if own[0].bias is not None:
                values[f"{name}_bias"] = torch.stack([each.bias for each in own])
        return values

    def fused(self) -> nn.Module:
        """Return the fused module with the weights of the experts, which are dense again."""
        module: Any = super().fused()
        if self.config is not None:
            module.config = self.config
        return module

    def trials(self, like: torch.Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield rows for all experts; each gets at least one of them."""
        count, hidden = self.num_experts, self.get_submodule("0.in_proj").in_features
        x: torch.Tensor = like.new_empty(count, cast(int, hidden)).normal_()
        shares, first = like.new_empty(count, min(2, count)).uniform_(), torch.arange(count, device=like.device)
        index = torch.stack([first, (first + 1) % count][: shares.shape[1]], dim=1)
        routed = len(inspect.signature(self.template.forward).parameters) > 1
        yield (x, index, shares) if routed else (x.repeat(2, 1).index_fill(0, first[:1], 0),)

    def beside(self) -> list[tuple[str, ...]]:
        """Return the names of the first layers of all experts, and those of the second ones."""
        return [tuple(f"{number}.{layer}" for number in range(self.num_experts)) for layer in PROJECTIONS]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send each row through its experts, and add what they return, weighted.

        Args:
            hidden_states: rows; without numbers of experts, a block of all rows for each expert, in which those that
                it is not sent are 0, as Llama 4 has it.  # shape: (rows, hidden)
            top_k_index: the experts of each row; a number that is none of an expert stands for no expert.
                # shape: (rows, k)
            top_k_weights: their weights.  # shape: (rows, k)

        Returns:
            The sums, or what each expert returns for its block.  # shape: (rows, hidden)
        """
        if top_k_index is None or top_k_weights is None:
            return self._of_blocks(hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1]))
        result = torch.zeros_like(hidden_states)
        if _exporting():  # a graph has no branches: each expert takes all rows, and counts for its own
            for number in range(self.num_experts):
                share = torch.where(top_k_index == number, top_k_weights, 0).sum(-1, keepdim=True)
                result = result + (self._run(number, hidden_states) * share).to(result.dtype)
            return result
        every = range(self.num_experts)
        for number in every if self._trains() else (n for n in top_k_index.unique().tolist() if n in every):
            rows, places = (top_k_index == number).nonzero(as_tuple=True)
            y = self._run(number, hidden_states[rows], Routed(rows, len(hidden_states)))
            y = y * top_k_weights[rows, places, None]
            result.index_add_(0, rows, y.to(result.dtype))
        return result

    def _trains(self) -> bool:
        """Return whether experts without rows take part as well: fused ones have gradients, of 0, and DDP waits."""
        return self.training and torch.is_grad_enabled()

    def _of_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return what each expert makes of the rows of its block that are not 0, block below block."""
        results = []
        for number, block in enumerate(blocks):
            sent = block.any(-1)
            if _exporting():
                results.append(torch.where(sent[:, None], self._run(number, block), 0).to(block.dtype))
                continue
            rows, result = sent.nonzero().squeeze(1), torch.zeros_like(block)
            if len(rows) or self._trains():
                result.index_add_(0, rows, self._run(number, block[rows], Routed(rows, len(block))).to(block.dtype))
            results.append(result)
        return torch.cat(results)

    def _run(self, number: int, x: torch.Tensor, routed: Routed | None = None) -> torch.Tensor:
        """Return what an expert makes of the rows that it is sent; without `routed`, of all rows."""
        expert: Any = self._modules[str(number)]
        with nullcontext() if routed is None else _sent(routed):  # a strict graph knows no context variables
            y = expert.out_proj(self._joined(expert.in_proj(x)))
        normed = getattr(self.template, "has_post_expert_norm", False)
        return self.get_submodule("post_expert_norm")(y) if normed else y

    def _joined(self, y: torch.Tensor) -> torch.Tensor:
        """Return the inputs of `out_proj`: the fused class says how gate and up are joined."""
        if self.names["in_proj"] == "up_proj":
            return self.template.act_fn(y)
        if hasattr(self.template, "_apply_gate"):
            return self.template._apply_gate(y)
        gate, up = y.chunk(2, dim=-1)
        return self.template.act_fn(gate) * up


def _exporting() -> bool:
    """Return whether a graph is made for `torch.export`; PyTorch 2.6 cannot tell that from one to compile."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def _parameter_of(fused: nn.Module, layer: str) -> Any:
    return next((name for name in PROJECTIONS[layer] if name in fused._parameters), None)


def _is_transposed(fused: Any) -> bool:
    """Return whether inputs come before outputs in the fused weights; where a class does not say so, sizes do."""
    inner, outer = (fused._parameters[_parameter_of(fused, layer)] for layer in PROJECTIONS)
    return bool(getattr(fused, "is_transposed", hasattr(fused, "gate_up_proj") and inner.shape[1] == outer.shape[2]))
