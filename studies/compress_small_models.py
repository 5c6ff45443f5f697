"""Compress a small model of one of the paper's tasks on local data, and score it before and after.

    python studies/compress_small_models.py --task squad --model MODEL --data FOLDER --keep-ratio 0.9

MODEL is one of `finetune_small_models.py`. FOLDER holds `train.jsonl` and `validation.jsonl` in the schema of the
task's data set. For squad, `validation.jsonl` alone will do: every other article of it is calibrated on, the others
are held out. With the hub at hand, `hf-lossless-lr compress --task ...` does the same for the published models.
"""

import argparse
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.evaluation import EVALUATION_TASKS, ScoringOptions, summarize
from hf_lossless_lr.report import score_table, verdict_sentence

TASKS = ("squad", "mnli", "swag", "conll2003")


def load_parts(folder: Path) -> tuple[Dataset, Dataset]:
    """Return data to calibrate and to evaluate on, shuffled; of one file, from different articles."""
    held_out = Dataset.from_json(str(folder / "validation.jsonl"))
    if (folder / "train.jsonl").is_file():
        train = Dataset.from_json(str(folder / "train.jsonl"))
    else:
        even = set(list(dict.fromkeys(held_out["title"]))[::2])
        train = held_out.filter(lambda row: row["title"] in even)
        held_out = held_out.filter(lambda row: row["title"] not in even)
    return train.shuffle(seed=0), held_out.shuffle(seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of validation.jsonl and train.jsonl")
    parser.add_argument("--examples", type=int, help="of each part; default: 1024 to calibrate on, all to evaluate on")
    parser.add_argument("--keep-ratio", type=float, required=True)
    parser.add_argument("--output", help="folder for the compressed checkpoint")
    arguments = parser.parse_args()
    task = EVALUATION_TASKS[arguments.task]
    model = getattr(transformers, task.auto_model).from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, held_out = load_parts(arguments.data)
    parts = train.take(arguments.examples or 1024), held_out.take(arguments.examples or len(held_out))
    train, held_out = (task.align(part, model) for part in parts)
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=arguments.keep_ratio, rank_multiple=1))
    options = ScoringOptions(compressor.config.batch_size, task.max_length)
    dense = task.score(model, held_out, tokenizer, options)
    examples, others = (task.prepare(part, tokenizer, task.max_length) for part in (train, held_out))
    model = compressor.compress(model, examples, eval_dataset=others, data_collator=task.collator(tokenizer))
    compressed = task.score(model, held_out, tokenizer, options)
    print(score_table(summarize([dense, compressed], compressor.config.confidence)))
    print(f"kept {compressor.report.keep_ratio:.1%} of the targeted parameters; {verdict_sentence(compressor.report)}")
    if arguments.output:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
