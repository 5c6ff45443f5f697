"""The command `hf-lossless-lr`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from safetensors import SafetensorError
from transformers import HfArgumentParser

from ..errors import LosslessLowRankError
from ..report import plain
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


STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def cleaning_up_when_stopped() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the body as an exception does, so that what is not complete is removed.

    Yields:
        Nothing; the process then exits with 128 plus the signal's number, as shells have it.
    """

    def stop(number: int, _: Any) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second one must not stop the cleaning
        raise SystemExit(128 + number)

    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` ignores one of them
                    before[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        with cleaning_up_when_stopped():
            return run(arguments)
    except (LosslessLowRankError, OSError, SafetensorError) as error:
        print(plain(f"hf-lossless-lr: error: {error}", lines=True), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
