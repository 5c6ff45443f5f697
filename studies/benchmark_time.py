"""Time each stage of a compression against plain passes over the same calibration data, in one run.

    python studies/benchmark_time.py --testbed FOLDER --records studies/results/benchmark_time.jsonl

For the sentiment model of the testbed, on 512 of its calibration lines, and the convolutional networks, on 1,024
pictures (`--models cnn-densenet` needs timm). Rounds of all stages follow one another; what is printed and written are
the medians.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from convolutional_networks import CALIBRATION, NETWORKS, testbed_pictures
from records import Record, write_records
from testbed_tasks import sentiment
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.data import DataSplits, make_dataloader
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.pipeline.calibration import calibrate
from hf_lossless_lr.pipeline.trial import run_trial
from hf_lossless_lr.ranks import select_budget
from hf_lossless_lr.timing import Clock

STAGES = ("statistics", "factorization", "refit", "refit_forward", "refit_products", "refit_solves")
SENTIMENT = "minilm-sst2"
MODELS = (SENTIMENT, *(name for name in NETWORKS if name != "cnn-densenet"))


def plain_pass(model: PreTrainedModel, loader: DataLoader, backward: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        for batch in loader:
            loss = model(**batch).loss
            if backward:
                loss.backward()
                model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def task(name: str, testbed: Path, examples: int | None) -> tuple[PreTrainedModel, DataLoader]:
    """Return a model and its calibration data."""
    if name == SENTIMENT:
        found = sentiment(testbed, examples or 512)
        options = {"batch_size": 32, "processing_class": found.processing_class}
        return found.model.eval(), make_dataloader(found.calibration, found.model, **options)
    pictures = testbed_pictures(testbed, testbed / name)
    model = pictures.load()
    return model, make_dataloader(Subset(pictures.train, range(examples or CALIBRATION)), model, batch_size=32)


def timed_stages(model: PreTrainedModel, loader: DataLoader, repeats: int) -> dict[str, float]:
    """Return the median seconds of each stage."""
    config, targets = LosslessLowRankConfig(keep_ratio=0.5, rank_multiple=1), find_targets(model)
    plain_pass(model, loader, backward=True)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in ("forward", "forward+backward", *STAGES)}
    for _ in range(repeats):
        times["forward"].append(plain_pass(model, loader, backward=False))
        times["forward+backward"].append(plain_pass(model, loader, backward=True))
        calibration = calibrate(model, config, DataSplits(loader, None, loader, {}), targets)
        clock = Clock(calibration.seconds)
        run_trial(calibration, select_budget(calibration.factors.curves, 0.5), config, clock)
        for name in STAGES:
            times[name].append(clock.seconds[name])
    return {name: median(taken) for name, taken in times.items()}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    both, refit = seconds["forward+backward"], seconds["refit"]
    return {
        "statistics / forward+backward": seconds["statistics"] / both,
        "refit without its solves / forward": (refit - seconds["refit_solves"]) / seconds["forward"],
        "refit / forward": refit / seconds["forward"],
        "(statistics + refit) / forward+backward": (seconds["statistics"] + refit) / both,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True, help="folder of the testbed")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=[SENTIMENT, *NETWORKS])
    parser.add_argument("--examples", type=int, help="calibration examples; default 512 lines, or 1,024 pictures")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    records: list[Record] = []
    for name in arguments.models:
        seconds = timed_stages(*task(name, arguments.testbed, arguments.examples), arguments.repeats)
        found = ratios(seconds)
        print(name, *(f"{stage:42}{value:8.2f}" for stage, value in {**seconds, **found}.items()), sep="\n    ")
        records += [{"model": name, "stage": stage, "seconds": value} for stage, value in seconds.items()]
        records += [{"model": name, "stage": stage, "ratio": value} for stage, value in found.items()]
        if arguments.records:
            write_records(arguments.records, records)


if __name__ == "__main__":
    main()
