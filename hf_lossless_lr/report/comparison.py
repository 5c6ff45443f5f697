"""Methods compared on one model: a record of each, a table and a figure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .drawing import DENSE, check_figure, save_figure
from .reading import CERTIFIED, typed

COLUMNS = (
    *("method", "asked", "parameters", "bytes", "loss", "accuracy (points)"),
    *("divergence", "verdict", "time of a batch", "compression (s)"),
)
LINTHRESH = 0.01  # nats; the axis is linear up to here and logarithmic above


@dataclass(frozen=True)
class MethodResult:
    """What one method made of a model, at one size.

    Attributes:
        method: its name.
        keep_ratio: size that was asked for; None where the method has a size of its own.
        parameters: parameters of the targeted weights, kept divided by original ones.
        bytes: the same of the bytes of all tensors of the checkpoint.
        loss_increase: over the dense model on the held-out data, in nats.
        accuracy_change: change of the accuracy, as a fraction; None where the head has none.
        divergence: mean divergence from the dense model's predictions, in nats; None where there is none.
        status: verdict of the certificate, or `none`.
        latency: time of a calibration batch relative to the dense model's; None where it was not measured.
        seconds: time of the compression, without the statistics, which all methods share.
        inputs: fingerprint of the model, of the data and of the options that all methods share.
    """

    method: str
    keep_ratio: float | None
    parameters: float
    bytes: float
    loss_increase: float
    accuracy_change: float | None
    divergence: float | None
    status: str
    latency: float | None
    seconds: float
    inputs: str

    @classmethod
    def from_dict(cls, values: Any) -> MethodResult:
        """Read a record.

        Args:
            values: what JSON has of it.

        Returns:
            The record.

        Raises:
            CheckpointError: if it is none.
        """
        try:
            return typed(cls, values, "the record")
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"this is no result of a method: {error}") from error


def methods_table(results: Sequence[MethodResult]) -> str:
    """Return a Markdown table with a line for each result.

    Args:
        results: at least one.

    Returns:
        The table, with a header.
    """
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, results)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(result: MethodResult) -> tuple[str, ...]:
    change = None if result.accuracy_change is None else 100 * result.accuracy_change
    return (
        result.method,
        _number(result.keep_ratio, "g"),
        f"{result.parameters:.3f}",
        f"{result.bytes:.3f}",
        f"{result.loss_increase:+.4f}",
        _number(change, "+.2f"),
        _number(result.divergence, ".5f"),
        result.status,
        _number(result.latency, ".2f"),
        f"{result.seconds:.1f}",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def write_methods_figure(results: Sequence[MethodResult], path: str | os.PathLike[str]) -> None:
    """Draw loss increase against bytes and against parameters, a line for each method; certified points are filled.

    Args:
        results: at least one.
        path: the PNG file; not written through a link.

    Raises:
        ConfigurationError: if matplotlib is not installed, or a link is in the place of the file.
    """
    check_figure(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for axes, field, label in zip(sides, ("parameters", "bytes"), _LABELS, strict=True):
        axes.axhline(0, color=DENSE, lw=1)
        for name, points, style in _lines(results, field):
            x, y = zip(*((getattr(point, field), point.loss_increase) for point in points), strict=True)
            (line,) = axes.plot(x, y, style, lw=1.3, mfc="white", label=name)
            sure = [(a, b) for a, b, point in zip(x, y, points, strict=True) if point.status in CERTIFIED]
            if sure:
                axes.plot(*zip(*sure, strict=True), style[0], color=line.get_color())
        axes.set_yscale("symlog", linthresh=LINTHRESH)
        axes.set_xlabel(label)
        axes.invert_xaxis()
    sides[0].set_ylabel("loss increase (nats); filled: certified")
    sides[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    save_figure(figure, path)


_LABELS = ("parameters kept of the targeted weights", "bytes kept of the checkpoint")
_MARKERS = "osD^vP*Xh<>p"


def _lines(results: Sequence[MethodResult], field: str) -> Iterator[tuple[str, list[MethodResult], str]]:
    names = list(dict.fromkeys(result.method for result in results))
    for place, name in enumerate(names):
        points = sorted((r for r in results if r.method == name), key=lambda r: -getattr(r, field))
        yield name, points, f"{_MARKERS[place % len(_MARKERS)]}-"
