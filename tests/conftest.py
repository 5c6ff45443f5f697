"""What all tests share: a fixed seed, one thread, no progress bars or log lines, and the testbed of trained models."""

import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

# For NumPy, SciPy and torch, which read these when they are loaded, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import datasets
import pytest
import torch
from support.perturbation import perturbed
from transformers.utils import logging

TESTBED = Path(__file__).resolve().parents[2] / "shared" / "testbed"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.addoption("--every-architecture", action="store_true", help="run all of tests/conformance, not a few rows")
    parser.addoption("--perturb", type=int, metavar="SEED", help="compute products otherwise; see perturbation.py")


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, then those with many: no worker is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path], item.path))


@pytest.fixture(autouse=True, scope="session")
def _threads(request):
    """One unless asked for more: models this small run faster on one."""
    torch.set_num_threads(request.config.getoption("--threads"))


@pytest.fixture(autouse=True, scope="session")
def _perturbed(request):
    seed = request.config.getoption("--perturb")
    with nullcontext() if seed is None else perturbed(seed):
        yield


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True, scope="session")
def _few_turns():
    """Compressions measure the speed of their model in the fewest turns: nearly all tests look at something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lossless_lr.pipeline.speed.MAX_SECONDS", 0.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache_of_datasets(tmp_path_factory):
    """What `datasets` reads from files is cached in the folder of this run, of which each worker has its own."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # for the processes that tests start
        yield


@pytest.fixture(scope="session")
def testbed():
    """Folder of the trained models and their data, for tests marked `testbed`."""
    if not TESTBED.is_dir():
        pytest.skip(f"no testbed of trained models at {TESTBED}")
    return TESTBED
