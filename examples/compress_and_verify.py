"""Compress a text classifier, see what it cost, write it, and judge what was written.

    python examples/compress_and_verify.py --model MODEL --data FOLDER --keep-ratio 0.5 --output DIR --json FILE
    python examples/compress_and_verify.py --model MODEL --data FOLDER --objective compact

FOLDER holds `calibration.jsonl` and `validation.jsonl`, one `{"sentence": ..., "label": ...}` a line (the schema of
glue/sst2). Without --data, glue/sst2 comes from the hub.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, verify
from hf_lossless_lr.report import certificate_sentence, comparison_table, report_rows, verdict_sentence


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="distilbert/distilbert-base-uncased-finetuned-sst-2-english")
    parser.add_argument("--data", type=Path, help="folder with calibration.jsonl and validation.jsonl")
    parser.add_argument("--calibration-examples", type=int, default=1024)
    parser.add_argument("--keep-ratio", type=float, help="for budget and uniform; default 0.5")
    parser.add_argument("--metric", default="kronecker")
    parser.add_argument("--objective", default="budget", choices=["budget", "uniform", "compact", "lossless"])
    parser.add_argument("--storage", default="auto", choices=["auto", "pivoted", "two-factor"])
    parser.add_argument("--rank-multiple", type=int, help="default: 8 on a CPU, 64 on a GPU, less for narrow layers")
    parser.add_argument("--forms", nargs="+", help="forms of the layers: channel, spatial, dimensions")
    parser.add_argument("--formats", nargs="+", help="number formats of the layers: float, int8, int4, int3, or auto")
    parser.add_argument("--embeddings", default="float", choices=["float", "int8", "int4", "int3"])
    parser.add_argument("--refit", action=argparse.BooleanOptionalAction, help="default: with the metric kronecker")
    parser.add_argument("--output", help="folder for the compressed checkpoint, which is then reloaded and judged")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def load_data(folder: Path | None) -> tuple[Dataset, Dataset]:
    if folder is None:
        data = load_dataset("nyu-mll/glue", "sst2")
        return data["train"], data["validation"]
    files = {name: str(folder / f"{name}.jsonl") for name in ("calibration", "validation")}
    data = load_dataset("json", data_files=files)
    return data["calibration"], data["validation"]


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32)
    calibration, validation = load_data(arguments.data)
    calibration = calibration.select(range(min(arguments.calibration_examples, len(calibration))))

    def tokenize(batch):
        return tokenizer(batch["sentence"], truncation=True, max_length=128)

    calibration, held_out = (part.map(tokenize, batched=True) for part in (calibration, validation))
    config = LosslessLowRankConfig(
        objective=arguments.objective,
        metric=arguments.metric,
        keep_ratio=arguments.keep_ratio,
        storage=arguments.storage,
        rank_multiple=arguments.rank_multiple,
        forms=arguments.forms,
        formats=arguments.formats,
        embeddings=arguments.embeddings,
        refit=arguments.refit,
    )
    compressor = LowRankCompressor(config)
    model = compressor.compress(model, calibration, eval_dataset=held_out, processing_class=tokenizer)
    report = compressor.report
    print(comparison_table(report_rows(report)))
    print(f"{len(report.trials)} point(s) measured")
    print(verdict_sentence(report))
    if arguments.output:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
        judge_again(arguments, held_out, tokenizer)
    if arguments.json:
        names = ("dense", "compressed", "seconds", "keep_ratio", "refitted", "trials", "verdict", "certificate")
        figures = {name: value for name, value in report.to_dict().items() if name in names}
        figures |= {"metric": config.metric, "objective": config.objective}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def judge_again(arguments: argparse.Namespace, held_out: Dataset, tokenizer: AutoTokenizer) -> None:
    """State a verdict on the checkpoint as anyone gets it: any pair of models can be judged like this."""
    dense, compressed = (
        AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
        for path in (arguments.model, arguments.output)
    )
    certificate = verify(dense, compressed, held_out, processing_class=tokenizer)
    print(f"reloaded from {arguments.output}: {certificate_sentence(certificate)}")


if __name__ == "__main__":
    main()
