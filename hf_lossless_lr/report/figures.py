"""Figures from a `CompressionReport`: what was kept where, what it was predicted to cost, and what it cost."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import BAD, DENSE, FULL, KEPT, refuse_links, require_matplotlib, save_figure
from .records import CompressionReport, TrialRecord
from .text import label as harmless
from .weights import LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Layers = dict[str, LayerReport]

LABEL_WIDTH = 64  # characters that fit below a panel


def write_figures(report: CompressionReport, directory: str | os.PathLike[str]) -> list[Path]:
    """Write the figures of a report as PNG files.

    Args:
        report: the report.
        directory: where to; made if it does not exist.

    Returns:
        The files, in the order of `figures`.

    Raises:
        ConfigurationError: if matplotlib is not installed, or a link is in the place of a file.
    """
    drawn = {Path(directory) / f"{name}.png": figure for name, figure in figures(report).items()}
    refuse_links(drawn)
    Path(directory).mkdir(parents=True, exist_ok=True)
    for path, figure in drawn.items():
        save_figure(figure, path)
    return list(drawn)


def figures(report: CompressionReport) -> dict[str, Figure]:
    """Draw every figure for which a report has the data.

    * `rank_per_layer`: bars, one panel for each layer type.
    * `kept_per_layer_type`: share of the parameters kept.
    * `loss_and_size`: measured trials, with the upper bounds on which they were chosen, and the certified model.
    * `predicted_and_measured`: loss increase of the trials.
    * `changed_answers`: how often the two models differ, and what that does to the accuracy.

    Args:
        report: the report.

    Returns:
        Name to figure.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
    require_matplotlib()
    draw: dict[str, Callable[[CompressionReport], Figure | None]] = {
        "rank_per_layer": _rank_per_layer,
        "kept_per_layer_type": _kept_per_layer_type,
        "loss_and_size": _loss_and_size,
        "predicted_and_measured": _predicted_and_measured,
        "changed_answers": _changed_answers,
    }
    drawn = {name: function(report) for name, function in draw.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def layers_by_type(report: CompressionReport) -> dict[str, Layers]:
    """Group layers by what follows the last number in their name, named by as few of its last parts as tell it apart.

    Args:
        report: the report.

    Returns:
        Layer type (such as `query`, `attention.output`, `down_proj`) to its layers, in the model's order.
    """
    kinds: dict[tuple[str, ...], Layers] = {}
    for name, layer in report.layers.items():
        kinds.setdefault(_kind(name), {})[name] = layer
    shorts = {kind: kind[:-1] if kind[-1] == "dense" and len(kind) > 1 else kind for kind in kinds}
    if len(set(shorts.values())) < len(kinds):
        shorts = {kind: kind for kind in kinds}
    result = {}
    for kind, layers in kinds.items():
        short, others = shorts[kind], [other for other in shorts.values() if other != shorts[kind]]
        lengths = (n for n in range(1, len(short)) if all(other[-n:] != short[-n:] for other in others))
        result[".".join(short[-next(lengths, len(short)) :])] = layers
    return result


def _kind(name: str) -> tuple[str, ...]:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return tuple(parts[numbers[-1] + 1 :] if numbers and numbers[-1] + 1 < len(parts) else parts)


def _rank_per_layer(report: CompressionReport) -> Figure:
    """Draw the rank of each layer before its full rank, in one panel for each layer type; dense layers are hatched."""
    from matplotlib.patches import Patch

    groups = layers_by_type(report)
    columns = 1 if len(groups) == 1 else 2
    rows = math.ceil(len(groups) / columns)
    figure = _figure(10, 1.2 + 1.7 * rows, "Rank of each layer")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for unused in axes[len(groups) :]:
        unused.set_visible(False)
    for ax, (kind, layers) in zip(axes, groups.items(), strict=False):
        full = [min(layer.out_features, layer.in_features) for layer in layers.values()]
        ranks = [layer.rank for layer in layers.values()]
        ax.bar(range(len(ranks)), full, color=FULL)
        ax.bar(*_where(ranks, [rank is not None for rank in ranks]), color=KEPT)
        ax.bar(*_where(full, [rank is None for rank in ranks]), color=DENSE, hatch="///", edgecolor="white")
        ax.set_title(harmless(kind), fontsize=9, loc="left")
        ax.set_ylabel("rank")
        labels = [harmless(block) for block in _blocks(list(layers))]
        step = math.ceil(len(labels) * (max(map(len, labels)) + 1) / LABEL_WIDTH)
        ax.set_xticks(range(0, len(labels), step), labels[::step], fontsize=8)
    figure.supxlabel("block", fontsize=10)
    legend = {"kept": (KEPT, None), "full rank": (FULL, None), "left dense": (DENSE, "///")}
    handles = [Patch(facecolor=c, hatch=hatch, edgecolor="white", label=text) for text, (c, hatch) in legend.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _where(heights: Sequence[Any], shown: Sequence[bool]) -> tuple[list[int], list[Any]]:
    places = [place for place, show in enumerate(shown) if show]
    return places, [heights[place] for place in places]


def _blocks(names: list[str]) -> list[str]:
    """Return what tells layers of one type apart: numbers in their names, and the stack (`enc`, `dec`) they are in."""
    parts = [name.split(".") for name in names]
    numbers = [[part for part in split if part.isdigit()] for split in parts]
    if len({len(found) for found in numbers}) == 1:
        columns = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1 or len(names) == 1]
        numbers = [[column[place] for column in columns] for place in range(len(names))]
    stacks = next((column for column in zip(*parts, strict=False) if len(set(column)) > 1), ())
    if all(stack.isdigit() for stack in stacks):
        return [".".join(found) for found in numbers]
    return [".".join([stack[:3], *found]) for stack, found in zip(stacks, numbers, strict=True)]


def _kept_per_layer_type(report: CompressionReport) -> Figure:
    """Draw the share of the parameters that each layer type keeps."""
    groups = layers_by_type(report)
    figure = _figure(8, 1.4 + 0.34 * len(groups), "Parameters kept, by layer type")
    ax = figure.subplots()
    sizes = {kind: [(x.parameters, x.dense_parameters) for x in layers.values()] for kind, layers in groups.items()}
    shares = {kind: sum(kept for kept, _ in s) / sum(dense for _, dense in s) for kind, s in sizes.items()}
    places = range(len(groups))
    ax.barh(places, [1.0] * len(groups), color=FULL)
    ax.barh(places, list(shares.values()), color=KEPT)
    for place, (kind, share) in zip(places, shares.items(), strict=True):
        layers = groups[kind].values()
        dense = sum(layer.rank is None for layer in layers)
        text = (
            f"{share:.2f} ({len(layers)} layer{'s' if len(layers) > 1 else ''}{f', {dense} dense' if dense else ''})"
        )
        ax.text(1.02, place, text, va="center", fontsize=8)
    ax.axvline(report.keep_ratio, color=BAD, linestyle="--", label=f"all targeted layers: {report.keep_ratio:.2f}")
    ax.set_yticks(places, [harmless(kind) for kind in groups])
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xlabel("parameters kept / dense parameters")
    figure.legend(loc="outside upper right", fontsize=8, frameon=False)
    return figure


def _loss_and_size(report: CompressionReport) -> Figure | None:
    """Draw the measured loss increase of each trial over its size, and likewise the drop of the accuracy."""
    trials = [trial for trial in report.trials if trial.loss_increase is not None]
    if not trials:
        return None
    panels = [("loss_increase", "loss increase (nats)", 1, "loss_margin")]
    if any(trial.accuracy_drop is not None for trial in trials):
        panels.append(("accuracy_drop", "accuracy drop (points)", 100, "accuracy_margin"))
    figure = _figure(8, 1.2 + 2.9 * len(panels), "Measured cost and size of each trial")
    axes = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for ax, (key, label, scale, margin) in zip(axes, panels, strict=True):
        for passes, colour, text in ((True, KEPT, "trial"), (False, BAD, "trial outside the margins")):
            points = [trial for trial in trials if trial.passes is passes and getattr(trial, key) is not None]
            if points:
                means, uppers = ([scale * _value(trial, k) for trial in points] for k in (key, f"{key}_upper"))
                _points(ax, [trial.keep_ratio for trial in points], means, means, uppers, color=colour, label=text)
        found, place = getattr(report.certificate, key, None), [report.keep_ratio]
        if found is not None:
            mean, lower, upper = ([scale * value] for value in (found.mean, found.lower, found.upper))
            style = {"color": DENSE, "marker": "D", "markersize": 9, "elinewidth": 4, "zorder": 1}
            _points(ax, place, mean, lower, upper, label="certificate, on other examples", **style)
        ax.axhline(0, color="black", linewidth=0.8, label="dense model")
        if margin in report.config:
            ax.axhline(scale * report.config[margin], color=DENSE, linestyle=":", label="margin")
        ax.set_ylabel(label)
    axes[-1].set_xlabel("parameters kept / dense parameters, in the targeted layers")
    _legend_of(figure, axes)
    return figure


def _predicted_and_measured(report: CompressionReport) -> Figure | None:
    """Draw the measured loss increase of each trial over the predicted one, both on logarithmic axes."""
    pairs = [
        (trial.predicted_loss_increase, trial.loss_increase, _value(trial, "loss_increase_upper"))
        for trial in report.trials
        if trial.loss_increase is not None and trial.predicted_loss_increase > 0
    ]
    above = [pair for pair in pairs if pair[1] > 0]
    below = [(predicted, upper) for predicted, measured, upper in pairs if measured <= 0 < upper < math.inf]
    if not above and not below:
        return None
    figure = _figure(6.4, 5.6, "Predicted and measured cost of each trial")
    ax = figure.subplots()
    if above:
        predicted, measured, uppers = (list(column) for column in zip(*above, strict=True))
        _points(ax, predicted, measured, measured, uppers, color=KEPT, label="trial, with its upper bound")
    if below:  # an arrow downwards
        label = "upper bound of a trial without an increase"
        ax.scatter(*zip(*below, strict=True), color=KEPT, marker="v", label=label)
    shown = [value for pair in (*above, *below) for value in pair if value < math.inf]
    ends = min(shown) / 1.5, max(shown) * 1.5
    ax.plot(ends, ends, color=DENSE, linestyle="--", label="measured as predicted")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(min(pair[0] for pair in (*above, *below)) / 1.5, max(pair[0] for pair in (*above, *below)) * 1.5)
    ax.set_xlabel("predicted loss increase (nats)")
    ax.set_ylabel("measured loss increase (nats)")
    _legend_of(figure, [ax])
    return figure


def _changed_answers(report: CompressionReport) -> Figure | None:
    """Draw the accuracies, and how many answers changed: in all, and at most from right to wrong and back."""
    certificate = report.certificate
    if certificate is None or certificate.accuracy is None or certificate.accuracy_drop is None:
        return None
    if certificate.changed is None:
        return None
    figure = _figure(9, 3.4, f"Answers to {certificate.units:,} held-out questions")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    accuracies = [100 * accuracy for accuracy in certificate.accuracy]
    left.bar_label(left.bar(["dense", "compressed"], accuracies, color=[DENSE, KEPT], width=0.6), fmt="%.2f")
    left.set_ylim(0, 112)
    left.set_ylabel("right answers (%)")
    if certificate.chance is not None:
        left.axhline(100 * certificate.chance, color=BAD, linestyle="--", label="always the most frequent answer")
        figure.legend(loc="outside upper right", fontsize=8, frameon=False)
    drop, changed = certificate.accuracy_drop, certificate.changed
    # `lost - gained` is the drop, and `lost + gained` at most what changed; exactly that, where there are two classes
    bars = {
        "changed": (changed, DENSE),
        "right to wrong,\nat most": ((changed + drop.mean) / 2, BAD),
        "wrong to right,\nat most": ((changed - drop.mean) / 2, KEPT),
    }
    drawn = right.barh(list(bars), [100 * share for share, _ in bars.values()], color=[c for _, c in bars.values()])
    right.bar_label(drawn, fmt="%.2f", padding=3)
    mean, lower, upper = ([100 * value] for value in (drop.mean, drop.lower, drop.upper))
    right.errorbar(mean, ["net loss"], xerr=_sides(mean, lower, upper), color="black", capsize=4, marker="D")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_ylim(len(bars) + 0.6, -0.6)
    right.margins(x=0.15)
    right.set_xlabel(f"answers (%); net loss with its {100 * certificate.confidence:g} % bounds")
    return figure


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: it needs a display, and keeps every figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _points(
    ax: Axes, x: list[float], means: list[float], lowers: list[float], uppers: list[float], **style: Any
) -> None:
    """Draw points with error bars."""
    sides = _sides(means, lowers, uppers)
    ax.errorbar(x, means, yerr=sides, **{"capsize": 3, "linestyle": "none", "marker": "o", **style})


def _sides(means: list[float], lowers: list[float], uppers: list[float]) -> list[list[float]]:
    """Return the lengths of error bars; a bound that is infinite is left out."""
    return [
        [abs(b - m) if math.isfinite(b) else 0.0 for b, m in zip(side, means, strict=True)]
        for side in (lowers, uppers)
    ]


def _value(trial: TrialRecord, name: str) -> float:
    """Return a number of a trial; an upper bound that there is none is infinite."""
    value = getattr(trial, name)
    return math.inf if value is None else float(value)


def _legend_of(figure: Figure, axes: Any) -> None:
    """Put one legend below the axes, with each label once."""
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
