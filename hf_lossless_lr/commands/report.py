"""`hf-lossless-lr report`: the report of a compressed checkpoint again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..report import REPORT_NAME, CompressionReport, comparison_table, report_rows, verdict_sentence, write_figures


def read_report(folder: Path) -> CompressionReport:
    """Read the report of a checkpoint.

    Args:
        folder: the checkpoint.

    Returns:
        The report.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        return CompressionReport.from_json((folder / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {REPORT_NAME} in {folder}: {error}") from error


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
    print(comparison_table(report_rows(found)))
    if arguments.plots is not None:
        for path in write_figures(found, arguments.plots or folder / "figures"):
            print(f"written: {path}")
    print(verdict_sentence(found))
    return 0
