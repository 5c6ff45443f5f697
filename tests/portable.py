"""Run the numerical tests as other processors would: `make test-portable`, or `python tests/portable.py [WORD ...]`.

A setting is an environment (read when torch and numpy are imported, so each has a process of its own) and options of
pytest. Every value comes once, then some of them together, then the perturbed runs. Words choose the settings whose
names contain one of them.

* `MKL_CBWR`: kernels of MKL, torch's BLAS and LAPACK. AMD processors take AVX2, and AVX512 as AVX2.
* `ATEN_CPU_CAPABILITY`: vector width of torch's own sums and elementwise functions.
* `ONEDNN_MAX_CPU_ISA`: kernels of oneDNN, torch's convolutions.
* `OPENBLAS_CORETYPE`: kernels of OpenBLAS, which numpy and scipy have; Zen takes those of Haswell.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from support.perturbation import SEEDS

VARIABLES = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE")
SETTINGS = [
    "",
    "--threads=2",
    "MKL_CBWR=COMPATIBLE",
    "MKL_CBWR=AVX2",
    "ATEN_CPU_CAPABILITY=default",
    "ATEN_CPU_CAPABILITY=avx2",
    "ONEDNN_MAX_CPU_ISA=AVX2",
    "OPENBLAS_CORETYPE=Haswell",
    "OPENBLAS_CORETYPE=Zen",
    "MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Haswell --threads=2",
    "MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Zen --threads=2",
    *(f"--perturb={seed}" for seed in SEEDS),
]


def run(setting: str) -> bool:
    """Run the tests under one setting, and print the closing line of pytest, after the failures if there are any."""
    words = setting.split()
    options = [word for word in words if word.startswith("--")]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= dict(word.split("=") for word in words if word not in options)
    threads = re.search(r"--threads=(\d+)", setting)
    environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = threads[1] if threads else "1"
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait leave the core to others
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "numerical", "--tb=short", *options]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        print("\n".join(lines))
    print(f"{setting or 'as it is'}: {lines[-1]}, {time.perf_counter() - start:.0f} s", flush=True)
    return done.returncode == 0


def main(words: list[str]) -> int:
    chosen = [setting for setting in SETTINGS if not words or any(word in setting for word in words)]
    passed = [run(setting) for setting in chosen]
    print(f"{sum(passed)} of {len(passed)} settings passed")
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
