"""Compress a Swin of ImageNet, score both models on the validation set, and state a verdict.

    python examples/compress_swin_imagenet.py --model MODEL --data FOLDER --keep-ratio 0.7 --output DIR --json FILE

FOLDER holds the folders `train` and `validation`, and each of these a folder of pictures for each class, named as the
model names the class (or, for the same number of classes, in the same order). Without --data, ImageNet comes from the
hub, where its terms have to be accepted first.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.evaluation.imagenet import IMAGE_CLASSIFICATION as TASK
from hf_lossless_lr.evaluation.scores import summarize
from hf_lossless_lr.evaluation.sources import load_split
from hf_lossless_lr.evaluation.task import ScoringOptions
from hf_lossless_lr.report.sentence import verdict_sentence
from hf_lossless_lr.report.tables import score_table


def load(folder: Path | None, split: str, count: int | None) -> Dataset:
    if folder is None:  # as a stream, which does not download the splits whole
        stream = load_dataset(TASK.dataset[0], split=split, streaming=True).shuffle(seed=0)
        part = stream if count is None else stream.take(count)
        return Dataset.from_generator(lambda: iter(part), features=stream.features)
    data = load_split(str(folder), None, None, split, None).shuffle(seed=0)
    return data.select(range(min(count or len(data), len(data))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="microsoft/swin-tiny-patch4-window7-224")
    parser.add_argument("--data", type=Path, help="folder of pictures; default: the hub's ImageNet")
    parser.add_argument("--examples", type=int, help="of each split; default: 1024 of train, all of validation")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--output", help="folder for the compressed checkpoint")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    model = AutoModelForImageClassification.from_pretrained(arguments.model, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train = TASK.align(load(arguments.data, "train", arguments.examples or 1024), model)
    validation = TASK.align(load(arguments.data, "validation", arguments.examples), model)
    options = ScoringOptions(batch_size=32, max_length=TASK.max_length)
    dense = TASK.score(model, validation, processor, options)
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=arguments.keep_ratio))
    model = compressor.compress(
        model,
        TASK.prepare(train, processor, TASK.max_length),
        eval_dataset=TASK.prepare(validation, processor, TASK.max_length),
        data_collator=TASK.collator(processor),
    )
    compressed = TASK.score(model, validation, processor, options)
    report, summary = compressor.report, summarize([dense, compressed], compressor.config.confidence)
    figures = {"keep_ratio": report.keep_ratio, "verdict": verdict_sentence(report), "metrics": summary}
    print(score_table(summary))
    print(f"kept {report.keep_ratio:.1%} of the targeted parameters; {figures['verdict']}")
    if arguments.output:
        model.save_pretrained(arguments.output)
        processor.save_pretrained(arguments.output)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
