"""Which layers give a model's answers: found by comparing what they return with what the model returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers import differentiating_only, layout_of
from .forward import run_batch
from .representations import NOISE

ANSWERS = ("logits", "scores", "pred")  # in the names of outputs that are answers
NO_ANSWERS = ("loss", "hidden", "state", "attention", "embed", "features", "key", "memor", "cache")
CLASSES = 3  # as few show which of a layer's features are theirs


def answering_layers(model: PreTrainedModel, layers: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> list[str]:
    """Return the layers that give the model's logits, whatever they are called.

    A layer answers if each row of some logits is a row of its output (all rows, or those of the last tokens), or if
    they are one of its features (start or end of an answer). It also answers if nothing but its features of two
    classes moves the difference of their logits: these may be scaled, capped or averaged over tokens in between. The
    batch is run twice, so that no outputs need be kept.

    Args:
        model: the model; left as it was.
        layers: layers to look at, by name.
        batch: a batch.

    Returns:
        Their names, in the order of the layers.
    """
    if NOISE in batch:  # a model without a head
        return []
    found: set[str] = set()
    outputs: list[tuple[str, torch.Tensor]] = []

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, torch.Tensor):
                return None
            if any(_gives(output, answer) for answer in answers):
                found.add(name)
            own = output.detach().requires_grad_()
            outputs.append((name, own))
            return own.clone()  # the model may write into it

        return hook

    with differentiating_only(model, {}):
        with torch.no_grad():
            answers = list(_logits(run_batch(model, batch)))
        hooks = [module.register_forward_hook(compare(name)) for name, module in layers.items()]
        try:
            with torch.enable_grad():
                moved = list(_logits(run_batch(model, batch)))
                for answer in moved:
                    found |= {name for name, grad in _gradients(answer, outputs) if _moves_two(layers[name], grad)}
        finally:
            for hook in hooks:
                hook.remove()
    return [name for name in layers if name in found]


def _logits(outputs: Any) -> Iterator[torch.Tensor]:
    """Return the tensors among a model's outputs that are called logits, scores or predictions, or else its own."""
    named = dict(outputs if isinstance(outputs, Mapping) else vars(outputs))
    called = {name: value for name, value in named.items() if any(part in name for part in ANSWERS)}
    own = {name: value for name, value in named.items() if not any(part in name for part in NO_ANSWERS)}
    for value in (called or own).values():
        yield from _tensors(value)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _gradients(answer: torch.Tensor, outputs: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Return the gradients of the difference of two classes, the first and the last, by the outputs of layers.

    Classes are in the last dimension or in the second; logits of less than three are passed over, for these two would
    be all there are.
    """
    found = []
    for dim in {answer.ndim - 1, min(1, answer.ndim - 1)} if answer.requires_grad else set():
        if answer.shape[dim] >= CLASSES:
            difference = (answer.select(dim, 0) - answer.select(dim, -1)).sum()
            grads = torch.autograd.grad(difference, [x for _, x in outputs], retain_graph=True, allow_unused=True)
            found += [(name, grad) for (name, _), grad in zip(outputs, grads, strict=True) if grad is not None]
    return found


def _moves_two(layer: nn.Module, grad: torch.Tensor) -> bool:
    """Return whether a gradient reaches two of a layer's features alone, of three or more."""
    features = layout_of(layer).output_rows(layer, grad).flatten(-2)
    return features.shape[-1] >= CLASSES and int((features.flatten(0, -2) != 0).any(0).sum()) == 2


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
