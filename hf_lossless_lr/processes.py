"""The processes that a launcher started: seen as one group on CPUs, too, or an error that says why they are not."""

from __future__ import annotations

import logging as standard
import os
import re

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration
from transformers.utils import logging

from .errors import ConfigurationError

logger = logging.get_logger(__name__)


def joined_processes() -> PartialState:
    """Return the state of this process among those that were launched together.

    Accelerate takes the processes of `torchrun` for single ones where there are only CPUs, unless it is told.

    Returns:
        The state.

    Raises:
        ConfigurationError: if several processes were launched, and Accelerate was set up before with one of them.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    state = PartialState(cpu=True) if launched > 1 and not torch.accelerator.is_available() else PartialState()
    if launched > 1 and state.num_processes == 1:
        raise ConfigurationError(
            f"{launched} processes were launched, but Accelerate was set up with this one alone; all of them would do "
            "the same work and write to the same places. On CPUs, set ACCELERATE_USE_CPU=true, or create "
            "Accelerator(cpu=True), before anything else uses Accelerate."
        )
    asked = _asked_for()
    if launched == 1 and state.num_processes == 1 and asked > 1:
        logger.warning_once(
            f"`accelerate launch --cpu --num_processes {asked}` starts one process only, and this is it. "
            f"`torchrun --nproc-per-node {asked}` starts them all."
        )
    return state


def print_once() -> None:
    """Let the main process alone show progress and warnings: the others say the same."""
    if not joined_processes().is_main_process:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        standard.getLogger(__package__).setLevel(standard.ERROR)


def make_accelerator() -> Accelerator:
    """Return an accelerator over the launched processes, which see each example once."""
    cpu = joined_processes().device.type == "cpu"
    return Accelerator(cpu=cpu, dataloader_config=DataLoaderConfiguration(even_batches=False))


def _asked_for() -> int:
    """Return the processes that `accelerate launch --cpu` was asked for; 1 where it was not, or did not start this."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        return 1
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return 1
    found = re.search(r"\baccelerate\b.*\blaunch(?:\.py)? .*--num[_-]processes[ =](\d+)", " ".join(words))
    return int(found[1]) if found else 1
