"""Names that changed before the first release: the old ones are refused with the new one, or read from old files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from .errors import ConfigurationError

RENAMED = {"budget": "size", "metric_margin": "accuracy_margin", "evaluation": "held_out"}
"""Old name of an option, an argument or an attribute to its present name."""

P = ParamSpec("P")
R = TypeVar("R")


def refuse_old_names(names: Iterable[str]) -> None:
    """Refuse keyword arguments that have another name now.

    Args:
        names: names that a caller used.

    Raises:
        ConfigurationError: if one of them is an old name.
    """
    for name in names:
        if name in RENAMED:
            raise ConfigurationError(f"{name!r} is called {RENAMED[name]!r} now.")


def refusing_old_names(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse keyword arguments that have another name now."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_old_names(kwargs)
        return function(*args, **kwargs)

    return checked


def with_present_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an older version wrote, under the present names."""
    return {RENAMED.get(name, name): value for name, value in data.items()}


class Renamed:
    """A record whose old attributes say what they are called now."""

    def __getattr__(self, name: str) -> Any:
        """Raise for an attribute that does not exist.

        Raises:
            AttributeError: always; with the present name, if there is one.
        """
        hint = f"; it is called {RENAMED[name]!r} now" if name in RENAMED else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")
