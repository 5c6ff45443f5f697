"""Which layers give a model's answers: found by comparing what they return with what the model returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers import evaluating
from .forward import run_batch


@torch.no_grad()
def answering_layers(model: PreTrainedModel, layers: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> list[str]:
    """Return the layers whose output is the model's logits, whatever they are called.

    A layer answers if each row of some logits is a row of its output (all rows, or those of the last tokens), or if
    they are one of its features (start or end of an answer). The batch is run twice, so that no outputs need be kept.

    Args:
        model: the model; left as it was.
        layers: layers to look at, by name.
        batch: a batch.

    Returns:
        Their names.
    """
    found: list[str] = []

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and any(_gives(output, answer) for answer in answers):
                found.append(name)

        return hook

    with evaluating(model):
        answers = list(_logits(run_batch(model, batch)))
        hooks = [module.register_forward_hook(compare(name)) for name, module in layers.items()]
        try:
            run_batch(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    return list(dict.fromkeys(found))


def _logits(outputs: Any) -> Iterator[torch.Tensor]:
    """Return the tensors among a model's outputs that are called logits, scores or predictions."""
    for name, value in (outputs if isinstance(outputs, Mapping) else vars(outputs)).items():
        if any(part in name for part in ("logits", "scores", "pred")):
            tensors = value if isinstance(value, (tuple, list)) else [value]
            yield from (t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim)


def _gives(output: torch.Tensor, answer: torch.Tensor) -> bool:
    if output.numel() == answer.numel():
        return torch.equal(output.flatten(), answer.flatten().to(output.dtype))
    if output.numel() == 0 or answer.numel() == 0:
        return False
    answer = answer.to(output.dtype)
    if output.shape[-1] == answer.shape[-1]:
        rows = output.flatten(0, -2)
        return all(bool((rows == row).all(-1).any()) for row in answer.flatten(0, -2))
    features = output.flatten(0, -2).T
    return features.shape[1] == answer.numel() and bool((features == answer.flatten()).all(-1).any())
