"""What a refit is worth where there are few calibration examples: the default against no refit, averaged over seeds.

    python studies/few_examples.py --testbed ../shared/testbed --records studies/results/few_examples.jsonl

Each seed draws other calibration examples; the held-out examples are the same.
"""

import argparse
import random
from pathlib import Path

from records import Record, append_records, known_records
from testbed_tasks import Task, sentiment

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor

SIZES, SEEDS, KEEP_RATIOS = (12, 24, 48), range(4), (0.7, 0.5)


def measure(task: Task, examples: int, seed: int, refit: bool, held_out: int) -> list[Record]:
    """Return the figures at each ratio; the model is dense again afterwards."""
    drawn = random.Random(seed).sample(range(len(task.calibration)), examples)
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=refit, rank_multiple=1))
    compressor.calibrate(
        task.model,
        task.calibration.select(drawn),
        eval_dataset=task.evaluation.select(range(held_out)),
        processing_class=task.processing_class,
    )
    records = []
    for keep in KEEP_RATIOS:
        compressor.compress_to(keep)
        report = compressor.report
        figures = {
            "refitted": report.refitted,
            "loss_increase": report.compressed.loss - report.dense.loss,
            "divergence": report.certificate.divergence if report.certificate else None,
        }
        records.append({"examples": examples, "seed": seed, "keep": keep, "refit": refit, **figures})
    compressor.restore()
    return records


def table(records: list[Record]) -> str:
    """Return the mean loss increase over the seeds, and how many of the refits were made."""
    lines = ["| examples | keep | without refit | default | refits made |", "|---" * 5 + "|"]
    keys = dict.fromkeys((record["examples"], record["keep"]) for record in records)
    for examples, keep in keys:
        found = [record for record in records if (record["examples"], record["keep"]) == (examples, keep)]
        means = []
        for refit in (False, True):
            increases = [record["loss_increase"] for record in found if record["refit"] is refit]
            means.append(f"{sum(increases) / len(increases):+.4f}")
        made = [record["refitted"] for record in found if record["refit"]]
        lines.append(f"| {examples} | {keep} | {means[0]} | {means[1]} | {sum(made)} of {len(made)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the trained models and their data")
    parser.add_argument("--records", type=Path, required=True, help="file of the figures, read and continued")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of calibration examples")
    parser.add_argument("--held-out", type=int, default=1000, help="number of held-out examples")
    arguments = parser.parse_args()
    records = known_records(arguments.records)
    done = {(record["examples"], record["seed"], record["refit"]) for record in records}
    task = sentiment(arguments.testbed, 4096) if arguments.testbed else None
    wanted = [(size, seed, refit) for size in arguments.sizes for seed in SEEDS for refit in (False, True)]
    for key in wanted if task is not None else ():
        if key not in done:
            found = measure(task, *key, arguments.held_out)
            append_records(arguments.records, found)
            records += found
    print(table(records))


if __name__ == "__main__":
    main()
