"""Time the pass of the statistics in one process and in two, each with one thread, as `torchrun` starts them.

    python studies/two_processes.py --testbed FOLDER --records studies/results/two_processes.jsonl

For the sentiment model of the testbed on 512 of its calibration lines. Rounds alternate; what is kept are the medians.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from records import write_records
from testbed_tasks import sentiment
from transformers.utils import logging

from hf_lossless_lr.data import make_dataloader
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.processes import make_accelerator
from hf_lossless_lr.statistics import collect_statistics

ALONE = "--of-one-process"


def seconds_of_a_pass(testbed: Path, examples: int) -> float:
    """Return the seconds of a process from the first batch to the sums over all processes."""
    logging.disable_progress_bar()
    task, accelerator = sentiment(testbed, examples), make_accelerator()
    loader = make_dataloader(task.calibration, task.model, batch_size=32, processing_class=task.processing_class)
    targets = find_targets(task.model).chosen
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    collect_statistics(task.model, targets, loader, accelerator)
    accelerator.wait_for_everyone()
    return time.perf_counter() - start


def measured(testbed: Path, examples: int, processes: int) -> float:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    own = [str(Path(__file__).resolve()), "--testbed", str(testbed), "--examples", str(examples), ALONE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *launcher, *own], env=environment, stdout=subprocess.PIPE, check=True)
    return max(json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("["))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True, help="folder of the testbed")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, help="file for the figures")
    parser.add_argument(ALONE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of_one_process:
        print(json.dumps([seconds_of_a_pass(arguments.testbed, arguments.examples)]), flush=True)
        return
    taken: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.repeats):
        for processes, seconds in taken.items():
            seconds.append(measured(arguments.testbed, arguments.examples, processes))
    records = [{"processes": processes, "seconds": median(seconds)} for processes, seconds in taken.items()]
    for record in records:
        print(f"{record['processes']} process(es): {record['seconds']:.2f} s")
    print(f"two are {records[0]['seconds'] / records[1]['seconds']:.2f} times as fast as one")
    if arguments.records:
        write_records(arguments.records, records)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
