"""Time the calibration pass against the same forward and backward pass without it, in turn on the same batches.

    python examples/benchmark_statistics.py --model MODEL --data FOLDER --json FILE

FOLDER holds `calibration.jsonl` with `{"sentence": ..., "label": ...}` lines.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from hf_lossless_lr.batches import make_dataloader
from hf_lossless_lr.statistics import collect_statistics
from hf_lossless_lr.targets import find_targets


def plain_pass(model, loader) -> None:
    for batch in loader:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32)
    data = Dataset.from_json(str(arguments.data / "calibration.jsonl")).select(range(arguments.examples))
    data = data.map(lambda x: tokenizer(x["sentence"], truncation=True, max_length=128), batched=True)
    loader = make_dataloader(data, model, batch_size=32, processing_class=tokenizer)
    targets, accelerator = find_targets(model).targets, Accelerator()
    plain_pass(model, loader)  # warm-up
    times = {"plain": [], "statistics": []}
    for _ in range(arguments.repeats):
        times["plain"].append(timed(plain_pass, model, loader))
        times["statistics"].append(timed(collect_statistics, model, targets, loader, accelerator))
    ratios = [s / p for s, p in zip(times["statistics"], times["plain"], strict=True)]
    result = {name: median(taken) for name, taken in times.items()} | {"ratio": median(ratios), "ratios": ratios}
    print(
        f"forward+backward {result['plain']:.2f} s, with statistics {result['statistics']:.2f} s, "
        f"ratio {result['ratio']:.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
