"""The command line of lm-eval, for compressed checkpoints: `python -m hf_lossless_lr.lm_eval --model hf ...`.

lm-eval reads a checkpoint's configuration before Transformers loads it, so the format must be known by then. Running
this module imports the package, which registers it; all arguments go to lm-eval as they are.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Run `lm_eval` with the arguments of the process."""
    try:
        command = importlib.import_module("lm_eval.__main__")
    except ModuleNotFoundError as error:
        sys.exit(f"hf_lossless_lr.lm_eval: {error}; install it with: pip install 'hf-lossless-lr[lm-eval]'")
    command.cli_evaluate()


if __name__ == "__main__":
    main()
