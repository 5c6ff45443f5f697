"""The versions in reports and on the command line, with and without an installation."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import hf_lossless_lr
from hf_lossless_lr.versions import versions

PACKAGE = Path(hf_lossless_lr.__file__).parent


def test_are_those_of_the_packages_at_work():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["hf-lossless-lr"] == hf_lossless_lr.__version__
    assert found["torch"] == importlib.metadata.version("torch")


def test_the_oldest_that_are_tested_are_the_lower_bounds():
    """Each dependency has one, and `make test-oldest` installs it."""
    root = PACKAGE.parent
    declared = (root / "pyproject.toml").read_text().split("\ndependencies = [\n")[1].split("\n]")[0].splitlines()
    bounds = [line.split('"')[1].replace(">=", "==") for line in declared]
    tested = (root / "constraints-oldest.txt").read_text().splitlines()
    assert [line for line in tested if not line.startswith("#")] == bounds


def test_need_no_installation(monkeypatch):
    def fail(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("hf_lossless_lr.versions.version", fail)
    found = versions()
    assert found["hf-lossless-lr"] == hf_lossless_lr.__version__
    assert found["torch"] == torch.__version__
    assert all(found.values())


def test_are_shown_by_a_source_tree_that_is_not_installed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "hf_lossless_lr", ignore=shutil.ignore_patterns("__pycache__"))
    hide = (
        "import importlib.metadata as m, runpy, sys\n"
        "find = m.Distribution.from_name\n"
        "def from_name(name):\n"
        "    if 'lossless' in name:\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return find(name)\n"
        "m.Distribution.from_name = from_name\n"
        "sys.argv = ['cli', '--version']\n"
        "runpy.run_module('hf_lossless_lr.commands.cli', run_name='__main__')\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", hide], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (shown.returncode, shown.stdout) == (0, f"hf-lossless-lr {hf_lossless_lr.__version__}\n"), shown.stderr
