"""What is checked of a command's arguments before any work is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..evaluation import TASKS, is_format, is_single
from ..files import check_writable
from ..report import check_figure
from .data_options import ALL_TASKS, names_held_out

SPLITS = {
    "split": "data_files",
    "calibration_split": "data_files",
    "eval_split": "eval_data_files",
    "refit_split": "refit_data_files",
}
"""Options that name a split, and those that name the files instead."""
DEFAULT_SPLITS = {"split": "validation", "calibration_split": "train"}


def check_arguments(arguments: Any) -> None:
    """Check, before any work is done, what the parser cannot.

    Args:
        arguments: the parsed arguments of a command.

    Raises:
        ConfigurationError: if a number is less than 1, an option does not fit the task, or a file cannot be written.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name in ("max_length", "examples", "calibration_examples", "eval_examples", "refit_examples"):
        if given.get(name, 1) < 1:
            raise ConfigurationError(f"--{name}: must be at least 1, got {given[name]}.")
    if "columns" in given and not ALL_TASKS[arguments.task].columns:
        raise ConfigurationError(
            f"--columns is for {', '.join(TASKS)}; {arguments.task} has columns of its own, so rename those of the "
            "data set."
        )
    if "shots_files" in given and arguments.task != "mmlu":
        raise ConfigurationError(f"--shots_files is for mmlu, not for {arguments.task}.")
    if given.get("task") == "mmlu" and is_format(given.get("dataset")) and "shots_files" not in given:
        raise ConfigurationError("--shots_files: name the files of MMLU's solved examples (dev), too.")
    _check_sources(given)
    if "eval_examples" in given and not names_held_out(arguments):
        raise ConfigurationError(
            "--eval_examples: name the held-out data with --eval_split or --eval_data_files; without them, a fifth "
            "of the calibration examples is held out."
        )
    if "refit_examples" in given and not {"refit_split", "refit_data_files"} & given.keys():
        raise ConfigurationError("--refit_examples: name these data with --refit_split or --refit_data_files.")
    check_files(arguments)


def _check_sources(given: dict[str, Any]) -> None:
    """Refuse data that nobody named: what a loader finds by itself in the folder at hand."""
    dataset = given.get("dataset")
    if is_format(dataset) and "data_files" not in given:
        raise ConfigurationError(f"--data_files: name the files; --dataset {dataset} is a format.")
    for name, files in SPLITS.items():
        named = given.get(name) not in (None, DEFAULT_SPLITS.get(name))
        called = files != "data_files" and files in given  # what files of their own are to be called
        if named and is_format(dataset) and not called:
            raise ConfigurationError(
                f"--{name}: files in a format ({dataset}) have no splits. Name the files with --{files}"
                + (", or leave both out to hold out a fifth of the calibration examples." if "eval" in name else ".")
            )
    if "eval_split" in given and "eval_data_files" not in given and is_single(dataset):
        raise ConfigurationError(
            f"--eval_split: the data set in {dataset} is one split. Leave the option out to hold out a fifth of the "
            "calibration examples, or give a folder of several splits."
        )


def check_files(arguments: Any) -> None:
    """Check, before any work is done, that the files can be written which a command writes.

    Args:
        arguments: its parsed arguments.

    Raises:
        ConfigurationError: if one cannot.
    """
    for name in ("json", "statistics", "records", "plot"):
        path = getattr(arguments, name, None)
        if path is not None:
            _check_file(name, Path(path))
    if getattr(arguments, "plot", None) is not None:
        check_figure(arguments.plot)


def _check_file(option: str, path: Path) -> None:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigurationError(f"--{option}: there is no folder {folder}; make it, or choose another file.")
    if path.is_dir():
        raise ConfigurationError(f"--{option}: {path} is a folder; name a file in it.")
    try:
        check_writable(path)
    except OSError as error:
        raise ConfigurationError(f"--{option}: {path} cannot be written: {error.strerror or error}.") from error
