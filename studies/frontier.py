"""Compare sizes in bytes: dense weights in int8, int4 and int3, low rank in float, and low rank with number formats.

    python studies/frontier.py --testbed FOLDER --records studies/results/frontier.jsonl --plots docs
    python studies/frontier.py --plots docs

All methods of a model share the statistics and the held-out data; choices are made on calibration data alone. Records
that the file has already are not measured again; without --testbed, tables and plots are made from the file as it is.

* `RTN`: each number to the nearest of its grid, which spans the range of its group.
* `GPTQ`: the grid with the least error, columns rounded one by one, the error of each made up for by the others.
* `low rank`, with the formats that it may choose from: ranks and formats over the whole model, then the refit.
* `rounding`: what rounding alone costs (divergence from the same layers in float), and what was predicted.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from records import RESULTS, Record, append_records, known_records, read_records
from testbed_tasks import Task, digits, language, sentiment
from torch import nn
from transformers.utils import logging

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.data import split_data
from hf_lossless_lr.errors import CertificateError
from hf_lossless_lr.factors import damped, round_dense
from hf_lossless_lr.formats import FORMATS, NumberFormat, search_grid
from hf_lossless_lr.layers import as_matrix, find_targets, in_place, weight_matrices
from hf_lossless_lr.pipeline.budget import budget_of
from hf_lossless_lr.pipeline.building import build_layers
from hf_lossless_lr.pipeline.calibration import Calibration, calibrate
from hf_lossless_lr.pipeline.choosing import choose
from hf_lossless_lr.ranks import Choice, select_budget
from hf_lossless_lr.timing import Clock
from hf_lossless_lr.verdict import certify, paired_outcomes

INT2 = NumberFormat(bits=2, group=64, symmetric=False, pivots=False)  # for comparison alone
OFFERED = {name: FORMATS[name] for name in ("int8", "int4", "int3")}  # by tools for dense weights
SHARES = (0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.065, 0.05)  # of the bytes of the weights in 32 bits
TARGETS = tuple(1e6 * size / 42_467_328 for size in (10.7, 6.0, 4.7, 3.4, 2.4))  # megabytes of minilm-sst2
MIXED = "low rank, mixed formats"
PATHS = {
    "low rank in float": (["float"], (0.5, 0.35)),
    "low rank in int8": (["int8"], (0.125, 0.0875)),
    "low rank in int4": (["int4"], (0.07, 0.05)),
}
# Model: loader, shares to ask the path over all formats for; without any, the rounding alone is looked at.
TASKS: dict[str, tuple[Callable[[Path], Task], tuple[float, ...]]] = {
    "minilm-sst2": (sentiment, tuple(sorted((*TARGETS, 0.25, 0.2, 0.17, 0.05), reverse=True))),
    "llama-small": (language, SHARES),
    "swin-mnist": (digits, ()),
}
ROUNDED_RANKS = (0.5,)  # kept parameters of the factors that are rounded


def calibrated(task: Task, config: LosslessLowRankConfig, statistics: Path) -> Calibration:
    parts = split_data(
        task.model,
        task.calibration,
        task.evaluation,
        batch_size=config.batch_size,
        seed=config.seed,
        selection_fraction=config.selection_fraction,
        fewest_selected=config.fewest_selected,
        processing_class=task.processing_class,
    )
    return calibrate(task.model, config, parts, find_targets(task.model), statistics)


def figures(calibration: Calibration, layers: dict[str, nn.Module]) -> Record:
    """Return the loss increase, the divergence and the verdict on the held-out data."""
    data, accelerator = calibration.parts.held_out, calibration.accelerator
    outcomes = paired_outcomes(calibration.dense.model, layers, data, accelerator, temperatures=True)
    dense, compressed = outcomes.mean_loss
    try:
        verdict = certify(outcomes, 0.01, 0.01, 0.95, calibration.parts.fingerprints["held_out"]).status
    except CertificateError:
        verdict = "none"
    return {"loss_increase": compressed - dense, "divergence": outcomes.mean_divergence, "verdict": verdict}


@torch.no_grad()
def dense_layers(calibration: Calibration, kind: NumberFormat, compensated: bool) -> dict[str, nn.Module]:
    """Return all targets, dense and rounded."""
    layers = {}
    for name, module in calibration.factors.targets.chosen.items():
        layers[name] = layer = deepcopy(module)
        matrix = weight_matrices(module)[0]
        hessian = damped(calibration.statistics.layers[name].input_covariance, 0.03)[0]
        if compensated:
            rounded = round_dense(matrix, hessian, kind)[0]
        else:
            grid = search_grid(matrix, torch.ones(matrix.shape[1]), kind, shrinks=[1.0])
            rounded = grid.columns(matrix.shape[1]).nearest(matrix)
        as_matrix(layer, layer.weight).copy_(rounded)
    return layers


def dense_records(name: str, calibration: Calibration, known: set[Any]) -> Iterator[Record]:
    weights = [weight_matrices(module)[0] for module in calibration.factors.targets.chosen.values()]
    for label, kind in {**OFFERED, "int2": INT2}.items():
        for method in ("RTN", "GPTQ") if kind is not INT2 else ("GPTQ",):
            if (name, f"{method} {label}", None) not in known:
                size = sum(kind.stored_bytes(*weight.shape) for weight in weights)
                found = figures(calibration, dense_layers(calibration, kind, method == "GPTQ"))
                yield {"method": f"{method} {label}", "asked": None, "bytes": size, **found}


def path_records(name: str, calibration: Calibration, shares: Any, known: set[Any]) -> Iterator[Record]:
    for method, (formats, asked) in ({MIXED: (["auto"], shares), **PATHS} if shares else {}).items():
        config = LosslessLowRankConfig(formats=formats, size="bytes")
        curves = {
            target: replace(curve, rounding={kind: curve.rounding[kind] for kind in config.formats})
            for target, curve in calibration.factors.curves.items()
        }
        own = replace(calibration, factors=replace(calibration.factors, curves=curves))
        budget = budget_of(own, config)
        for ratio in asked:
            if (name, method, ratio) in known:
                continue
            trial, visited, _ = choose(own, replace(config, keep_ratio=ratio), budget, Clock())
            size = sum(budget.sizes[target].of(choice) for target, choice in trial.choices.items())
            found = {"refitted": trial.refitted, "predicted": visited[0].predicted_loss_increase}
            yield {"method": method, "asked": ratio, "bytes": round(size), **found, **figures(own, trial.layers)}


def rounding_records(name: str, calibration: Calibration, known: set[Any]) -> Iterator[Record]:
    config, factors = LosslessLowRankConfig(formats=["auto"], storage="two-factor"), calibration.factors
    in_float = {target: replace(curve, rounding={"float": None}) for target, curve in factors.curves.items()}
    starts = {"dense": dict.fromkeys(factors.curves, Choice())}
    starts |= {f"keep {keep}": select_budget(in_float, keep) for keep in ROUNDED_RANKS}
    for start, choices in starts.items():
        plain = build_layers(calibration, choices, config)
        for number_format in OFFERED:
            if (name, f"rounding to {number_format}", start) in known:
                continue
            rounded = {target: Choice(choice.rank, number_format) for target, choice in choices.items()}
            layers = build_layers(calibration, rounded, config)
            costs = [factors.curves[target].rounding[number_format].at(c.rank) for target, c in rounded.items()]
            model, data = calibration.dense.model, calibration.parts.held_out
            with in_place(model, plain):
                outcomes = paired_outcomes(model, layers, data, calibration.accelerator)
            yield {
                "method": f"rounding to {number_format}",
                "asked": start,
                "predicted": sum(costs),
                "divergence": outcomes.mean_divergence,
            }


def measure(name: str, task: Task, shares: Any, known: set[Any], folder: Path) -> Iterator[Record]:
    """Yield a record for each method and size that is not known."""
    config = LosslessLowRankConfig(formats=["auto"])
    calibration = calibrated(task, config, folder / f"{name}.safetensors")
    weights = [weight_matrices(module) for module in calibration.factors.targets.chosen.values()]
    whole = sum(weight.numel() * weight.itemsize for weight in weights)
    yield from (
        {"model": name, "dense_bytes": whole, **record}
        for records in (
            dense_records(name, calibration, known) if shares else (),
            path_records(name, calibration, shares, known),
            rounding_records(name, calibration, known),
        )
        for record in records
    )


def table(records: list[Record]) -> str:
    lines = ["| method | MB | of float32 | loss increase | KL divergence | verdict |", "|---|---:|---:|---:|---:|---|"]
    for record in sorted((r for r in records if "bytes" in r), key=lambda r: -r["bytes"]):
        size, share = record["bytes"] / 1e6, 100 * record["bytes"] / record["dense_bytes"]
        found = f"{record['loss_increase']:+.4f} | {record['divergence']:.5f} | {record['verdict']}"
        lines.append(f"| {record['method']} | {size:.2f} | {share:.1f} % | {found} |")
    return "\n".join(lines)


STYLES = {  # to the beginning of a method: colour and marker
    "RTN": ("#9a9a9a", "s"),
    "GPTQ": ("#c0504d", "^"),
    "low rank in float": ("#b08a4f", "D"),
    "low rank in int8": ("#7fa8d8", "v"),
    "low rank in int4": ("#6a9a58", "P"),
    MIXED: ("#1f5fa8", "o"),
}


def draw_sizes(records: list[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(record["model"] for record in records if "bytes" in record))
    size = (4.3 * len(models), 6.6)
    figure, rows = plt.subplots(2, len(models), figsize=size, constrained_layout=True, squeeze=False)
    for model, column in zip(models, rows.T, strict=True):
        found = [record for record in records if record["model"] == model and "bytes" in record]
        for axes, value in zip(column, ("divergence", "loss_increase"), strict=True):
            for begin, (color, marker) in STYLES.items():
                points = sorted((r for r in found if r["method"].startswith(begin)), key=lambda r: r["bytes"])
                xs, ys = [r["bytes"] / 1e6 for r in points], [r[value] for r in points]
                axes.plot(xs, ys, "-", color=color, lw=1.2, zorder=2)
                for x, y, record in zip(xs, ys, points, strict=True):
                    face = color if record["verdict"] in ("lossless", "improved") else "white"
                    axes.plot(x, y, marker, ms=6, color=color, mfc=face, zorder=3)
                axes.plot([], [], f"{marker}-", color=color, mfc="white", label=begin)
            axes.set_xscale("log")
            axes.set_xticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
            axes.xaxis.set_minor_locator(plt.NullLocator())
            low, high = min(r["bytes"] for r in found) / 1e6, max(r["bytes"] for r in found) / 1e6
            axes.set_xlim(0.9 * low, 1.1 * high)
            axes.set_xlabel("megabytes of the targeted weights")
            axes.spines[["top", "right"]].set_visible(False)
        column[0].set_yscale("log")
        column[0].set_title(model, fontsize=10)
        column[1].set_yscale("symlog", linthresh=0.01)
    rows[0, 0].set_ylabel("KL divergence from the dense model (nats)")
    rows[1, 0].set_ylabel("loss increase (nats)")
    rows[0, -1].legend(fontsize=8, frameon=False, title="filled: certified as lossless", title_fontsize=8)
    figure.savefig(path, dpi=110)


def draw_rounding(records: list[Record], path: Path) -> None:
    import matplotlib.pyplot as plt

    found = [record for record in records if record["method"].startswith("rounding")]
    figure, axes = plt.subplots(figsize=(5.4, 4.6), constrained_layout=True)
    for model, color in zip(dict.fromkeys(r["model"] for r in found), ("#1f5fa8", "#c0504d", "#6a9a58"), strict=False):
        for start, marker in zip(dict.fromkeys(r["asked"] for r in found), ("o", "^", "v"), strict=False):
            points = [r for r in found if (r["model"], r["asked"]) == (model, start)]
            xs, ys = [r["predicted"] for r in points], [r["divergence"] for r in points]
            axes.plot(xs, ys, marker, color=color, ms=6, label=f"{model}, {start}")
    low, high = min(r["predicted"] for r in found) / 2, max(r["predicted"] for r in found) * 2
    axes.plot([low, high], [low, high], "-", color="black", lw=1)
    axes.fill_between([low, high], [low / 2, high / 2], [2 * low, 2 * high], color="black", alpha=0.07, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="predicted cost of the rounding (nats)")
    axes.set_ylabel("measured: divergence from the same layers in float (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the models and data; without it nothing is measured")
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--records", type=Path, default=RESULTS / "frontier.jsonl")
    parser.add_argument("--plots", type=Path, help="folder for sizes.png and rounding.png")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    records = known_records(arguments.records)
    if arguments.testbed is not None:
        known = {(record["model"], record["method"], record["asked"]) for record in records}
        with tempfile.TemporaryDirectory() as folder:
            for name in arguments.models:
                load, shares = TASKS[name]
                for record in measure(name, load(arguments.testbed), shares, known, Path(folder)):
                    append_records(arguments.records, [record])
                    print(record, flush=True)
        records = read_records(arguments.records)
    for name in dict.fromkeys(record["model"] for record in records if "bytes" in record):
        print(f"\n{name}\n\n{table([record for record in records if record['model'] == name])}")
    if arguments.plots is not None:
        draw_sizes(records, arguments.plots / "sizes.png")
        draw_rounding(records, arguments.plots / "rounding.png")


if __name__ == "__main__":
    main()
