"""Data sets from the hub, a folder or files, and their columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from ..errors import DataError
from .task import Task


def choose_columns(task: Task, available: list[str], given: list[str] | None = None) -> list[str]:
    """Return the columns to use, the label last where the task has one.

    Args:
        task: the task.
        available: columns of the data set.
        given: columns that the user named.

    Returns:
        Column names.

    Raises:
        DataError: if a column does not exist, none of the usual names does, or there are too few or too many.
    """
    most, fewest = len(task.columns), sum("" not in names.split("|") for names in task.columns)
    if given and not fewest <= len(given) <= most:
        takes = f"{most}" if fewest == most else f"{fewest} to {most}"
        raise DataError(f"columns: the task takes {takes}, the label last where it has one; got {', '.join(given)}.")
    for column in given or ():
        if column not in available:
            raise DataError(f"the data set has no column {column!r}; it has {', '.join(available)}.")
    if given:
        return given
    chosen = []
    for alternatives in task.columns:
        names = alternatives.split("|")
        found = next((name for name in names if name in available and name not in chosen), None)
        if found:
            chosen.append(found)
        elif "" not in names:
            raise DataError(
                f"the data set has none of the columns {', '.join(n for n in names if n)}; it has "
                f"{', '.join(available)}. Name the columns with --columns, the label last."
            )
    return chosen


def check_texts(dataset: Dataset, *columns: str) -> None:
    """Refuse columns with something else than texts in them.

    Args:
        dataset: the data set.
        columns: the columns.

    Raises:
        DataError: if there is; it names the row.
    """
    for column in columns:
        for index, text in enumerate(dataset[column]):
            if not isinstance(text, str):
                raise DataError(
                    f"row {index} of the data set has the text {text!r} in {column!r}, which is no string."
                )


def check_pictures(dataset: Dataset, column: str) -> None:
    """Refuse a column that holds something else than pictures, such as the paths of their files.

    Args:
        dataset: the data set.
        column: the column.

    Raises:
        DataError: if it does.
    """
    if not isinstance(dataset.features[column], Image):
        first = str(dataset[0][column])[:80] if len(dataset) else "nothing"
        raise DataError(
            f"the column {column!r} holds no pictures, but {dataset.features[column]}: {first!r}. Load files with "
            f"dataset.cast_column({column!r}, datasets.Image()), or give a folder of class folders."
        )


def is_format(path: str | None) -> bool:
    """Return whether a data set is named by the format of its files alone, such as `json` or `parquet`."""
    return path in _PACKAGED_DATASETS_MODULES


def is_single(path: str | None) -> bool:
    """Return whether a path is the folder of a data set that `save_to_disk` wrote without splits."""
    return path is not None and Path(path, "state.json").is_file()


def _has_no_splits(path: str) -> bool:
    """Return whether a path is a folder of folders, one for each class, none of which is called after a split."""
    folders = [entry.name for entry in Path(path).iterdir() if entry.is_dir()] if Path(path).is_dir() else []
    return bool(folders) and not any(name.lower().startswith("train") for name in folders)


def load_split(
    path: str, name: str | None, data_files: str | list[str] | None, split: str, examples: int | None
) -> Dataset:
    """Load a split of a data set from the hub, a folder, or files.

    Args:
        path: hub id, a folder (also one written by `save_to_disk`, or one of pictures with a folder for each class:
            without folders for splits it is taken whole), or a format such as `json`, `csv`, `parquet`.
        name: configuration of the data set.
        data_files: files to read, for a format.
        split: split to take.
        examples: how many examples to take from the start; None for all.

    Returns:
        The data set.

    Raises:
        DataError: if it cannot be loaded, has no such split, or is a format without files.
    """
    if is_format(path) and not data_files:  # else datasets takes what files it finds in the working directory
        raise DataError(f"the data set {path!r} is a format; name its files.")
    saved = is_single(path) or Path(path, "dataset_dict.json").is_file()
    try:
        if data_files is not None:
            data: Any = load_dataset(path, name, data_files={split: data_files})
        else:
            data = load_from_disk(path) if saved else load_dataset(path, name)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"cannot load the data set {path!r}: {error.__cause__ or error}") from error
    except StopIteration as error:  # of an empty JSON file
        raise DataError(f"cannot load the data set {path!r}: a file of it is empty.") from error
    if isinstance(data, DatasetDict):
        if split not in data and list(data) == ["train"] and _has_no_splits(path):
            split = "train"  # what datasets calls all of it
        if split not in data:
            raise DataError(f"the data set {path!r} has no split {split!r}; it has {', '.join(data)}.")
        data = data[split]
    return first_rows(data, examples)


def first_rows(dataset: Dataset, count: int | None) -> Dataset:
    """Return so many rows of a data set from the start, or as many as there are; None for all."""
    return dataset if count is None else dataset.select(range(min(count, len(dataset))))
