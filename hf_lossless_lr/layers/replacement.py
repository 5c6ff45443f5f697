"""Swapping modules of a model, and swapping them back: the only caller of `set_submodule`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..errors import TargetError


@dataclass(frozen=True)
class Replacement:
    """Undo record of `replace_modules`.

    Attributes:
        model: the model that was changed.
        originals: every path that was changed, with the module that was there.
    """

    model: nn.Module
    originals: dict[str, nn.Module]

    def undo(self) -> None:
        """Put the original modules back, on the device and in the dtype of those that were in their place."""
        for path, module in self.originals.items():
            present = next(self.model.get_submodule(path).parameters(), None)
            self.model.set_submodule(path, module if present is None else module.to(present.device, present.dtype))


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Replacement:
    """Put new modules in place of old ones, at every path under which an old one is reachable.

    Args:
        model: the model, changed in place.
        replacements: name of a module to its replacement, which takes over the training flag.

    Returns:
        A record that undoes the change and lists all changed paths.

    Raises:
        TargetError: if a name does not exist; the model is then unchanged.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in replacements if name not in modules]
    if missing:
        raise TargetError(f"{type(model).__name__} has no module {missing[0]!r}.")
    new_of = {id(modules[name]): module for name, module in replacements.items()}
    replacement = Replacement(model, {path: module for path, module in modules.items() if id(module) in new_of})
    try:
        for path, module in replacement.originals.items():
            new = new_of[id(module)]
            new.train(module.training)
            model.set_submodule(path, new)
    except BaseException:  # an interrupt, too, must not leave a model that is half replaced
        replacement.undo()
        raise
    return replacement


@contextmanager
def in_place(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put layers into a model for the time of the body."""
    replacement = replace_modules(model, layers)
    try:
        yield
    finally:
        replacement.undo()
