"""Compress a BERT of MNLI, score both models on the matched validation set, and state a verdict.

    python examples/compress_bert_mnli.py --model MODEL --data FOLDER --keep-ratio 0.7 --output DIR --json FILE

FOLDER holds `train.jsonl` and `validation.jsonl`, one `{"premise": ..., "hypothesis": ..., "label": 0}` a line (the
schema of glue/mnli). Without --data, it comes from the hub.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.evaluation.glue import GLUE
from hf_lossless_lr.evaluation.scores import summarize
from hf_lossless_lr.evaluation.sources import load_split
from hf_lossless_lr.evaluation.task import ScoringOptions
from hf_lossless_lr.report.sentence import verdict_sentence
from hf_lossless_lr.report.tables import score_table

TASK = GLUE["mnli"]
LABELS = {"textattack/bert-base-uncased-MNLI": ("contradiction", "entailment", "neutral")}  # not in its config


def load(folder: Path | None, split: str, count: int | None) -> Dataset:
    path, name = (str(folder), None) if folder else TASK.dataset[:2]
    data = load_split(path, name, None, split, None).shuffle(seed=0)
    return data.select(range(min(count or len(data), len(data))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="textattack/bert-base-uncased-MNLI")
    parser.add_argument("--data", type=Path, help="folder of train.jsonl and validation.jsonl; default: the hub")
    parser.add_argument("--examples", type=int, help="of each split; default: 1024 of train, all of validation")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--output", help="folder for the compressed checkpoint")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.model in LABELS:
        model.config.id2label = dict(enumerate(LABELS[arguments.model]))
    train = load(arguments.data, "train", arguments.examples or 1024)
    validation = load(arguments.data, "validation" if arguments.data else TASK.dataset[3], arguments.examples)
    train, validation = (TASK.align(part, model) for part in (train, validation))
    options = ScoringOptions(batch_size=32, max_length=TASK.max_length)
    dense = TASK.score(model, validation, tokenizer, options)
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=arguments.keep_ratio))
    model = compressor.compress(
        model,
        TASK.prepare(train, tokenizer, TASK.max_length),
        eval_dataset=TASK.prepare(validation, tokenizer, TASK.max_length),
        data_collator=TASK.collator(tokenizer),
    )
    compressed = TASK.score(model, validation, tokenizer, options)
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
