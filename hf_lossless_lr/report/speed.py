"""How long two models take for the same batch, as a record, a table and a figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from .drawing import DENSE, KEPT, check_figure, save_figure
from .text import plain

COLOURS = (DENSE, KEPT)


@dataclass(frozen=True)
class Speed:
    """How long models take for a batch, end to end, measured in turns in one run; the second is compared to the first.

    Attributes:
        shape: of the main input: examples first.
        device: type of the device.
        threads: threads of the processor.
        turns: how often each model was measured.
        seconds: median of each model.  # length: models
        quartiles: lower and upper quartile of each model's seconds.
        ratio: median over the turns of the second model's time divided by the first one's; None for one model.
        ratio_quartiles: its quartiles.
        flops: floating-point operations of a pass of each model, where they were counted.
        peak_bytes: most memory that a pass of each model took at once, beside the weights, where it was measured.
        layers: seconds of the layers of each model in one pass, where they were asked for.
    """

    shape: tuple[int, ...]
    device: str
    threads: int
    turns: int
    seconds: tuple[float, ...]
    quartiles: tuple[tuple[float, float], ...]
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    flops: tuple[int, ...] | None = None
    peak_bytes: tuple[int, ...] | None = None
    layers: tuple[dict[str, float], ...] | None = None

    @property
    def is_slower(self) -> bool:
        """Whether the second model is slower, in more than three of four turns."""
        return self.ratio_quartiles is not None and self.ratio_quartiles[0] > 1

    def misses(self, share: float | None) -> bool:
        """Return whether the second model takes 5 % more than a share of the time, in more than three of four turns.

        Args:
            share: the share that was asked for; None for none.
        """
        return share is not None and self.ratio_quartiles is not None and self.ratio_quartiles[0] > 1.05 * share

    @property
    def setting(self) -> str:
        """The batch, and what it ran on."""
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else ""
        return f"{' × '.join(map(str, self.shape))}, {self.device}{threads}"


def speed_table(speeds: Sequence[Speed]) -> str:
    """Return a line for each setting: medians and quartiles in milliseconds, and the ratio.

    Args:
        speeds: at least one record.

    Returns:
        The table, with a header line.
    """
    width = max(len(speed.setting) for speed in speeds) + 2
    pair = len(speeds[0].seconds) > 1
    names = ("dense (ms)", "compressed (ms)", "ratio") if pair else ("time (ms)",)
    lines = [" " * width + "".join(f"{name:>24}" for name in names) + _extra_header(speeds[0])]
    for speed in speeds:
        cells = [_milliseconds(*entry) for entry in zip(speed.seconds, speed.quartiles, strict=True)]
        if speed.ratio is not None and speed.ratio_quartiles is not None:
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(speed.ratio, *speed.ratio_quartiles))
        lines.append(f"{speed.setting:{width}}" + "".join(f"{cell:>24}" for cell in cells) + _extra(speed))
    return "\n".join(lines)


def layer_table(speed: Speed, most: int = 20) -> str:
    """Return the layers that take longest, with their share of the pass of each model.

    Args:
        speed: a record with layers.
        most: how many layers to show.

    Returns:
        The table.
    """
    layers = speed.layers or ()
    names = sorted(layers[0] if layers else (), key=lambda name: -layers[0][name])[:most]
    width = max((len(plain(name)) for name in names), default=0) + 2
    lines = [" " * width + "".join(f"{name:>18}" for name in ("dense (ms)", "compressed (ms)")[: len(layers)])]
    for name in names:
        times = "".join(f"{1000 * found[name]:>18.3f}" if name in found else f"{'-':>18}" for found in layers)
        lines.append(f"{plain(name):{width}}{times}")
    return "\n".join(lines)


def write_speed_figure(speeds: Sequence[Speed], path: str | os.PathLike[str]) -> None:
    """Draw bars of the median times, with their quartiles, one group for each setting.

    Args:
        speeds: at least one record.
        path: the PNG file; not written through a link.

    Raises:
        ConfigurationError: if matplotlib is not installed, or a link is in the place of the file.
    """
    check_figure(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.6 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    names = ("dense", "compressed") if len(speeds[0].seconds) > 1 else ("model",)
    for index, name in enumerate(names):
        places = [place + 0.35 * index for place in range(len(speeds))]
        median = [1000 * speed.seconds[index] for speed in speeds]
        spread = [
            [abs(1000 * speed.quartiles[index][side] - m) for speed, m in zip(speeds, median, strict=True)]
            for side in (0, 1)
        ]
        axes.barh(places, median, 0.33, xerr=spread, color=COLOURS[index], label=name, ecolor="#555555")
    axes.set_yticks([place + 0.17 for place in range(len(speeds))], [speed.setting for speed in speeds])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds for a batch: median and quartiles")
    axes.legend()
    save_figure(figure, path)


def _milliseconds(median: float, quartiles: tuple[float, float]) -> str:
    low, high = (1000 * value for value in quartiles)
    return f"{1000 * median:.2f} ({low:.2f} to {high:.2f})"


def _extra_header(speed: Speed) -> str:
    return "".join(
        f"{name:>22}" for name, found in (("GFLOPs", speed.flops), ("peak (MB)", speed.peak_bytes)) if found
    )


def _extra(speed: Speed) -> str:
    parts = []
    for found, unit in ((speed.flops, 1e9), (speed.peak_bytes, 1e6)):
        if found is not None:
            parts.append(f"{' → '.join(_short(value / unit) for value in found):>22}")
    return "".join(parts)


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
