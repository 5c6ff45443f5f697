"""Compress a language model and compare it with the dense one on MMLU, five-shot.

    python examples/llama_mmlu.py --keep-ratio 0.8 --output DIR --json FILE
    python examples/llama_mmlu.py --model MODEL --data FOLDER --examples 128

FOLDER holds `dev.jsonl` and `test.jsonl` with the columns of cais/mmlu, the default. Some questions of `test`, drawn
at random, serve to calibrate and are not scored; all others are scored.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.evaluation import MMLU, ScoringOptions, mmlu, summarize
from hf_lossless_lr.report import score_table, verdict_sentence

BATCH = 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    parser.add_argument("--data", default="cais/mmlu", help="cais/mmlu, or a folder")
    parser.add_argument("--examples", type=int, default=512, help="questions to calibrate on")
    parser.add_argument("--keep-ratio", type=float, default=0.8)
    parser.add_argument("--output", help="folder for the compressed checkpoint")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def load_questions(source: str) -> tuple[Dataset, Dataset]:
    if Path(source).is_dir():
        return tuple(Dataset.from_json(str(Path(source, f"{name}.jsonl"))) for name in ("dev", "test"))
    return tuple(load_dataset(source, "all", split=name) for name in ("dev", "test"))


def split_questions(questions: Dataset, calibration: int) -> tuple[Dataset, Dataset]:
    shuffled = questions.shuffle(seed=0)
    return shuffled.select(range(calibration)), shuffled.select(range(calibration, len(shuffled)))


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    dev, test = load_questions(arguments.data)
    calibration, scored = split_questions(test, arguments.examples)
    task, length = mmlu(dev), min(MMLU.max_length, model.config.max_position_embeddings)
    dense = task.score(model, scored, tokenizer, ScoringOptions(BATCH, length))
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=arguments.keep_ratio, batch_size=BATCH))
    examples, held_out = (task.prepare(questions, tokenizer, length) for questions in (calibration, scored))
    compressor.compress(model, examples, eval_dataset=held_out, data_collator=task.collator(tokenizer))
    report, compressed = compressor.report, task.score(model, scored, tokenizer, ScoringOptions(BATCH, length))
    summary = summarize([dense, compressed], compressor.config.confidence)
    print(f"{len(calibration)} questions to calibrate on, {len(scored)} others to score")
    print(score_table(summary))
    print(f"kept {report.keep_ratio:.1%} of the targeted parameters; {verdict_sentence(report)}")
    if arguments.output:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
    if arguments.json:
        figures = {"keep_ratio": report.keep_ratio, "verdict": verdict_sentence(report), "metrics": summary}
        figures["questions"] = {"calibration": len(calibration), "scored": len(scored)}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
