"""`hf-lossless-lr report`: the report of a compressed checkpoint again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigurationError, LosslessLowRankError
from ..report import REPORT_NAME, comparison_table, plain, report_rows, verdict_sentence, write_figures
from .binding import doubt_about_weights, read_report


def add_parser(commands: Any) -> None:
    """Add the parser of this command."""
    parser = commands.add_parser(
        "report",
        help="show the report of a compressed checkpoint again",
        description="Show what a compressed checkpoint keeps and what its report shows about it.",
        dataclass_types=[],
    )
    parser.add_argument("folder", help=f"folder of the checkpoint, with its {REPORT_NAME}")
    parser.add_argument(
        "--plots", nargs="?", const="", help="also write figures, to this folder; default: figures in that folder"
    )


def report(arguments: Any) -> int:
    """Run `hf-lossless-lr report`.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: if figures would be written through a link, or into a file.
        CheckpointError: if the report cannot be read or drawn, or is about other weights.
        LosslessLowRankError: if figures cannot be written.
    """
    folder, figures = Path(arguments.folder), arguments.plots
    if figures == "":
        figures = folder / "figures"
        if figures.is_symlink():  # a checkpoint is anyone's
            raise ConfigurationError(f"{figures} is a link, which figures are not written through; name a folder.")
    if figures is not None and Path(figures).exists() and not Path(figures).is_dir():
        raise ConfigurationError(f"--plots: {figures} is no folder.")
    found = read_report(folder)
    doubt = doubt_about_weights(folder, found)
    print(comparison_table(report_rows(found)))
    if figures is not None:
        try:
            paths = write_figures(found, figures)
        except LosslessLowRankError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # sizes that no figure has room for
            raise CheckpointError(f"the figures of this report cannot be drawn: {error}") from error
        for path in paths:
            print(plain(f"written: {path}"))
    print(verdict_sentence(found))
    if doubt is not None:
        print(plain(f"hf-lossless-lr: {doubt}"), file=sys.stderr)
    return 0
