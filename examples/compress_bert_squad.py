"""Compress a SQuAD model; report F1 and exact match before and after, with bounds on the drop, and a verdict.

    python examples/compress_bert_squad.py --model MODEL --data FOLDER --keep-ratio 0.8 --output DIR --json FILE

FOLDER holds `train.jsonl` and `validation.jsonl` in the schema of SQuAD v1.1. With `validation.jsonl` alone, every
other article is for calibration. Without --data, SQuAD comes from the hub.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.evaluation.scores import summarize
from hf_lossless_lr.evaluation.sources import load_split
from hf_lossless_lr.evaluation.squad import SQUAD
from hf_lossless_lr.evaluation.task import ScoringOptions
from hf_lossless_lr.report.sentence import verdict_sentence
from hf_lossless_lr.report.tables import score_table


def load(folder: Path | None, split: str) -> Dataset:
    path, file = (SQUAD.dataset[0], None) if folder is None else ("json", str(folder / f"{split}.jsonl"))
    return load_split(path, None, file, split, None)


def load_parts(folder: Path | None, examples: int | None) -> tuple[Dataset, Dataset]:
    """Return data to calibrate and to evaluate on, from different articles."""
    held_out = load(folder, "validation")
    if folder is None or (folder / "train.jsonl").is_file():
        train = load(folder, "train")
    else:
        even = set(list(dict.fromkeys(held_out["title"]))[::2])
        train = held_out.filter(lambda row: row["title"] in even)
        held_out = held_out.filter(lambda row: row["title"] not in even)
    return train.shuffle(seed=0).take(examples or 1024), held_out.shuffle(seed=0).take(examples or len(held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="csarron/bert-base-uncased-squad-v1")
    parser.add_argument("--data", type=Path, help="folder of validation.jsonl and train.jsonl; default: the hub")
    parser.add_argument("--examples", type=int, help="of each part; default: 1024 to calibrate on, all to evaluate on")
    parser.add_argument("--keep-ratio", type=float, default=0.8)
    parser.add_argument("--output", help="folder for the compressed checkpoint")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    model = AutoModelForQuestionAnswering.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = load_parts(arguments.data, arguments.examples)
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=arguments.keep_ratio))
    options = ScoringOptions(compressor.config.batch_size, SQUAD.max_length)
    dense = SQUAD.score(model, held_out, tokenizer, options)
    parts = [SQUAD.prepare(part, tokenizer, SQUAD.max_length) for part in (train, held_out)]
    model = compressor.compress(model, parts[0], eval_dataset=parts[1], data_collator=SQUAD.collator(tokenizer))
    compressed = SQUAD.score(model, held_out, tokenizer, options)
    report, summary = compressor.report, summarize([dense, compressed], compressor.config.confidence)
    figures = {"keep_ratio": report.keep_ratio, "verdict": verdict_sentence(report), "metrics": summary}
    print(score_table(summary))
    print(f"kept {report.keep_ratio:.1%} of the targeted parameters; {figures['verdict']}")
    if arguments.output:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
