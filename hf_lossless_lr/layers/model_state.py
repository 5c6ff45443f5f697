"""A model in another state for a while, and as it was afterwards: its mode, its gradients, its device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the body; each module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def differentiating_only(model: nn.Module, targets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Evaluation mode, gradients for the target weights alone; everything as it was afterwards."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    weights = {id(module.weight) for module in targets.values()}
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in weights)
        with evaluating(model):
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def on_device(model: nn.Module, device: torch.device, also: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Move a model that lies on one device, and move it back, with layers that may have left it meanwhile."""
    original = {parameter.device for parameter in model.parameters()}
    if len(original) != 1 or original == {device} or getattr(model, "hf_device_map", None):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        home = original.pop()
        for module in (model, *also):
            module.to(home)


def own_config(model: Any) -> Callable[[], None]:
    """Give a model a copy of its configuration, so that what is written there is not in other models that share it.

    Args:
        model: the model; the modules in it that hold the configuration, or a part of it, get the copy, too.

    Returns:
        What gives all of them the former one back.
    """
    copies: dict[int, Any] = {}
    deepcopy(model.config, copies)
    holders = [(module, module.config) for module in model.modules() if id(vars(module).get("config")) in copies]

    def restore() -> None:
        for module, config in holders:
            module.config = config

    for module, config in holders:
        module.config = copies[id(config)]
    return restore
