"""Compare methods at several sizes on the testbed's models: one run, the same statistics and evaluation for all.

    python studies/benchmark_quality.py --testbed FOLDER --records studies/results/benchmark_quality.jsonl

Prints the loss increase over the dense model on held-out data, the change of the accuracy in points, and the verdict.
Methods that the file has already are not measured again, so a run goes on where the file ends; without --testbed, the
tables are printed from the file as it is.
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from records import Record, append_records, read_records
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor

DENSE = "dense"
METHODS: dict[str, dict[str, Any]] = {
    "SVD, uniform, two-factor": {"metric": "identity", "objective": "uniform", "storage": "two-factor"},
    "FWSVD, uniform, two-factor": {"metric": "fisher", "objective": "uniform", "storage": "two-factor"},
    "ASVD, uniform, two-factor": {"metric": "activation-diagonal", "objective": "uniform", "storage": "two-factor"},
    "activation-whitened, uniform, two-factor": {
        "metric": "activation",
        "objective": "uniform",
        "storage": "two-factor",
    },
    "Kronecker, uniform, two-factor": {"objective": "uniform", "storage": "two-factor", "refit": False},
    "Kronecker, global ranks": {"refit": False},
    "Kronecker, global ranks, refit": {},
}


@dataclass
class Task:
    """A model with its calibration and evaluation data, as `compress` takes them."""

    model: PreTrainedModel
    calibration: Any
    evaluation: Any
    processing_class: Any = None


def sentiment(testbed: Path, examples: int = 1024) -> Task:
    folder = testbed / "minilm-sst2"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load(name: str) -> Dataset:
        data = Dataset.from_json(str(testbed / "data" / "sst2" / f"{name}.jsonl"))
        return data.map(lambda x: tokenizer(x["sentence"], truncation=True, max_length=128), batched=True)

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return Task(model, load("calibration").select(range(examples)), load("validation"), tokenizer)


def language(testbed: Path) -> Task:
    folder = testbed / "llama-small"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def blocks(name: str, count: int) -> list[dict[str, torch.Tensor]]:
        text = (testbed / "data" / f"wikitext2_{name}.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: count * 128]).view(count, 128)
        return [{"input_ids": part, "labels": part} for part in ids.split(8)]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Task(model, blocks("valid", 256), blocks("test", 600))


def digits(testbed: Path) -> Task:
    folder = testbed / "data" / "mnist"
    pixels = np.frombuffer(gzip.decompress((folder / "images.idx.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "labels.idx.gz").read_bytes()), np.uint8, offset=8)
    order = json.loads((folder / "permutation.json").read_text())
    images = (torch.tensor(pixels.reshape(-1, 1, 28, 28) / 255).float() - 0.13) / 0.31
    images = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-0.42)
    targets = torch.tensor(labels.astype(np.int64))

    def batches(indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [{"pixel_values": images[part], "labels": targets[part]} for part in torch.tensor(indices).split(32)]

    model = AutoModelForImageClassification.from_pretrained(testbed / "swin-mnist", dtype=torch.float32)
    return Task(model, batches(order[:1024]), batches(order[-3000:]))


CLOSEST = [name for name in METHODS if name.startswith(("SVD", "activation")) or "global" in name]

# Model: loader, ratios, methods. A larger ratio comes first: the certificate set is read in that order.
TASKS: dict[str, tuple[Callable[[Path], Task], tuple[float, ...], list[str]]] = {
    "minilm-sst2": (sentiment, (0.7, 0.5, 0.35), list(METHODS)),
    "minilm-sst2, all 4,096 calibration lines": (
        partial(sentiment, examples=4096),
        (0.7, 0.5, 0.35),
        [name for name in METHODS if "global" in name],
    ),
    "llama-small": (language, (0.7, 0.5), CLOSEST),
    "swin-mnist": (digits, (0.5, 0.35, 0.2, 0.1), CLOSEST),
}


def measure(task: Task, name: str, method: str, keep_ratios: tuple[float, ...], statistics: Path) -> list[Record]:
    """Return the figures of the dense model and of a method at each ratio; the first one collects the statistics."""
    compressor = LowRankCompressor(LosslessLowRankConfig(selection_fraction=0.125, rank_multiple=1, **METHODS[method]))
    compressor.calibrate(
        task.model,
        task.calibration,
        eval_dataset=task.evaluation,
        processing_class=task.processing_class,
        statistics_path=statistics,
    )
    found: list[Record] = []
    for keep in keep_ratios:
        compressor.compress_to(keep)
        report = compressor.report
        if not found:
            dense = {"loss": report.dense.loss, "accuracy": report.dense.accuracy}
            found.append({"model": name, "method": DENSE, **dense})
        figures = {
            "keep_ratio": report.keep_ratio,
            "loss": report.compressed.loss,
            "loss_increase": report.compressed.loss - report.dense.loss,
            "accuracy": report.compressed.accuracy,
            "accuracy_change": report.compressed.accuracy - report.dense.accuracy,
            "refitted": report.refitted,
            "verdict": report.verdict,
        }
        found.append({"model": name, "method": method, "keep": keep, **figures})
        print(found[-1], flush=True)
    compressor.restore()
    return found


def is_certified(record: Record) -> bool:
    return record["verdict"].startswith(("lossless", "improved"))


def cell(record: Record) -> str:
    text = f"{record['loss_increase']:+.4f} / {100 * record['accuracy_change']:+.2f}"
    return f"**{text}**" if is_certified(record) else text


def tables(records: list[Record]) -> str:
    """Return one table a model: loss increase / accuracy change in points, bold where certified."""
    lines = []
    for model in (name for name in TASKS if any(record["model"] == name for record in records)):
        dense, *found = [record for record in records if record["model"] == model]
        ratios = list(dict.fromkeys(record["keep"] for record in found))
        lines += [
            f"### {model}",
            "",
            f"Dense: loss {dense['loss']:.4f}, accuracy {dense['accuracy']:.4f}.",
            "",
            "| method | " + " | ".join(f"keep {ratio}" for ratio in ratios) + " |",
            "|---" * (len(ratios) + 1) + "|",
        ]
        for method in dict.fromkeys(record["method"] for record in found):
            cells = {record["keep"]: cell(record) for record in found if record["method"] == method}
            lines.append(f"| {method} | " + " | ".join(cells[ratio] for ratio in ratios) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the trained models and their data")
    parser.add_argument("--records", type=Path, required=True, help="file of the figures, read and continued")
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: those of each model's table")
    arguments = parser.parse_args()
    records = read_records(arguments.records) if arguments.records.exists() else []
    for name in arguments.models if arguments.testbed else ():
        load, keep_ratios, methods = TASKS[name]
        done = {record["method"] for record in records if record["model"] == name}
        missing = [method for method in arguments.methods or methods if method not in done]
        task = load(arguments.testbed) if missing else None
        with tempfile.TemporaryDirectory() as folder:
            for method in missing:
                found = measure(task, name, method, keep_ratios, Path(folder) / "statistics.safetensors")
                found = found[1:] if done else found  # the dense model is measured once
                append_records(arguments.records, found)
                records += found
                done.add(method)
    print(tables(records))


if __name__ == "__main__":
    main()
