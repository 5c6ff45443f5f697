"""The command `hf-lossless-lr`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from datasets.exceptions import DatasetsError
from safetensors import SafetensorError
from transformers import HfArgumentParser

from ..errors import ConfigurationError, LosslessLowRankError
from ..report import plain
from ..versions import __version__
from . import benchmark, compare, compress, demo, evaluate, report, verify

COMMANDS = {
    "compress": (compress.add_parser, compress.compress),
    "verify": (verify.add_parser, verify.verify),
    "compare": (compare.add_parser, compare.compare),
    "evaluate": (evaluate.add_parser, evaluate.evaluate),
    "report": (report.add_parser, report.report),
    "benchmark": (benchmark.add_parser, benchmark.benchmark),
    "demo": (demo.add_parser, demo.demo),
}
"""Name of a command to what adds its parser, and to what runs it and returns the exit code."""

OF_INPUTS = (OSError, SafetensorError, DatasetsError, RuntimeError, ValueError, TypeError, LookupError)
"""What files and data can cause in the libraries that read them: a full disk, a file cut short, other shapes."""

MOST_CHARACTERS = 500  # of a message from a library
SECONDS_FOR_THE_FIRST = 5.0  # of several processes, to print an error before the others do


def build_parser() -> HfArgumentParser:
    """Return the parser of the command line."""
    parser = HfArgumentParser(
        [], prog="hf-lossless-lr", description="Make trained Transformers models smaller without a measurable loss."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    for add_parser, _ in COMMANDS.values():
        add_parser(commands)
    help_text = "show the traceback of an error"
    parser.add_argument("--debug", action="store_true", help=help_text)
    for command in commands.choices.values():  # without a default, which would undo the option before the command
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=help_text)
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
        margins, 4 if the verdict is less than `--require` (2, from argparse, on wrong usage; 128 and the number of a
        signal that ended it).

    Raises:
        KeyboardInterrupt: with `--debug`, after Ctrl-C.
        LosslessLowRankError: with `--debug`, which raises every error as it is.
    """
    arguments = build_parser().parse_args(argv)
    run = COMMANDS[arguments.command][1]
    try:
        with cleaning_up_when_stopped():
            _refuse_empty(sys.argv[1:] if argv is None else argv)
            return run(arguments)
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print("hf-lossless-lr: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except LosslessLowRankError as error:
        if arguments.debug:
            raise
        _complain(plain(str(error), lines=True))
    except OF_INPUTS as error:
        if arguments.debug:
            raise
        _complain(plain(f"{_in_one_line(error)} (--debug shows where)"))
    return 1


def _refuse_empty(argv: Sequence[str]) -> None:
    """Refuse arguments without a character, as a shell makes them of a variable that is not set."""
    for before, argument in zip(("hf-lossless-lr", *argv), argv, strict=False):
        if not argument.strip():
            raise ConfigurationError(f"the argument behind {before!r} is empty. Is a variable of your shell not set?")


def _complain(message: str) -> None:
    """Print an error; the first of several processes that have it does, and a launcher ends the others."""
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(SECONDS_FOR_THE_FIRST)
    print(f"hf-lossless-lr: error: {message}", file=sys.stderr)


def _in_one_line(error: BaseException) -> str:
    """Return what an error of another library says, cut where it goes on."""
    text = " ".join(str(error).split())
    text = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"
    kind = type(error).__name__
    return text if text and isinstance(error, OSError) else f"{kind}: {text}" if text else kind


if __name__ == "__main__":
    sys.exit(main())
