"""Compress a CoNLL-2003 tagger; report F1 of its entities before and after, with bounds on the drop, and a verdict.

    python examples/compress_bert_conll.py --model MODEL --data FOLDER --keep-ratio 0.8 --output DIR --json FILE

FOLDER holds `train.jsonl` and `validation.jsonl` in the schema of CoNLL-2003, whose tags are names, or numbers as the
model has them. Without --data, CoNLL-2003 comes from the hub, and its test split is evaluated on.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.evaluation.conll import CONLL2003, align_tags
from hf_lossless_lr.evaluation.scores import summarize
from hf_lossless_lr.evaluation.sources import load_split
from hf_lossless_lr.evaluation.task import ScoringOptions
from hf_lossless_lr.report.sentence import verdict_sentence
from hf_lossless_lr.report.tables import score_table


def load(folder: Path | None, split: str) -> Dataset:
    path, file = (CONLL2003.dataset[0], None) if folder is None else ("json", str(folder / f"{split}.jsonl"))
    return load_split(path, None, file, split, None)


def load_parts(folder: Path | None, examples: int | None) -> tuple[Dataset, Dataset]:
    """Return data to calibrate and to evaluate on."""
    splits = CONLL2003.dataset[2:] if folder is None else ("train", "validation")
    train, held_out = (load(folder, split).shuffle(seed=0) for split in splits)
    return train.take(examples or 1024), held_out.take(examples or len(held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dslim/bert-base-NER")
    parser.add_argument("--data", type=Path, help="folder of train.jsonl and validation.jsonl; default: the hub")
    parser.add_argument("--examples", type=int, help="of each part; default: 1024 to calibrate on, all to evaluate on")
    parser.add_argument("--keep-ratio", type=float, default=0.8)
    parser.add_argument("--output", help="folder for the compressed checkpoint")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    model = AutoModelForTokenClassification.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    parts = load_parts(arguments.data, arguments.examples)
    train, held_out = (align_tags(part, model) for part in parts)
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=arguments.keep_ratio))
    options = ScoringOptions(compressor.config.batch_size, CONLL2003.max_length)
    dense = CONLL2003.score(model, held_out, tokenizer, options)
    parts = [CONLL2003.prepare(part, tokenizer, CONLL2003.max_length) for part in (train, held_out)]
    model = compressor.compress(model, parts[0], eval_dataset=parts[1], data_collator=CONLL2003.collator(tokenizer))
    compressed = CONLL2003.score(model, held_out, tokenizer, options)
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
