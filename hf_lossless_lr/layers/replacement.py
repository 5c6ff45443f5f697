"""Swapping modules of a model, and swapping them back: the only caller of `set_submodule`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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


class Place(NamedTuple):
    """Where a module is kept, besides those of which it is a submodule.

    Attributes:
        kept: the list or dictionary; the attributes of a module are one.
        key: the place in it.
        value: what is there.
    """

    kept: Any
    key: Any
    value: Any


OF_PYTORCH = frozenset(vars(nn.Module()))  # attributes of every module: its submodules, parameters, hooks, …


@dataclass(frozen=True)
class Replacement:
    """Undo record of `replace_modules`.

    Attributes:
        model: the model that was changed.
        originals: every path that was changed, with the module that was there.
        elsewhere: every other place that was changed, with what was there.
    """

    model: nn.Module
    originals: dict[str, nn.Module]
    elsewhere: list[Place]

    def undo(self) -> None:
        """Put the original modules back, on the device and in the dtype of those that were in their place.

        One whose weights are offloaded comes back as it was. Finishes whatever interrupts it; what did is raised at
        the end. Twice is the same as once.
        """
        lists = [partial(place.kept.__setitem__, place.key, place.value) for place in self.elsewhere]
        finish([*(partial(self._put_back, path, module) for path, module in self.originals.items()), *lists])

    def _put_back(self, path: str, module: nn.Module) -> None:
        present = next(self.model.get_submodule(path).parameters(), None)
        if present is not None and not any(parameter.is_meta for parameter in module.parameters()):
            module.to(present.device, present.dtype)
        self.model.set_submodule(path, module)


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Replacement:
    """Put new modules in place of old ones, at every path under which an old one is reachable.

    Modules that keep others in lists, too, and call those, get the new ones there (MaskFormer does).

    Args:
        model: the model, changed in place.
        replacements: name of a module to its replacement, which takes over the training flag.

    Returns:
        A record that undoes the change and lists all changed paths.

    Raises:
        TargetError: if a name does not exist; the model is then unchanged.
    """
    modules, new_of = _resolved(model, replacements)
    originals = {path: module for path, module in modules.items() if id(module) in new_of}
    replacement = Replacement(model, originals, list(_elsewhere(modules.values(), new_of)))
    try:
        for path, module in replacement.originals.items():
            new = new_of[id(module)]
            for part in set(new.modules()).difference(module.modules()):  # an unfused module shares some
                part.training = module.training
            model.set_submodule(path, new)
        for kept, key, value in replacement.elsewhere:
            kept[key] = _swapped(value, new_of)
        return replacement
    except BaseException:  # an interrupt, too, must not leave a model that is half replaced
        replacement.undo()
        raise


def _resolved(
    model: nn.Module, replacements: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[int, nn.Module]]:
    """Return all modules by path, and what takes the place of each of them, by its id."""
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in replacements if name not in modules]
    if missing:
        raise TargetError(f"{type(model).__name__} has no module {missing[0]!r}.")
    return modules, {id(modules[name]): module for name, module in replacements.items()}


def _elsewhere(modules: Iterable[nn.Module], new_of: Mapping[int, nn.Module]) -> Iterator[Place]:
    """Yield the attributes of modules, and the places in lists and dictionaries of theirs, where replaced ones are."""
    waiting: list[tuple[Any, Iterable[Any]]] = [(vars(m), vars(m).keys() - OF_PYTORCH) for m in modules]
    seen = set[int]()
    while waiting:
        kept, keys = waiting.pop()
        if id(kept) in seen:
            continue
        seen.add(id(kept))
        for key in keys:
            value = kept[key]
            if isinstance(value, (list, dict)):
                waiting.append((value, value if isinstance(value, dict) else range(len(value))))
            elif isinstance(value, (nn.Module, tuple)) and _swapped(value, new_of) is not value:
                yield Place(kept, key, value)


def _swapped(value: Any, new_of: Mapping[int, nn.Module]) -> Any:
    """Return what takes the place of a value: a replaced module, or a tuple with some; else the value itself."""
    if type(value) is not tuple:
        return new_of.get(id(value), value)
    new = tuple(_swapped(each, new_of) for each in value)
    return value if all(x is y for x, y in zip(new, value, strict=True)) else new


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


def taking_turns(model: nn.Module, layers: Mapping[str, nn.Module]) -> Callable[[], AbstractContextManager[None]]:
    """Return what puts layers into a model for the time of a body, like `in_place`, as often as it is called.

    Their places are looked up once, for thousands of layers (of experts) may take thousands of turns.

    Args:
        model: the model, whose own modules stay where they are, on the same device, between two turns.
        layers: name of a module to what takes its place, and its training flag.

    Returns:
        A function that returns the context manager of one turn.

    Raises:
        TargetError: if a name does not exist.
    """
    modules, new_of = _resolved(model, layers)
    places = list(_elsewhere(modules.values(), new_of))
    for path, module in modules.items():
        if id(module) in new_of:
            new_of[id(module)].train(module.training)
            parent, _, key = path.rpartition(".")
            places.append(Place(modules[parent]._modules, key, module))
    others = [_swapped(place.value, new_of) for place in places]

    def give_back() -> None:
        for place, other in zip(places, others, strict=True):
            if place.kept[place.key] is other:
                place.kept[place.key] = place.value

    @contextmanager
    def turn() -> Iterator[None]:
        try:
            for place, other in zip(places, others, strict=True):
                place.kept[place.key] = other
            yield
        finally:
            try:
                give_back()
            except BaseException:  # an interrupt
                give_back()
                raise

    return turn
