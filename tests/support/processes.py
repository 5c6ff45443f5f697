"""Work in one process, and in two on this machine: what both must agree on."""

import os
import signal
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

LAUNCH_SECONDS = 120

needs_processes = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)


def first(items: list[Any]) -> Any:
    return items[0]


def loader_of(batches: Iterable[Any]) -> DataLoader:
    """A loader of ready-made batches; several processes get them in turn."""
    return DataLoader(batches if isinstance(batches, list) else list(batches), batch_size=1, collate_fn=first)


def accelerator() -> Accelerator:
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))


def in_two_processes(work: Callable[[Path, int], None], folder: Path) -> None:
    """Call `work(folder, number of the process)` in each of two new processes."""
    with warnings.catch_warnings():  # Python 3.12 warns of any fork of a process with threads
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        debug_launcher(_in_one_of_them, (work, folder), num_processes=2)


def _in_one_of_them(work: Callable[[Path, int], None], folder: Path) -> None:
    signal.alarm(LAUNCH_SECONDS)  # a process that waits for one that died ends itself
    os.environ["OMP_NUM_THREADS"] = "1"  # the threads of the parent process do not live on in its children
    torch.set_num_threads(1)  # a parent that has had two would leave its children waiting for the second
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    process = accelerator()
    assert process.num_processes == 2
    work(folder, process.process_index)
    torch.distributed.barrier()  # the file through which the processes found each other is removed by the parent
    process.end_training()
