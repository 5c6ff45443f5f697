"""From JSON to records: every value has the type that its record says, and a status is what its bounds say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

LARGEST = 1e30  # no size, loss or time is larger, and figures can be drawn of smaller numbers
ROUNDING = 1e-9
CERTIFIED = ("improved", "lossless")
"""The verdicts that a certificate states for a model, the better one first."""


def typed(kind: Any, value: Any, name: str, ignore: bool = False) -> Any:
    """Return JSON as a value of a type, with dataclasses for objects and tuples for arrays where that is the type.

    Args:
        kind: a type as it stands in an annotation.
        value: what JSON has.
        name: where it stands, for the error.
        ignore: whether an object may have more entries than its dataclass has fields.

    Returns:
        The value.

    Raises:
        TypeError: if the value is of another type, or a number that is none (NaN, infinite, immense).
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else typed(kind, value, name)
    if is_dataclass(kind):
        return _record(kind, value, name, ignore)
    if origin is dict and isinstance(value, dict):
        return {key: typed(arguments[1], entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if origin is list and isinstance(value, list):
        return [typed(arguments[0], entry, f"{name}[{index}]") for index, entry in enumerate(value)]
    if origin is tuple and isinstance(value, list):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(typed(argument, entry, f"{name}[{index}]") for index, (argument, entry) in pairs)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    numbers = (int, float) if kind is float else int
    if kind in (int, float) and isinstance(value, numbers) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return value
    raise TypeError(f"{name} cannot be {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}…"


def _record(kind: Any, value: Any, name: str, ignore: bool) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} cannot be {_shown(value)}")
    hints, values, known = get_type_hints(kind), {}, {field.name: field for field in fields(kind)}
    unknown = [key for key in value if key not in known]
    if unknown and not ignore:
        raise TypeError(f"{name} has no {unknown[0]!r}")
    for key, field in known.items():
        if key not in value and field.default is MISSING:
            raise KeyError(f"{name}.{key}")
        endless = field.metadata.get("endless")  # what null and its own sign of infinity mean
        if endless is not None and value[key] in (None, endless):
            values[key] = endless
        elif key in value:
            values[key] = typed(hints[key], value[key], f"{name}.{key}")
    return kind(**values)


def contradiction(certificate: Any) -> str | None:
    """Return what a certificate says against itself, or None.

    A status may claim less than its bounds allow, never more.

    Args:
        certificate: a `Certificate`.

    Returns:
        The contradiction in words.
    """
    margins = {
        "loss_increase": certificate.loss_margin,
        "tempered_loss_increase": certificate.loss_margin,
        "accuracy_drop": certificate.accuracy_margin,
    }
    found = {name: getattr(certificate, name) for name in margins if getattr(certificate, name) is not None}
    for name, difference in found.items():
        if not difference.lower - ROUNDING <= difference.mean <= difference.upper + ROUNDING:
            return f"the bounds of {name} are not around its mean"
    beyond = [name for name, difference in found.items() if difference.lower > margins[name]]
    open_ended = [name for name, difference in found.items() if difference.upper > margins[name]]
    status = certificate.status
    if status not in (*CERTIFIED, "inconclusive", "lossy"):
        return f"there is no status {_shown(status)}"
    if status == "lossy" and not beyond:
        return "the status is 'lossy', but no lower bound is beyond its margin"
    if status != "lossy" and beyond:
        return f"the status is {status!r}, but the lower bound of {beyond[0]} is beyond its margin"
    if status in CERTIFIED and open_ended:
        return f"the status is {status!r}, but the upper bound of {open_ended[0]} is beyond its margin"
    losses = [found[name].upper for name in ("loss_increase", "tempered_loss_increase") if name in found]
    if status == "improved" and not (len(losses) == 2 and max(losses) < 0):
        return "the status is 'improved', but the bounds do not show a lower loss"
    return _out_of_range(certificate)


def _out_of_range(certificate: Any) -> str | None:
    shares = {"p_value": certificate.p_value, "chance": certificate.chance, "changed": certificate.changed}
    for name in ("accuracy", "calibration_error"):
        for index, value in enumerate(getattr(certificate, name) or ()):
            shares[f"{name}[{index}]"] = value
    shares["confidence"], shares["accuracy_margin"] = certificate.confidence, certificate.accuracy_margin
    for name, share in shares.items():
        if share is not None and not -ROUNDING <= share <= 1 + ROUNDING:
            return f"{name} is {share}, which is no share of 1"
    if certificate.examples < 1 or certificate.units < 1 or certificate.loss_margin < 0:
        return "a number of examples or units, or the margin of the loss, is negative"
    if (certificate.accuracy is None) != (certificate.accuracy_drop is None):
        return "it has an accuracy without a difference, or the other way round"
    return None


def impossible(report: Any) -> str | None:
    """Return which number of a report no compression can have, or None.

    Args:
        report: a `CompressionReport`.

    Returns:
        The number in words.
    """
    if not report.layers:
        return "there are no layers"
    for name, layer in report.layers.items():
        sizes = (layer.out_features, layer.in_features, layer.dense_parameters, layer.parameters)
        if min(sizes) < 1 or (layer.rank is not None and not 1 <= layer.rank <= min(sizes[:2])):
            return f"a size or the rank of the layer {name!r} is out of range"
        if min(layer.dense_bytes or 0, layer.bytes or 0) < 0:
            return f"the bytes of the layer {name!r} are negative"
    for name, weight in (*report.layers.items(), *report.skipped.items()):
        if not re.fullmatch("float|int[2-8]", weight.format):
            return f"the weight {name!r} has the format {_shown(weight.format)}"
    for name in ("dense", "compressed"):
        found = getattr(report, name)
        if found.parameters < 1 or (found.bytes or 0) < 0 or not 0 <= (found.accuracy or 0) <= 1 + ROUNDING:
            return f"the parameters, the bytes or the accuracy of the {name} model are out of range"
    for name in ("loss_margin", "accuracy_margin"):
        margin = report.config.get(name, 0)
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin <= LARGEST:
            return f"the configuration has the {name} {_shown(margin)}"
    if report.speed is not None and (problem := _impossible_speed(report.speed)):
        return problem
    if any(not math.isfinite(trial.keep_ratio) or not 0 < trial.keep_ratio <= 1 + ROUNDING for trial in report.trials):
        return "the size of a trial is out of range"
    return None


def _impossible_speed(speed: Any) -> str | None:
    """Return what is wrong with the times of a dense and a compressed model."""
    times = [*speed.seconds, *(each for pair in speed.quartiles for each in pair), speed.ratio or 0]
    times += speed.ratio_quartiles or ()
    pairs = speed.seconds, speed.quartiles, speed.flops, speed.peak_bytes, speed.layers
    if any(pair is not None and len(pair) != 2 for pair in pairs) or not speed.shape:
        return "the times are not those of a batch in two models"
    counts = [*speed.shape, *(speed.flops or ()), *(speed.peak_bytes or ())]
    if min(times) < 0 or min(counts) < 0 or min(speed.threads, speed.turns) < 1:
        return "a time or a count of the speed is negative"
    return None
