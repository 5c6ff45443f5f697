r"""Compress a model of TinyLlama's configuration, with random weights, within a limit of memory: times and peaks.

    python studies/scale.py --layers 22 --max-memory 10GiB --tokenizer FOLDER --text FILE \
        --records studies/results/scale.jsonl

Each run is a process of its own: a model with so many layers, in bfloat16; statistics and refit on real tokens, and
16 other sequences that judge the refit; keep 0.8 of the parameters as int8 factors; saved, loaded again, and compared.
The peak is that of the resident memory. `--layers 2 4 8 22 --sequences 8 16 32 64` runs all pairs.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from records import Record, append_records
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import hf_lossless_lr
from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.fingerprint import tensors_fingerprint

KEEP = 0.8  # of the parameters
JUDGES, HELD_OUT = 16, 8  # sequences


def config(layers: int) -> LlamaConfig:
    """Return the configuration of TinyLlama-1.1B, with so many layers."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32_000,
        max_position_embeddings=2048,
    )


def sequences(arguments: argparse.Namespace, count: int) -> list[dict[str, torch.Tensor]]:
    """Return sequences of real tokens as batches of one."""
    text = Path(arguments.text).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(arguments.tokenizer)(text, return_tensors="pt").input_ids[0]
    parts = ids[: count * arguments.length].view(count, arguments.length)
    return [{"input_ids": part[None], "labels": part[None]} for part in parts]


def run(arguments: argparse.Namespace) -> Record:
    """Compress one model; return what it took."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    start = time.perf_counter()
    layers, count = arguments.layers[0], arguments.sequences[0]
    model = LlamaForCausalLM(config(layers)).to(torch.bfloat16).eval()
    data = sequences(arguments, count + JUDGES + HELD_OUT)
    options: dict[str, Any] = {"keep_ratio": KEEP / 2, "formats": ["int8"], "storage": "two-factor"}
    compressor = LowRankCompressor(
        LosslessLowRankConfig(batch_size=1, selection_fraction=JUDGES / (count + JUDGES), **options),
        max_memory=arguments.max_memory,
        work_dir=arguments.work,
    )
    built = time.perf_counter()
    try:
        compressor.calibrate(model, data[:-HELD_OUT], eval_dataset=data[-HELD_OUT:])
        calibrated = peak()
        compressor.compress_to()
    finally:
        compressor.release()
    done = time.perf_counter()
    report = compressor.report
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model.save_pretrained(folder)
        saved = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        del model
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        equal = tensors_fingerprint(again.state_dict()) == report.compressed_fingerprint
    seconds = {"build": built - start, **report.seconds, "all of it": done - built, "save": saved - done}
    return {
        "layers": layers,
        "tokens": count * arguments.length,
        "max_memory": arguments.max_memory,
        "threads": torch.get_num_threads(),
        "passes": report.memory.passes,
        "expected": report.memory.expected,
        "disk": report.memory.disk,
        "calibration_peak": calibrated,
        "peak": peak(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "bytes_ratio": report.bytes_ratio,
        "checkpoint_bytes": size,
        "loss_increase": report.compressed.loss - report.dense.loss,
        "ranks": sum(layer.rank or 0 for layer in report.layers.values()),
        "equal_after_loading": equal,
        "fingerprint": report.compressed_fingerprint,
        "version": hf_lossless_lr.__version__,
    }


def peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[22])
    parser.add_argument("--sequences", type=int, nargs="+", default=[32])
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--max-memory", help="such as 10GiB; default: what is free")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with at most 32,000 tokens")
    parser.add_argument("--text", required=True, help="file with a text")
    parser.add_argument("--work", help="folder of finished stages; default: a temporary one")
    parser.add_argument("--folder", help="where temporary folders are made")
    parser.add_argument("--records", type=Path, help="file that the figures are added to")
    arguments = parser.parse_args()
    if len(arguments.layers) * len(arguments.sequences) == 1:
        record = run(arguments)
        print(json.dumps(record), flush=True)
        if arguments.records:
            append_records(arguments.records, [record])
        return
    for layers in arguments.layers:
        for count in arguments.sequences:
            own = ["--layers", str(layers), "--sequences", str(count), "--length", str(arguments.length)]
            for name in ("max_memory", "tokenizer", "text", "folder", "records"):
                value = getattr(arguments, name)
                own += [f"--{name.replace('_', '-')}", str(value)] if value else []
            subprocess.run([sys.executable, __file__, *own], check=True)


if __name__ == "__main__":
    main()
