"""The command `hf-lossless-lr`."""

from __future__ import annotations

import sys
from importlib.metadata import version

from transformers import HfArgumentParser

from ..errors import LosslessLowRankError
from . import compress, demo, evaluate, report, verify

COMMANDS = {
    "compress": (compress.add_parser, compress.compress),
    "verify": (verify.add_parser, verify.verify),
    "evaluate": (evaluate.add_parser, evaluate.evaluate),
    "report": (report.add_parser, report.report),
    "demo": (demo.add_parser, demo.demo),
}
"""Name of a command to what adds its parser, and to what runs it and returns the exit code."""


def build_parser() -> HfArgumentParser:
    """Return the parser of the command line."""
    parser = HfArgumentParser(
        [], prog="hf-lossless-lr", description="Make trained Transformers models smaller without a measurable loss."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('hf-lossless-lr')}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    for add_parser, _ in COMMANDS.values():
        add_parser(commands)
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
    run = COMMANDS[arguments.command][1]
    try:
        return run(arguments)
    except LosslessLowRankError as error:
        print(f"hf-lossless-lr: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
