"""What fine-tuning costs and brings: the default of this package against methods that train, in time and in data.

    python studies/fine_tuned.py --testbed ../shared/testbed --records studies/results/fine_tuned.jsonl

First, each method that trains is tried at several learning rates on three quarters of the first calibration lines, and
judged on the last quarter: that is where the rates of the recipes come from. Then all methods are compared on the
held-out lines, which no choice was made on. Seconds are those of the CPU (of one core, with OMP_NUM_THREADS=1), so
that other work on the machine counts little. Records that the file has are not measured again; without --testbed, the
tables are printed from the file as it is.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from records import RESULTS, Record, append_records, known_records
from testbed_tasks import Task, sentiment

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, timing
from hf_lossless_lr.baselines import Recipe, Recipes, compare, lpaf, svd_fine_tuned
from hf_lossless_lr.data import make_dataloader, mean_loss, subset
from hf_lossless_lr.layers import find_targets, in_place
from hf_lossless_lr.processes import make_accelerator
from hf_lossless_lr.report import MethodResult

METHODS = ("default", "svd", "svd-fine-tuned", "lpaf")
KEEP_RATIOS, LINES = (0.7, 0.5, 0.35), (1024, 4096)
RATES, CHOSEN_AT = {"svd-fine-tuned": (1e-5, 3e-5, 1e-4, 3e-4), "lpaf": (3e-5, 1e-4)}, 0.5
PARTS = ("choice", "statistics", "result")


def tuned(method: str, rate: float) -> Any:
    """Return a method at a learning rate, in all of its stages."""
    if method == "svd-fine-tuned":
        return partial(svd_fine_tuned, recipe=Recipe(learning_rate=rate))
    usual = Recipes()
    return partial(lpaf, recipes=Recipes(*(_at(each, rate) for each in (usual.pruning, usual.tuning))))


def _at(recipe: Recipe, rate: float) -> Recipe:
    return Recipe(**{**asdict(recipe), "learning_rate": rate})


def choices(task: Task, lines: int, known: list[Record]) -> Iterator[Record]:
    """Yield the loss of each method at each rate on calibration lines that it was not trained on."""
    data = make_dataloader(task.calibration, task.model, batch_size=16, processing_class=task.processing_class)
    trained, others = subset(data, range(3 * lines // 4)), subset(data, range(3 * lines // 4, lines))
    targets, accelerator = find_targets(task.model).chosen, make_accelerator()
    done = {(record["method"], record["rate"]) for record in known}
    dense = mean_loss(task.model, others, accelerator)
    for method, rates in RATES.items():
        for rate in rates:
            if (method, rate) not in done:
                layers = tuned(method, rate)(targets, CHOSEN_AT, model=task.model, data=trained)
                with in_place(task.model, layers):
                    increase = mean_loss(task.model, others, accelerator) - dense
                yield {"part": "choice", "method": method, "rate": rate, "lines": lines, "loss_increase": increase}


def statistics(task: Task) -> float:
    """Return the seconds of a calibration."""
    compressor = LowRankCompressor(LosslessLowRankConfig(rank_multiple=1))
    start = time.process_time()
    compressor.calibrate(
        task.model, task.calibration, eval_dataset=task.evaluation, processing_class=task.processing_class
    )
    seconds = time.process_time() - start
    compressor.release()
    return seconds


def by_length(data: Dataset) -> Dataset:
    """Return held-out lines with those of one length together, which are faster to judge on."""
    return data.select(sorted(range(len(data)), key=lambda n: len(data[n]["input_ids"])))


def results(task: Task, lines: int, arguments: argparse.Namespace, known: list[Record]) -> Iterator[Record]:
    """Yield what the methods cost on the held-out lines."""
    methods = [name for name in arguments.methods if name != "svd" or lines == LINES[0]]  # it takes no data
    found = [{k: v for k, v in record.items() if k not in ("part", "lines")} for record in known]
    for result in compare(
        task.model,
        task.calibration,
        methods=methods,
        keep_ratios=arguments.keep_ratios,
        eval_dataset=task.evaluation,
        processing_class=task.processing_class,
        known=[MethodResult.from_dict(values) for values in found],
        rank_multiple=1,
    ):
        yield {"part": "result", "lines": lines, **asdict(result)}


def tables(records: list[Record]) -> str:
    """Return what the rates were chosen by, and what the methods cost."""
    rows = ["| method | learning rate | loss increase on other calibration lines |", "|---" * 3 + "|"]
    tried = [record for record in records if record["part"] == "choice"]
    for each in sorted(tried, key=lambda record: (METHODS.index(record["method"]), record["rate"])):
        rows.append(f"| {each['method']} | {each['rate']:g} | {each['loss_increase']:+.4f} |")
    rows += [
        "",
        "| keep | method | labelled lines | time (s) | loss | accuracy (points) | verdict |",
        "|---" * 7 + "|",
    ]
    extra = {record["lines"]: record["seconds"] for record in records if record["part"] == "statistics"}
    found = [record for record in records if record["part"] == "result"]
    found.sort(key=lambda r: (-r["keep_ratio"], METHODS.index(r["method"]), r["lines"]))
    for each in found:
        seconds = each["seconds"] + (extra.get(each["lines"], math.nan) if each["method"] == "default" else 0.0)
        lines = f"{each['lines']:,}" if each["method"] != "svd" else "0"
        rows.append(
            f"| {each['keep_ratio']} | {each['method']} | {lines} | {seconds:.0f} | {each['loss_increase']:+.4f} | "
            f"{100 * each['accuracy_change']:+.2f} | {each['status']} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the trained models and their data")
    parser.add_argument("--records", type=Path, default=RESULTS / "fine_tuned.jsonl")
    parser.add_argument("--lines", type=int, nargs="+", default=LINES, help="numbers of calibration lines")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=KEEP_RATIOS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    records = known_records(arguments.records)

    def add(record: Record) -> None:
        records.append(record)
        append_records(arguments.records, [record])

    def known(part: str, lines: int) -> list[Record]:
        return [record for record in records if record["part"] == part and record["lines"] == lines]

    timing.time = SimpleNamespace(perf_counter=time.process_time)  # clocks count the CPU's seconds
    for lines in arguments.lines if arguments.testbed else ():
        task = sentiment(arguments.testbed, lines)
        task.evaluation = by_length(task.evaluation)
        if "choice" in arguments.parts and lines == LINES[0]:
            for record in choices(task, lines, known("choice", lines)):
                add(record)
        if "statistics" in arguments.parts and not known("statistics", lines):
            add({"part": "statistics", "lines": lines, "seconds": statistics(task)})
        if "result" in arguments.parts:
            for record in results(task, lines, arguments, known("result", lines)):
                add(record)
    print(tables(records))


if __name__ == "__main__":
    main()
