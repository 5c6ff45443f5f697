"""Patterns that name layers: exact names, ends of names, regular expressions, globs and types."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from torch import nn

from ..errors import TargetError

T = TypeVar("T")

EXACT, SUFFIX, REGEX, GLOB, TYPE, NO_MATCH = 5, 4, 3, 2, 1, 0


def match_specificity(pattern: str, name: str, module: nn.Module) -> float:
    """Return how specifically a pattern matches a module: `EXACT` … `TYPE`, or `NO_MATCH`; of ends, the longer more.

    Args:
        pattern: exact name or end of a name, `re:` and a regular expression (matched in full), glob, or name of its
            type or of a base of it.
        name: qualified name of the module.
        module: the module.

    Returns:
        The specificity; higher is more specific.

    Raises:
        TargetError: if the regular expression is invalid.
    """
    if pattern.startswith("re:"):
        try:
            return REGEX if re.fullmatch(pattern[3:], name) else NO_MATCH
        except re.error as error:
            raise TargetError(f"{pattern!r} is no valid regular expression: {error}.") from error
    if pattern == name:
        return EXACT
    if name.endswith("." + pattern):
        return SUFFIX + pattern.count(".") / name.count(".")  # below EXACT
    if any(c in pattern for c in "*?[") and fnmatch.fnmatchcase(name, pattern):
        return GLOB
    return TYPE if pattern in {kind.__name__ for kind in type(module).__mro__[:-1]} - {"Module"} else NO_MATCH


def best_match(patterns: Sequence[str], name: str, module: nn.Module) -> float:
    """Return how specifically the best of some patterns matches a module."""
    return max((match_specificity(pattern, name, module) for pattern in patterns), default=NO_MATCH)


def values_of(
    option: str,
    given: Mapping[str, T],
    layers: Mapping[str, nn.Module],
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, T]:
    """Return what is given for layers by pattern.

    Args:
        option: name of the option, for errors.
        given: values by pattern; of several that match a layer, the most specific one counts, and then the first.
        layers: the layers.
        skipped: layers that get none, and why.

    Returns:
        Values by name of those layers that a pattern matches.

    Raises:
        TargetError: if a pattern matches nothing.
    """
    check_patterns(option, list(given), layers, skipped)
    return matching(given, layers)


def matching(given: Mapping[str, T], layers: Mapping[str, nn.Module]) -> dict[str, T]:
    """Return what `values_of` does, also where a pattern matches nothing."""
    values = {}
    for name, module in layers.items():
        pattern = max(given, key=lambda each: match_specificity(each, name, module), default=None)
        if pattern is not None and match_specificity(pattern, name, module):
            values[name] = given[pattern]
    return values


def check_patterns(
    option: str,
    patterns: Sequence[str] | None,
    candidates: Mapping[str, nn.Module],
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse a pattern that matches nothing, naming what comes near.

    Args:
        option: name of the option.
        patterns: its patterns, or None.
        candidates: the layers that they may match.
        skipped: other layers, and why they may not match those.

    Raises:
        TargetError: if one matches none of them.
    """
    for pattern in patterns or ():
        if any(match_specificity(pattern, name, module) for name, module in candidates.items()):
            continue
        for name, reason in skipped.items():
            if match_specificity(pattern, name, nn.Module()):
                raise TargetError(f"{option}: {pattern!r} matches {name!r}, which stays dense: {reason}.")
        endings = {name.rpartition(".")[2] for name in candidates}
        types = {type(module).__name__ for module in candidates.values()}
        near = difflib.get_close_matches(pattern, sorted(endings | types | set(candidates)), n=3, cutoff=0.5)
        known = ", ".join(repr(n) for n in near) if near else ", ".join(sorted(endings)[:10]) or "none"
        label = "nearest" if near else "layers here"
        raise TargetError(f"{option}: {pattern!r} matches no layer; {label}: {known}.")
