"""Interrupts that come between any two steps of the interpreter, as Ctrl-C does; and what a model is made of."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Interrupt(KeyboardInterrupt):
    """One of ours."""


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Interrupt the body after a time, wherever it is then; not at all if it is done before."""

    def interrupt(*_: Any) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupted_at(step: int, work: Callable[[], Any]) -> int:
    """Interrupt work at its n-th step, and return the steps that it took.

    A step is the entry of a function in Python or the end of one in C, which is where the interpreter looks for
    interrupts (besides jumps backwards).

    Raises:
        Interrupt: unless it took fewer steps.
    """
    taken = 0

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal taken
        if event in ("call", "c_return"):
            taken += 1
            if taken == step:
                raise Interrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return taken


class Parts:
    """The modules of a model, their attributes, and every bit of its tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.attributes = {path: _shown(vars(module)) for path, module in self.modules.items()}
        self.parameters = {n: (p, p.requires_grad, p.grad) for n, p in model.named_parameters(remove_duplicate=False)}
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.config = model.config.to_dict(), set(vars(model.config))

    def check(self, model: nn.Module) -> None:
        now = Parts(model)
        assert list(now.modules) == list(self.modules)
        assert [path for path, module in self.modules.items() if now.modules[path] is not module] == []
        assert now.attributes == self.attributes
        assert now.parameters.keys() == self.parameters.keys()
        for name, parts in self.parameters.items():
            assert all(mine is other for mine, other in zip(parts, now.parameters[name], strict=True)), name
        assert [name for name, tensor in self.state.items() if not torch.equal(tensor, now.state[name])] == []
        assert now.config == self.config


def _shown(attributes: dict[str, Any]) -> dict[str, Any]:
    return {n: (id(v), list(v)) if isinstance(v, dict) else v for n, v in attributes.items() if n != "config"}
