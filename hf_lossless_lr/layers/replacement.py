"""Swapping modules of a model, and swapping them back: the only caller of `set_submodule`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn

from ..errors import TargetError


def finish(steps: Iterable[Callable[[], object]]) -> None:
    """Take every step, whatever happens meanwhile, and raise the first failure at the end.

    A step that fails is left; one that an interrupt stops is taken again, so each must be harmless to repeat.

    Args:
        steps: what to do, in order.
    """
    left, failure = [*steps][::-1], None
    while left:
        try:
            while left:
                left[-1]()
                left.pop()
        except BaseException as error:  # noqa: BLE001 # raised at the end
            failure = error if failure is None else failure
            if isinstance(error, Exception):
                left.pop()
    if failure is not None:
        raise failure


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
        """Put the original modules back, on the device and in the dtype of those that were in their place.

        One whose weights are offloaded comes back as it was. Finishes whatever interrupts it; what did is raised at
        the end. Twice is the same as once.
        """
        finish([partial(self._put_back, path, module) for path, module in self.originals.items()])

    def _put_back(self, path: str, module: nn.Module) -> None:
        present = next(self.model.get_submodule(path).parameters(), None)
        if present is not None and not any(parameter.is_meta for parameter in module.parameters()):
            module.to(present.device, present.dtype)
        self.model.set_submodule(path, module)


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
        return replacement
    except BaseException:  # an interrupt, too, must not leave a model that is half replaced
        replacement.undo()
        raise


@contextmanager
def in_place(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put layers into a model for the time of the body.

    Nothing is undone where none of them is in the model any more: an interrupt may leave a body that is only finished
    when it is collected, long after the model was restored, and perhaps compressed again.
    """
    replacement, own = None, set(map(id, layers.values()))
    try:
        replacement = replace_modules(model, layers)
        yield
    finally:
        try:
            _take_out(replacement, own)
        except BaseException:  # before its first step, too
            _take_out(replacement, own)
            raise


def _take_out(replacement: Replacement | None, own: set[int]) -> None:
    if replacement is not None and any(id(module) in own for module in replacement.model.modules()):
        replacement.undo()
