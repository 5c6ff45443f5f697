"""Time each stage of a compression against plain passes over the same calibration data, in one run.

    python studies/benchmark_time.py --model MODEL --data FOLDER --records studies/results/benchmark_time.jsonl

FOLDER holds `calibration.jsonl` with `{"sentence": ..., "label": ...}` lines.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from records import write_records
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.data import DataSplits, make_dataloader
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.pipeline.calibration import calibrate
from hf_lossless_lr.pipeline.trial import run_trial
from hf_lossless_lr.ranks import select_budget
from hf_lossless_lr.timing import Clock


def plain_pass(model, loader, backward: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        for batch in loader:
            loss = model(**batch).loss
            if backward:
                loss.backward()
                model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32).eval()
    data = Dataset.from_json(str(arguments.data / "calibration.jsonl")).select(range(arguments.examples))
    data = data.map(lambda x: tokenizer(x["sentence"], truncation=True, max_length=128), batched=True)
    loader = make_dataloader(data, model, batch_size=32, processing_class=tokenizer)
    config, targets = LosslessLowRankConfig(keep_ratio=0.5, rank_multiple=1), find_targets(model)
    plain_pass(model, loader, backward=True)  # warm-up
    measured = ("statistics", "factorization", "refit", "refit_forward", "refit_products", "refit_solves")
    times: dict[str, list[float]] = {name: [] for name in ("forward", "forward+backward", *measured)}
    for _ in range(arguments.repeats):
        times["forward"].append(plain_pass(model, loader, backward=False))
        times["forward+backward"].append(plain_pass(model, loader, backward=True))
        calibration = calibrate(model, config, DataSplits(loader, None, loader, {}), targets)
        clock = Clock(calibration.seconds)
        run_trial(calibration, select_budget(calibration.factors.curves, 0.5), config, clock)
        for name in measured:
            times[name].append(clock.seconds[name])
    seconds = {name: median(taken) for name, taken in times.items()}
    ratios = {
        "statistics / forward+backward": seconds["statistics"] / seconds["forward+backward"],
        "refit without its solves / forward": (seconds["refit"] - seconds["refit_solves"]) / seconds["forward"],
        "refit / forward": seconds["refit"] / seconds["forward"],
        "(statistics + refit) / forward+backward": (seconds["statistics"] + seconds["refit"])
        / seconds["forward+backward"],
    }
    for name, value in {**seconds, **ratios}.items():
        print(f"{name:42}{value:8.2f}")
    if arguments.records:
        records = [{"stage": name, "seconds": value} for name, value in seconds.items()]
        write_records(arguments.records, records + [{"stage": name, "ratio": value} for name, value in ratios.items()])


if __name__ == "__main__":
    main()
