"""What all tests share: a fixed seed, one thread, no progress bars or log lines, and the testbed of trained models."""

from pathlib import Path

import datasets
import pytest
import torch
from transformers.utils import logging

TESTBED = Path(__file__).resolve().parents[2] / "shared" / "testbed"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Models this small run faster on one thread, and their sums come out the same each time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def testbed():
    """Folder of the trained models and their data, for tests marked `testbed`."""
    if not TESTBED.is_dir():
        pytest.skip(f"no testbed of trained models at {TESTBED}")
    return TESTBED
