"""Checks of the values and names of options."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

from ..errors import ConfigurationError
from ..renamed import refuse_old_names


def suggestion(value: Any, known: Iterable[str]) -> str:
    """Return a sentence with the known value that comes nearest to another one; nothing where none comes near."""
    near = difflib.get_close_matches(str(value), [*known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def refuse_unknown_names(config: type[Any], names: Iterable[str]) -> None:
    """Refuse what is no option of a configuration, with what comes near.

    Args:
        config: the class of the configuration.
        names: names that a caller used.

    Raises:
        ConfigurationError: if one of them is unknown, or an old one.
    """
    refuse_old_names(names)
    known = {option.name for option in fields(config)}
    for name in names:
        if name not in known:
            hint = suggestion(name, known) or f" Known are: {', '.join(sorted(known))}."
            raise ConfigurationError(f"{config.__name__} has no field {name!r}.{hint}")


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Refuse a value that is none of the allowed ones, with what comes near."""
    if value not in tuple(allowed):  # it may not be hashable
        known = ", ".join(allowed)
        raise ConfigurationError(f"{name}: {value!r} is unknown; choose one of {known}.{suggestion(value, allowed)}")


def check_number(
    name: str, value: Any, low: float, high: float, text: str, exclude_low: bool = False, exclude_high: bool = False
) -> None:
    """Refuse what is no finite number of an interval, which `text` is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (exclude_low and value == low) or (exclude_high and value == high):
        raise ConfigurationError(f"{name}: must be a number in {text}, got {value!r}.")


def checked_patterns(name: str, value: Any, what: str = "pattern") -> list[str] | None:
    """Return one or several patterns as a list; None for None."""
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple, set)) else None
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigurationError(f"{name}: must be None, a {what} or a non-empty list of {what}s, got {value!r}.")
    return sorted(patterns) if isinstance(value, set) else patterns
