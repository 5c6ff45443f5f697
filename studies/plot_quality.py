"""Plot kept size against loss increase, from the records of `compare_methods.py`; certified points are filled.

python studies/plot_quality.py --output docs/quality.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from records import RESULTS, Record, read_records

from hf_lossless_lr.report import CERTIFIED

MARGIN = 0.01  # nats; the axis is linear up to here and logarithmic above
MODEL = "minilm-sst2"
METHODS = {  # to the name in the plot, colour and marker, the best last
    "svd": ("SVD", "#9a9a9a", "s"),
    "fwsvd": ("FWSVD", "#b08a4f", "D"),
    "svd-llm": ("activation-whitened (SVD-LLM)", "#c0504d", "^"),
    "no-refit": ("hf-lossless-lr without refit", "#7fa8d8", "o"),
    "default": ("hf-lossless-lr, the default", "#1f5fa8", "o"),
}


def draw(records: list[Record], path: Path) -> None:
    found = [record for record in records if record["model"] == MODEL]
    figure, axes = plt.subplots(figsize=(7.6, 4.2), constrained_layout=True)
    axes.axhspan(-0.0015, MARGIN, color="#1f5fa8", alpha=0.08, lw=0)
    axes.text(0.985, MARGIN * 0.95, "margin: 0.01 nats", fontsize=8, va="top", color="#1f5fa8")
    axes.axhline(0, color="black", lw=1.2)
    axes.plot(1, 0, "o", color="black", ms=7.5, clip_on=False, zorder=3)
    axes.text(0.985, 0.0004, "the dense model", fontsize=8, va="bottom")
    for method, (label, color, marker) in METHODS.items():
        points = sorted((r for r in found if r["method"] == method), key=lambda r: -r["parameters"])
        kept, increase = ([point[name] for point in points] for name in ("parameters", "loss_increase"))
        axes.plot(kept, increase, "-", color=color, lw=1.5, zorder=2)
        for x, y, point in zip(kept, increase, points, strict=True):
            face = color if point["status"] in CERTIFIED else "white"
            axes.plot(x, y, marker, ms=7.5, color=color, mfc=face, mew=1.5, zorder=3, clip_on=False)
        axes.plot([], [], f"{marker}-", color=color, mfc="white", mew=1.5, ms=6, label=label)
    axes.plot([], [], "o", color="black", ms=6, label="filled: certified as lossless")
    axes.set_yscale("symlog", linthresh=MARGIN, linscale=1.4)
    axes.set_yticks([0, 0.005, 0.01, 0.03, 0.1, 0.3], ["0", "0.005", "0.01", "0.03", "0.1", "0.3"])
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_ylim(-0.0015, 0.6)
    axes.set_xlim(1.02, 0.31)
    axes.set_xticks([1, 0.7, 0.5, 0.35], ["100 %", "70 %", "50 %", "35 %"])
    axes.set_xlabel("parameters kept of the targeted weights")
    axes.set_ylabel("loss increase (nats)")
    axes.set_title("MiniLM-L6 on SST-2: 1,024 calibration examples, 3,000 others held out", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper left", frameon=False, bbox_to_anchor=(0.0, 0.98))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RESULTS / "compare_methods.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="file of the plot")
    arguments = parser.parse_args()
    draw(read_records(arguments.records), arguments.output)


if __name__ == "__main__":
    main()
