"""Compress a language model with several processes, one a GPU, to several sizes after one calibration.

    accelerate launch examples/distributed.py --model MODEL --data FOLDER --output DIR
    torchrun --nproc-per-node 4 examples/distributed.py --model MODEL --data FOLDER --output DIR

FOLDER holds `calibration.txt` and `heldout.txt`. Each process takes its share of the batches, and all of them end with
the same model, which is that of a single process. So each process calls the compressor in the same way, and only one
of them prints and writes. Run alone, with `python`, the script does the same. Without GPUs, take torchrun.
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor


def blocks(path: Path, tokenizer: AutoTokenizer, length: int, count: int) -> Dataset:
    """Cut a text into blocks of tokens; an incomplete last one is left out."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:count]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with calibration.txt and heldout.txt")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="in descending order")
    parser.add_argument("--examples", type=int, default=256, help="blocks of each text at most; default 256")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a block; default 128")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-memory", help="of each process, such as 24GiB; default: what is free, less a tenth")
    parser.add_argument("--work", help="folder for what is finished, to go on after an interruption")
    parser.add_argument("--output", type=Path, required=True, help="folder for one checkpoint a ratio")
    arguments = parser.parse_args()
    state = PartialState(cpu=not torch.accelerator.is_available())  # on CPUs, Accelerate has to be told, here
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    with state.main_process_first():
        calibration, held_out = (
            blocks(arguments.data / f"{name}.txt", tokenizer, arguments.max_length, arguments.examples)
            for name in ("calibration", "heldout")
        )

    config = LosslessLowRankConfig(batch_size=arguments.batch_size)
    compressor = LowRankCompressor(config, max_memory=arguments.max_memory, work_dir=arguments.work)
    compressor.calibrate(model, calibration, eval_dataset=held_out)
    for keep_ratio in sorted(arguments.keep_ratios, reverse=True):
        compressed = compressor.compress_to(keep_ratio)
        if state.is_main_process:
            report = compressor.report
            loss = f"{report.dense.loss:.4f} -> {report.compressed.loss:.4f}"
            print(f"{state.num_processes} process(es), kept {report.keep_ratio:.1%}: loss {loss}, {report.verdict}")
            folder = arguments.output / f"keep-{keep_ratio:g}"
            compressed.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        state.wait_for_everyone()
    compressor.release()


if __name__ == "__main__":
    main()
