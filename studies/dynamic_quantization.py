"""Quantize compressed models dynamically (int8 weights and activations), by storage of their factors.

python studies/dynamic_quantization.py --testbed FOLDER --records studies/results/dynamic_quantization.jsonl
"""

import argparse
import warnings
from pathlib import Path

import torch
from records import Record, write_records
from testbed_tasks import sentiment
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers.utils import logging

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.data import make_dataloader

KEEP = 0.5


@torch.no_grad()
def accuracy(model: nn.Module, loader) -> float:
    right = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in loader]
    return float(torch.cat(right).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True)
    parser.add_argument("--records", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    task = sentiment(arguments.testbed)
    loader = make_dataloader(task.evaluation, task.model, batch_size=32, processing_class=task.processing_class)
    found: list[Record] = []

    def record(storage: str, model: nn.Module) -> None:
        quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        figures = {"accuracy": accuracy(model, loader), "quantized_accuracy": accuracy(quantized, loader)}
        found.append({"storage": storage, "keep": 1 if storage == "dense" else KEEP, **figures})
        print(found[-1], flush=True)

    record("dense", task.model.eval())
    for storage in ("two-factor", "pivoted"):
        compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=KEEP, storage=storage))
        evaluation = task.evaluation.select(range(200))
        compressor.calibrate(
            task.model, task.calibration, eval_dataset=evaluation, processing_class=task.processing_class
        )
        record(storage, compressor.compress_to())
        compressor.restore()
    if arguments.records:
        write_records(arguments.records, found)


if __name__ == "__main__":
    main()
