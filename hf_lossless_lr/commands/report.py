"""`hf-lossless-lr report`: the report of a compressed checkpoint again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..report import REPORT_NAME, comparison_table, report_rows, verdict_sentence, write_figures
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
    """
    folder = Path(arguments.folder)
    found = read_report(folder)
    doubt = doubt_about_weights(folder, found)
    print(comparison_table(report_rows(found)))
    if arguments.plots is not None:
        for path in write_figures(found, arguments.plots or folder / "figures"):
            print(f"written: {path}")
    print(verdict_sentence(found))
    if doubt is not None:
        print(f"hf-lossless-lr: {doubt}", file=sys.stderr)
    return 0
