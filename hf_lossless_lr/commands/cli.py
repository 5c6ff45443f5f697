"""The command `hf-lossless-lr`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from ..checkpoint import CompressionOptions
from ..errors import DataError, LosslessLowRankError
from ..report import REPORT_NAME
from .compress import CompressArguments, compress
from .data_options import refuse_old_options
from .demo import run_demo
from .evaluate import EvaluateArguments, evaluate
from .report import report
from .verify import VerifyArguments, verify


def build_parser() -> HfArgumentParser:
    """Return the parser of the command line."""
    parser = HfArgumentParser(
        [], prog="hf-lossless-lr", description="Make trained Transformers models smaller without a measurable loss."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('hf-lossless-lr')}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    compress = commands.add_parser(
        "compress",
        help="compress a checkpoint",
        description="Compress a checkpoint without fine-tuning and write an ordinary Transformers checkpoint.",
        dataclass_types=[CompressArguments, CompressionOptions],
    )
    compress.add_argument("model", help="hub id or local folder of a trained model")
    refuse_old_options(compress)
    judge = commands.add_parser(
        "verify",
        help="state a verdict on any pair of checkpoints",
        description="Compare two checkpoints on the same held-out examples and state a verdict on the second one, "
        "whatever made it.",
        dataclass_types=[VerifyArguments],
    )
    judge.add_argument("dense", help="hub id or local folder of the model to compare with")
    judge.add_argument("compressed", help="hub id or local folder of the model to judge")
    refuse_old_options(judge)
    scores = commands.add_parser(
        "evaluate",
        help="score a model on a published task, or two models side by side",
        description="Score a model, dense or compressed, on a published task; two models are compared by paired "
        "bounds, too.",
        dataclass_types=[EvaluateArguments],
    )
    scores.add_argument("model", help="hub id or local folder of a model")
    scores.add_argument("other", nargs="?", help="a second model, usually the compressed one")
    show = commands.add_parser(
        "report",
        help="show the report of a compressed checkpoint again",
        description="Show what a compressed checkpoint keeps and what its report shows about it.",
        dataclass_types=[],
    )
    show.add_argument("folder", help=f"folder of the checkpoint, with its {REPORT_NAME}")
    show.add_argument(
        "--plots", nargs="?", const="", help="also write figures, to this folder; default: figures in that folder"
    )
    demo = commands.add_parser(
        "demo",
        help="train, compress and reload a small model in a minute or two",
        description="Train a small Swin on handwritten digits, compress it, reload it in a new process.",
        dataclass_types=[],
    )
    demo.add_argument("--output", help="folder to keep the two checkpoints in; default: a temporary one, removed")
    demo.add_argument("--keep_ratio", "--keep-ratio", type=float, default=0.5, help="share of the parameters to keep")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; default those of the process.

    Returns:
        Exit code: 0 on success, 1 on an error that the message explains, 3 if nothing could be compressed within the
        margins, 4 if the verdict is less than `--require` (2, from argparse, on wrong usage).
    """
    arguments = build_parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except LosslessLowRankError as error:
        print(f"hf-lossless-lr: error: {error}", file=sys.stderr)
        return 1


def demo(arguments: Any) -> int:
    """Run `hf-lossless-lr demo`.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        DataError: if the output is no folder.
    """
    if arguments.output is None:
        with tempfile.TemporaryDirectory() as folder:
            run_demo(Path(folder), arguments.keep_ratio)
        return 0
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise DataError(f"--output: {output} is not a folder.")
    output.mkdir(parents=True, exist_ok=True)
    run_demo(output, arguments.keep_ratio)
    return 0


_COMMANDS: dict[str, Callable[[Any], int]] = {
    "compress": compress,
    "verify": verify,
    "evaluate": evaluate,
    "report": report,
    "demo": demo,
}


if __name__ == "__main__":
    sys.exit(main())
