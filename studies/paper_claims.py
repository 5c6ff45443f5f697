"""The paper's analysis on the testbed: first-order and second-order terms against measured changes of the loss.

    python studies/paper_claims.py --testbed ../shared/testbed --records studies/results/paper_claims.jsonl
    python studies/paper_claims.py

One layer at a time is replaced by its truncated SVD, as in the paper, at several ranks. Recorded are the largest
element of the noise, the two terms as the calibration data predict them, and the change of the loss on the calibration
data and on held-out data. Without --testbed, the tables are printed from the file as it is.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import RESULTS, Record, append_records, known_records
from testbed_tasks import Task, language, sentiment

from hf_lossless_lr.data import mean_loss, split_data
from hf_lossless_lr.factors import factorize, loss_curve
from hf_lossless_lr.layers import break_even_rank, find_targets, layout_of, weight_matrices
from hf_lossless_lr.processes import make_accelerator
from hf_lossless_lr.statistics import collect_statistics

BATCH = 8  # of the small Llama's data
SHARES = (1.0, 0.5, 0.25)  # of the largest rank that saves parameters, in two factors
# Model: loader, the blocks whose layers are replaced, and the examples of each part.
TASKS: dict[str, tuple[Callable[[Path], Task], tuple[str, ...], int]] = {
    "minilm-sst2": (sentiment, (".layer.0.", ".layer.5."), 512),
    "llama-small": (language, (".layers.0.", ".layers.5."), 128),
}


def first(data: Any, count: int) -> Any:
    """Return the first examples, or those of the first ready-made batches."""
    return data.select(range(min(count, len(data)))) if hasattr(data, "select") else data[: count // BATCH]


def measure(name: str, task: Task, blocks: tuple[str, ...], examples: int) -> Iterator[Record]:
    parts = split_data(
        task.model,
        first(task.calibration, examples),
        first(task.evaluation, examples),
        batch_size=32,
        seed=0,
        selection_fraction=0.0,
        processing_class=task.processing_class,
    )
    accelerator, model = make_accelerator(), task.model.eval()
    targets = {n: m for n, m in find_targets(model).chosen.items() if any(block in n for block in blocks)}
    statistics = collect_statistics(model, targets, parts.calibration, accelerator, weight_grads=True)
    dense = {"calibration": statistics.loss, "held_out": mean_loss(model, parts.held_out, accelerator)}
    loaders = {"calibration": parts.calibration, "held_out": parts.held_out}
    for layer, module in targets.items():
        weight: Any = module.weight
        matrix, original = weight_matrices(module).detach().double().clone(), weight.detach().clone()
        factors = factorize(matrix, statistics.layers[layer], "identity", 0.0)
        curve: Any = loss_curve(matrix, factors, statistics.layers[layer], "two-factor", with_noise=True)
        largest = break_even_rank(*matrix.shape[1:], "two-factor")
        for rank in dict.fromkeys(max(1, int(share * largest)) for share in SHARES):
            with torch.no_grad():
                layout_of(module).matrices(module, weight).copy_(factors.weight(rank))
            changes = {part: mean_loss(model, loader, accelerator) - dense[part] for part, loader in loaders.items()}
            with torch.no_grad():
                weight.copy_(original)
            terms = {"first": float(curve.first_order[rank]), "second": float(curve.second_order[rank])}
            yield {
                "model": name,
                "layer": layer,
                "rank": rank,
                "noise": float(curve.max_noise[rank]),
                **terms,
                **changes,
            }


TERMS = ("first", "second", "calibration", "held_out")
BY_NOISE = "| model | largest element of the noise | cases | first-order | second-order | calibration | held out |"
BY_SIGN = "| model | first-order | cases | falls, calibration | falls, held out | mean, calibration | mean, held out |"


def tables(records: list[Record]) -> str:
    """Return both tables: the terms by the size of the noise, and what the sign of the first-order term says."""
    models = list(dict.fromkeys(record["model"] for record in records))
    by_noise, by_sign = [BY_NOISE, "|---" * 7 + "|"], [BY_SIGN, "|---" * 7 + "|"]
    for model in models:
        found = [record for record in records if record["model"] == model]
        for low, high in pairwise(np.quantile([record["noise"] for record in found], (0, 1 / 3, 2 / 3, 1))):
            part = [record for record in found if low <= record["noise"] <= high]
            sizes = [f"{np.median([abs(record[term]) for record in part]):.5f}" for term in TERMS]
            by_noise.append(f"| {model} | {low:.3f} to {high:.3f} | {len(part)} | {' | '.join(sizes)} |")
        for negative, said in ((True, "negative"), (False, "positive")):
            part = [record for record in found if (record["first"] < 0) is negative]
            falls = [f"{np.mean([record[term] < 0 for record in part]):.0%}" for term in TERMS[2:]]
            means = [f"{np.mean([record[term] for record in part]):+.5f}" for term in TERMS[2:]]
            by_sign.append(f"| {model} | {said} | {len(part)} | {' | '.join(falls + means)} |")
    return "\n".join([*by_noise, "", *by_sign])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the trained models and their data")
    parser.add_argument("--records", type=Path, default=RESULTS / "paper_claims.jsonl")
    arguments = parser.parse_args()
    records = known_records(arguments.records)
    done = {record["model"] for record in records}
    for name, (load, blocks, examples) in TASKS.items() if arguments.testbed else ():
        if name not in done:
            found = list(measure(name, load(arguments.testbed), blocks, examples))
            append_records(arguments.records, found)
            records += found
    print(tables(records))


if __name__ == "__main__":
    main()
