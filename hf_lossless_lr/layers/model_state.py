"""A model in another state for a while, and as it was afterwards: its mode, its gradients, its device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from .replacement import finish


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the body; each module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        finish([partial(setattr, module, "training", was) for module, was in training.items()])


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
        finish([partial(_reset_parameter, p, requires_grad, grad, p.device) for p, requires_grad, grad in parameters])


def own_forward(module: nn.Module) -> Callable[[], None]:
    """Return what gives a module the `forward` back that it has now: one of its own, or that of its class."""
    own, attributes = vars(module).get("forward"), vars(module)
    return partial(attributes.pop, "forward", None) if own is None else partial(attributes.update, forward=own)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Let the body draw random numbers, on the CPU and on a device; the generators are afterwards as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def on_device(model: nn.Module, device: torch.device, also: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Move a model that lies on one device, and move it back, with layers that may have left it meanwhile.

    One that is spread over devices, or offloaded, stays where it is.
    """
    original = {parameter.device for parameter in model.parameters()}
    if len(original) != 1 or original <= {device, torch.device("meta")} or getattr(model, "hf_device_map", None):
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


class ModelState:
    """What a model is made of at one moment, for when work on it is stopped half-way: all but the numbers themselves.

    Its modules and their attributes (modes, hooks), its parameters with their gradients, what requires them and where
    they lie, and its configuration. With it whether gradients are recorded at all: an interrupt on the way out of
    `torch.no_grad` would leave that off for the whole process.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._grad_enabled = torch.is_grad_enabled()
        modules = list(model.modules())
        configs = {id(config): config for m in modules if (config := getattr(m, "config", None)) is not None}
        owners = [*modules, *(config for config in configs.values() if hasattr(config, "to_dict"))]
        self._attributes = [(owner, _copied(vars(owner))) for owner in owners]
        self._parameters = [(p, p.requires_grad, p.grad, p.device) for p in model.parameters()]
        self._buffers = [(buffer, buffer.device) for buffer in model.buffers()]

    def restore(self) -> None:
        """Make the model what it was, whatever interrupts that; see `finish`."""
        steps = [partial(_reset, vars(owner), *copied) for owner, copied in self._attributes]
        steps += [partial(_reset_parameter, *parameter) for parameter in self._parameters]
        steps += [partial(_reset_device, *buffer) for buffer in self._buffers]
        finish([*steps, partial(torch.set_grad_enabled, self._grad_enabled)])


def _copied(attributes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[Any, Any]]]:
    """Return attributes, and the entries of those that are dictionaries, such as hooks and submodules."""
    return dict(attributes), {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}


def _reset(attributes: dict[str, Any], were: dict[str, Any], entries: dict[str, dict[Any, Any]]) -> None:
    """Put attributes back; one that is as it was is not touched, as an interrupt may come at any time."""
    for name in [name for name in attributes if name not in were]:
        attributes.pop(name, None)
    attributes.update(were)
    for name, before in entries.items():
        present = were[name]
        if list(present) != list(before) or any(present[key] is not value for key, value in before.items()):
            present.clear()
            present.update(before)


def _reset_parameter(
    parameter: nn.Parameter, requires_grad: bool, grad: torch.Tensor | None, device: torch.device
) -> None:
    _reset_device(parameter, device)
    parameter.requires_grad_(requires_grad)
    parameter.grad = grad


def _reset_device(tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        tensor.data = tensor.data.to(device)
