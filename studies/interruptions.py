"""Kill a run with a work folder at random moments, start it again, and compare the end with that of a run left alone.

    python studies/interruptions.py --kills 30 --records studies/results/interruptions.jsonl

A small Llama is compressed in another process, which SIGKILL ends after a random time since it began its work, until
`--kills` of them were sent over as many runs as that takes. Each run that ends by itself must have written the same
bytes, and no layer may have been factorized twice on the way.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from records import Record, write_records
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.factors import ShelvedFactorizations

SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
VOCABULARY, LENGTH, EXAMPLES = 512, 64, 96
BEGIN = "begin"
SHORTEST = 0.2  # seconds before a kill


def work(folder: Path, output: Path) -> None:
    """Compress the model, and say when that begins and which layers are factorized."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **SIZES)).eval()
    tokens = torch.randint(VOCABULARY, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    put = ShelvedFactorizations.put

    def say(self: ShelvedFactorizations, name: str, *others: object) -> None:
        put(self, name, *others)
        print(name, flush=True)

    ShelvedFactorizations.put = say
    print(BEGIN, flush=True)
    compressor = LowRankCompressor(LosslessLowRankConfig(batch_size=8), work_dir=folder)
    compressor.compress(model, data[:-16], eval_dataset=data[-16:])
    model.save_pretrained(output)


def attempt(folder: Path, output: Path, seconds: float | None) -> tuple[int, list[str], float]:
    """Run `work` in a process, killed after some seconds of it; return its exit code, its layers and its time."""
    command = [sys.executable, __file__, "--work", str(folder), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines: list[str] = []
    start = None
    for line in process.stdout or ():
        if line.strip() == BEGIN:
            start = time.perf_counter()
            if seconds is not None:
                threading.Timer(seconds, process.send_signal, [signal.SIGKILL]).start()
        elif start is not None:
            lines.append(line.strip())
    return process.wait(), lines, time.perf_counter() - (start or time.perf_counter())


def whole_run(root: Path, longest: float, draw: random.Random, kills: int) -> Record:
    """Start a run again and again until it ends by itself."""
    sent, layers = 0, list[str]()
    while True:
        seconds = draw.uniform(SHORTEST, longest) if sent < kills else None
        code, factorized, _ = attempt(root / "work", root / "output", seconds)
        layers += factorized
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the run ended with {code}")
        sent += 1
    repeated = len(layers) - len(set(layers))
    return {"kills": sent, "layers": len(layers), "repeated": repeated, "sha256": digest(root / "output")}


def digest(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, help="file for the results")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.output)
        return
    draw, records, left = random.Random(options.seed), list[Record](), options.kills
    with tempfile.TemporaryDirectory() as folder:
        code, layers, seconds = attempt(Path(folder, "a", "work"), Path(folder, "a", "output"), None)
        expected = digest(Path(folder, "a", "output"))
        print(f"left alone: {len(layers)} layers in {seconds:.1f} s, exit code {code}")
        while left > 0:
            record = whole_run(Path(folder, str(left)), seconds, draw, min(left, 5))
            record["same bytes"] = record.pop("sha256") == expected
            records.append(record)
            left -= record["kills"]
            print(record, flush=True)
    if options.records:
        write_records(options.records, records)
    same, repeated = all(r["same bytes"] for r in records), sum(r["repeated"] for r in records)
    print(f"{sum(r['kills'] for r in records)} kills in {len(records)} runs: ", end="")
    print(f"{'the same bytes each time' if same else 'OTHER BYTES'}, {repeated} layers factorized twice")


if __name__ == "__main__":
    main()
