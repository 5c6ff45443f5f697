"""Data sets for the command line: from a hub id or local files to examples that a model takes.

Tasks have the names of Transformers' pipelines. Each prepares a `datasets.Dataset` whose columns are arguments of the
model's forward; padding is left to the collator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

from .errors import DataError
from .heads import IGNORE_INDEX


@dataclass(frozen=True)
class Task:
    """How a task's data is prepared.

    Attributes:
        auto_model: name of the Auto class of its models.
        processor: name of the Auto class of its tokenizer or processor.
        prepare: `(dataset, processor, columns, max_length) -> dataset` of examples.
        columns: default columns, first the inputs, last the label; `|` separates alternatives.
        collator: makes a collator from the processor.
    """

    auto_model: str
    processor: str
    prepare: Callable[[Dataset, Any, list[str], int], Dataset]
    columns: tuple[str, ...]
    collator: Callable[[Any], Any]


def _text_classification(dataset: Dataset, tokenizer: Any, columns: list[str], max_length: int) -> Dataset:
    *texts, label = columns

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[column] for column in texts), truncation=True, max_length=max_length)
        return {**encoded, "labels": batch[label]}

    return dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)


def _token_classification(dataset: Dataset, tokenizer: Any, columns: list[str], max_length: int) -> Dataset:
    """Label the first piece of each word; other pieces and special tokens do not count."""
    words, tags = columns

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch[words], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = []
        for index, word_tags in enumerate(batch[tags]):
            previous, row = None, []
            for word in encoded.word_ids(index):
                row.append(IGNORE_INDEX if word is None or word == previous else word_tags[word])
                previous = word
            labels.append(row)
        return {**encoded, "labels": labels}

    return dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)


def _text_generation(dataset: Dataset, tokenizer: Any, columns: list[str], max_length: int) -> Dataset:
    """Join all texts and cut them into blocks of `max_length` tokens; the incomplete last block is dropped."""
    (text,) = columns
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = [
        token for ids in tokenizer(list(dataset[text]), add_special_tokens=False)["input_ids"] for token in ids + end
    ]
    blocks = [stream[i : i + max_length] for i in range(0, len(stream) - max_length + 1, max_length)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _image_classification(dataset: Dataset, processor: Any, columns: list[str], max_length: int) -> Dataset:
    image, label = columns

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = processor([picture.convert("RGB") for picture in batch[image]], return_tensors="np")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch[label]}

    return dataset.map(process, batched=True, batch_size=64, remove_columns=dataset.column_names)


TASKS: dict[str, Task] = {
    "text-classification": Task(
        "AutoModelForSequenceClassification",
        "AutoTokenizer",
        _text_classification,
        (
            "premise|question1|sentence1|question|sentence|text",
            "hypothesis|question2|sentence2|sentence|",
            "label|labels",
        ),
        DataCollatorWithPadding,
    ),
    "token-classification": Task(
        "AutoModelForTokenClassification",
        "AutoTokenizer",
        _token_classification,
        ("tokens|words", "ner_tags|tags|labels"),
        DataCollatorForTokenClassification,
    ),
    "text-generation": Task(
        "AutoModelForCausalLM", "AutoTokenizer", _text_generation, ("text",), lambda tokenizer: default_data_collator
    ),
    "image-classification": Task(
        "AutoModelForImageClassification",
        "AutoImageProcessor",
        _image_classification,
        ("image|img", "label|labels"),
        lambda processor: default_data_collator,
    ),
}
"""Tasks of the command line."""


def choose_columns(task: Task, available: list[str], given: list[str] | None = None) -> list[str]:
    """Return the columns to use, the label last where the task has one.

    Args:
        task: the task.
        available: columns of the data set.
        given: columns that the user named.

    Returns:
        Column names.

    Raises:
        DataError: if a column does not exist, or none of the usual names does.
    """
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


def load_split(
    path: str, name: str | None, data_files: str | list[str] | None, split: str, examples: int | None
) -> Dataset:
    """Load a split of a data set from the hub, a folder, or files.

    Args:
        path: hub id, a folder (also one written by `save_to_disk`), or a format such as `json`, `csv`, `parquet`.
        name: configuration of the data set.
        data_files: files to read, for a format.
        split: split to take.
        examples: how many examples to take from the start; None for all.

    Returns:
        The data set.

    Raises:
        DataError: if it cannot be loaded or has no such split.
    """
    saved = any(Path(path, file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if data_files is not None:
            data: Any = load_dataset(path, name, data_files={split: data_files})
        else:
            data = load_from_disk(path) if saved else load_dataset(path, name)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"cannot load the data set {path!r}: {error.__cause__ or error}") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise DataError(f"the data set {path!r} has no split {split!r}; it has {', '.join(data)}.")
        data = data[split]
    return data if examples is None else data.select(range(min(examples, len(data))))
