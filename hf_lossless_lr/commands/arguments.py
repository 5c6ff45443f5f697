"""What the commands share: the options that name data, loading, and the exit code of a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from datasets import Dataset

from ..certificate import CERTIFIED
from ..data import TASKS, choose_columns, load_split
from ..errors import ConfigurationError
from ..report import Certificate

NOTHING_COMPRESSED, NOT_AS_REQUIRED = 3, 4  # exit codes


@dataclass(kw_only=True)
class DataArguments:
    """The task, its data, and what becomes of the result."""

    task: str = field(metadata={"help": "task of the model", "choices": list(TASKS)})
    dataset: str = field(metadata={"help": "hub id, local folder, or a format: json, csv, parquet, text"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the data set"})
    data_files: list[str] | None = field(default=None, metadata={"help": "files, for a format"})
    columns: list[str] | None = field(default=None, metadata={"help": "columns of the data set, the label last"})
    max_length: int = field(default=128, metadata={"help": "tokens an example is cut to (or blocks are cut into)"})
    dtype: str = field(
        default="float32", metadata={"help": "dtype to work in", "choices": ["float32", "bfloat16", "float16"]}
    )
    json: str | None = field(default=None, metadata={"help": "also write the result to this file"})
    require: str | None = field(
        default=None,
        metadata={"help": "exit with code 4 if the verdict is less than this", "choices": list(CERTIFIED)[::-1]},
    )


def load_model(arguments: DataArguments, name: str) -> Any:
    """Load a model of the task.

    Args:
        arguments: task and dtype.
        name: hub id or folder.

    Returns:
        The model.
    """
    return load_auto(TASKS[arguments.task].auto_model, name, dtype=arguments.dtype)


def load_processor(arguments: DataArguments, name: str) -> Any:
    """Load the tokenizer or processor of a model of the task.

    Args:
        arguments: the task.
        name: hub id or folder.

    Returns:
        The tokenizer or processor.
    """
    return load_auto(TASKS[arguments.task].processor, name)


def load_auto(auto_class: str, name: str, **options: Any) -> Any:
    """Load a model, tokenizer or processor.

    Args:
        auto_class: name of its Auto class.
        name: hub id or folder.
        options: arguments of `from_pretrained`.

    Returns:
        What was loaded.

    Raises:
        ConfigurationError: if it cannot be loaded.
    """
    try:
        return getattr(transformers, auto_class).from_pretrained(name, **options)
    except (OSError, ImportError) as error:
        raise ConfigurationError(f"cannot load {name!r} with {auto_class}: {error}") from error


def load_examples(
    arguments: DataArguments, processor: Any, files: list[str] | None, split: str, count: int | None
) -> Dataset:
    """Load a split and prepare it for a model.

    Args:
        arguments: the task and its data set.
        processor: tokenizer or processor.
        files: files of the split, for a format.
        split: the split.
        count: examples to take, from the start; None for all.

    Returns:
        Examples as the model takes them.
    """
    task = TASKS[arguments.task]
    blocks = arguments.task == "text-generation"  # examples are counted after the text is cut into blocks
    dataset = load_split(arguments.dataset, arguments.dataset_config, files, split, None if blocks else count)
    columns = choose_columns(task, dataset.column_names, arguments.columns)
    examples = task.prepare(dataset, processor, columns, arguments.max_length)
    return examples.select(range(min(count or len(examples), len(examples))))


def complaint(certificate: Certificate | None, required: str | None) -> str | None:
    """Return what to say if a verdict is less than required, else None; `improved` is more than `lossless`."""
    status = "none" if certificate is None else certificate.status
    if required is None or (status in CERTIFIED and CERTIFIED.index(status) <= CERTIFIED.index(required)):
        return None
    return f"the verdict is {status}, not {required}"
