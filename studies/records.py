"""Results of studies: files with one JSON record a line, so that a changed figure is a changed line."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def known_records(path: Path) -> list[Record]:
    """Return the records of a file that an earlier run may have left."""
    return read_records(path) if path.exists() else []


def write_records(path: Path, records: Iterable[Record]) -> None:
    path.write_text("".join(map(_line, records)), encoding="utf-8")


def append_records(path: Path, records: Iterable[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, records))


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
