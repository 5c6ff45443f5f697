"""Compare methods at several sizes on the testbed's models: one run, the same statistics and evaluation for all.

    python examples/benchmark_quality.py --testbed FOLDER --markdown docs/quality.md --json docs/quality.json

Writes the loss increase over the dense model on held-out data, the change of the accuracy in points, and the verdict.
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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.files import write_atomically

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


def measure(task: Task, method: str, keep_ratios: tuple[float, ...], statistics: Path) -> dict[str, Any]:
    """Return the figures of a method at each ratio, and the dense model's; statistics are collected by the first."""
    compressor = LowRankCompressor(LosslessLowRankConfig(selection_fraction=0.125, **METHODS[method]))
    compressor.calibrate(
        task.model,
        task.calibration,
        eval_dataset=task.evaluation,
        processing_class=task.processing_class,
        statistics_path=statistics,
    )
    figures: dict[str, Any] = {}
    for keep_ratio in keep_ratios:
        compressor.compress_to(keep_ratio)
        report = compressor.report
        figures[str(keep_ratio)] = {
            "keep_ratio": report.keep_ratio,
            "loss": report.compressed.loss,
            "loss_increase": report.compressed.loss - report.dense.loss,
            "accuracy": report.compressed.accuracy,
            "accuracy_change": report.compressed.accuracy - report.dense.accuracy,
            "refitted": report.refitted,
            "verdict": report.verdict,
        }
        print(f"{method}, keep {keep_ratio}: {figures[str(keep_ratio)]}", flush=True)
    compressor.restore()
    figures["dense"] = {"loss": report.dense.loss, "accuracy": report.dense.accuracy}
    return figures


def cell(figures: dict[str, Any]) -> str:
    text = f"{figures['loss_increase']:+.4f} / {100 * figures['accuracy_change']:+.2f}"
    return f"**{text}**" if figures["verdict"].startswith(("lossless", "improved")) else text


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Return one table a model: loss increase / accuracy change in points, bold where certified."""
    lines = [
        "# Methods compared",
        "",
        "Printed by `python examples/benchmark_quality.py`; see its docstring. Each cell is the loss increase in nats",
        "and the change of the accuracy in points, on held-out data. **Bold**: certified as `lossless` within 0.01",
        "nats and 1 point with 95 % confidence, or as `improved`.",
        "",
    ]
    for model in (name for name in TASKS if name in results):
        methods = results[model]
        dense = next(iter(methods.values()))["dense"]
        ratios = [ratio for ratio in next(iter(methods.values())) if ratio != "dense"]
        lines += [
            f"## {model}",
            "",
            f"Dense: loss {dense['loss']:.4f}, accuracy {dense['accuracy']:.4f}.",
            "",
            "| method | " + " | ".join(f"keep {ratio}" for ratio in ratios) + " |",
            "|---" * (len(ratios) + 1) + "|",
        ]
        for name, figures in methods.items():
            lines.append(f"| {name} | " + " | ".join(cell(figures[ratio]) for ratio in ratios) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True, help="folder of the trained models and their data")
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: those of each model's table")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    parser.add_argument("--json", type=Path, help="file for the figures; a run goes on where the file ends")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for name in arguments.models:
        load, keep_ratios, methods = TASKS[name]
        done = results.setdefault(name, {})
        missing = [method for method in arguments.methods or methods if method not in done]
        task = load(arguments.testbed) if missing else None
        with tempfile.TemporaryDirectory() as folder:
            for method in missing:
                done[method] = measure(task, method, keep_ratios, Path(folder) / "statistics.safetensors")
                if arguments.json:
                    write_atomically(arguments.json, json.dumps(results, indent=2) + "\n")
    if arguments.markdown:
        write_atomically(arguments.markdown, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
