"""Plain-text tables for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .records import CompressionReport

Row = tuple[float | None, float | None]


def comparison_table(rows: Mapping[str, Row]) -> str:
    """Return a table of dense against compressed, with the ratio compressed / dense.

    Args:
        rows: label to the two values; integers are printed with thousands separators, None as a dash.

    Returns:
        The table, with a header line.
    """
    width = max(len(label) for label in rows) + 2
    lines = [f"{'':{width}}{'dense':>14}{'compressed':>14}{'ratio':>9}"]
    for label, (before, after) in rows.items():
        ratio = f"{after / before:.3f}" if before and after is not None else "-"
        lines.append(f"{label:{width}}{_number(before):>14}{_number(after):>14}{ratio:>9}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,d}" if isinstance(value, int) else f"{value:.4f}"


def report_rows(report: CompressionReport) -> dict[str, Row]:
    """Return the rows of a report: sizes in both scopes, loss and accuracy on the held-out data, time of a batch."""
    layers, speed = report.layers.values(), report.speed
    sizes: dict[str, Row] = {}
    if report.compressed.bytes is not None:
        sizes["bytes of the tensors"] = report.dense.bytes, report.compressed.bytes
    latency: dict[str, Row] = {}
    if speed is not None:
        latency[f"batch of {speed.shape[0]} (ms)"] = 1000 * speed.seconds[0], 1000 * speed.seconds[1]
    return {
        "targeted parameters": (sum(x.dense_parameters for x in layers), sum(x.parameters for x in layers)),
        "parameters": (report.dense.parameters, report.compressed.parameters),
        **sizes,
        "loss (nats)": (report.dense.loss, report.compressed.loss),
        "accuracy": (report.dense.accuracy, report.compressed.accuracy),
        **latency,
    }


def score_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what `summarize` gives as text, with a line for each metric."""
    width = max(map(len, summary)) + 2
    pair = any("drop" in found for found in summary.values())
    lines = [f"{'':{width}}{'dense':>20}{'compressed':>20}   worse by (bounds)"] if pair else []
    for name, found in summary.items():
        line = f"{name:{width}}"
        for entry in found["values"]:
            line += f"{_score(entry['value'])} ± {_score(entry['standard_error'])}".rjust(20)
        if "drop" in found:
            drop = {key: _score(value, "+") for key, value in found["drop"].items()}
            line += "   {mean} ({lower} to {upper})".format(**drop)
        lines.append(line)
    return "\n".join(lines)


def _score(value: float | None, sign: str = "") -> str:
    return "unknown" if value is None else f"{value:{sign}.4f}"
