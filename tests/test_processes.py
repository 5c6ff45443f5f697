"""Processes as launchers start them, on CPUs: one group, the same model in each, and no word twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState
from support.processes import in_two_processes, needs_processes
from support.tiny_models import llama, split_batch

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.baselines import compare
from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.processes import joined_processes

TESTS = Path(__file__).resolve().parent
EXAMPLES, CALIBRATED = 40, 29  # in batches of 3, which no number of processes divides
SCRIPT = """
import json, sys
from accelerate import PartialState
from test_processes import compressed
report = compressed(*sys.argv[2:])
state = PartialState()
figures = [state.num_processes, report.calibration, report.compressed.loss, report.compressed_fingerprint]
open(f"{sys.argv[1]}/{state.process_index}.json", "w").write(json.dumps(figures))
"""


def compressed(work_dir=None):
    model, batch = llama(EXAMPLES)
    data = split_batch(batch, 1)
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5, batch_size=3), work_dir=work_dir)
    compressor.compress(model, data[:CALIBRATED], eval_dataset=data[CALIBRATED:])
    return compressor.report


def launched(launcher, folder, *arguments):
    """What each process wrote, and what all of them printed."""
    script, output = folder / "script.py", folder / "output"
    script.write_text(SCRIPT)
    output.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    environment |= {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(script), str(output), *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(file.read_text()) for file in sorted(output.iterdir())], run.stdout + run.stderr


def torchrun(processes):
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


@needs_processes
@pytest.mark.parametrize(("processes", "with_work_dir"), [(3, False), (2, True)])
def test_torchrun_on_cpus_gives_the_model_of_one_process(processes, with_work_dir, tmp_path):
    expected = compressed()
    found, printed = launched(torchrun(processes), tmp_path, *([tmp_path / "work"] if with_work_dir else []))
    assert [figures[0] for figures in found] == [processes] * processes
    for _, calibration, loss, fingerprint in found:
        assert fingerprint == found[0][3]
        assert calibration["examples"] == expected.calibration["examples"]
        assert calibration["loss"] == pytest.approx(expected.calibration["loss"], rel=1e-6)
        assert loss == pytest.approx(expected.compressed.loss, rel=1e-5)
    assert printed.count("Factorizing:   0%") == 1


@needs_processes
def test_accelerate_launch_that_starts_one_process_of_two_is_noticed(tmp_path):
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    found, printed = launched(launcher, tmp_path)
    assert [figures[0] for figures in found] == [1]
    assert "starts one process only, and this is it. `torchrun --nproc-per-node 2`" in printed


@needs_processes
def test_an_error_of_all_processes_is_printed_once(tmp_path):
    arguments = ["-m", "hf_lossless_lr.commands.cli", "report", str(tmp_path / "none")]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *torchrun(2), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode != 0
    assert run.stderr.count("hf-lossless-lr: error:") == 1


def test_processes_that_do_not_know_of_one_another_are_an_error(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="2 processes were launched, but Accelerate was set up with this one"):
        joined_processes()


def compare_twice(folder: Path, process: int) -> None:
    model, batch = llama(EXAMPLES)
    data = split_batch(batch, 1)
    options = {"methods": ["svd", "fwsvd"], "keep_ratios": [0.6], "eval_dataset": data[CALIBRATED:]}
    found = [each.loss_increase for each in compare(model, data[:CALIBRATED], batch_size=3, **options)]
    (folder / f"{process}.json").write_text(json.dumps(found))


@needs_processes
def test_methods_are_compared_in_several_processes_on_the_statistics_of_one(tmp_path):
    in_two_processes(compare_twice, tmp_path)
    found = [json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1)]
    assert found[0] == found[1]
    assert len(found[0]) == 2
