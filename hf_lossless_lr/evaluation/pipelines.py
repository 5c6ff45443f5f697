"""Tasks with the names of Transformers' pipelines.

Each prepares a `datasets.Dataset` whose columns are arguments of the model's forward; padding is left to the collator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

from ..data import IGNORE_INDEX
from ..errors import DataError
from .classification import align_labels
from .sources import check_pictures, check_texts, choose_columns
from .task import Task

Columns = list[str] | None


def _check_tags(dataset: Dataset, words: str, tags: str) -> None:
    for index, (row, row_tags) in enumerate(zip(dataset[words], dataset[tags], strict=True)):
        if not isinstance(row, list) or not all(isinstance(word, str) for word in row):
            raise DataError(
                f"row {index} of the data set has {str(row)[:80]} in {words!r}, which is no list of words."
            )
        if not isinstance(row_tags, list) or len(row_tags) != len(row):
            given = f"{len(row_tags)} tags" if isinstance(row_tags, list) else f"the tags {row_tags!r}"
            raise DataError(f"row {index} of the data set has {len(row)} words and {given}; each word takes one.")


def _text_classification(dataset: Dataset, tokenizer: Any, max_length: int, columns: Columns = None) -> Dataset:
    *texts, label = choose_columns(TASKS["text-classification"], dataset.column_names, columns)
    check_texts(dataset, *texts)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[column] for column in texts), truncation=True, max_length=max_length)
        return {**encoded, "labels": batch[label]}

    return dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)


def _token_classification(dataset: Dataset, tokenizer: Any, max_length: int, columns: Columns = None) -> Dataset:
    """Label the first piece of each word; other pieces and special tokens do not count."""
    words, tags = choose_columns(TASKS["token-classification"], dataset.column_names, columns)

    _check_tags(dataset, words, tags)

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


def _text_generation(dataset: Dataset, tokenizer: Any, max_length: int, columns: Columns = None) -> Dataset:
    """Join all texts and cut them into blocks of `max_length` tokens; the incomplete last block is dropped."""
    (text,) = choose_columns(TASKS["text-generation"], dataset.column_names, columns)
    check_texts(dataset, text)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = [
        token for ids in tokenizer(list(dataset[text]), add_special_tokens=False)["input_ids"] for token in ids + end
    ]
    blocks = [stream[i : i + max_length] for i in range(0, len(stream) - max_length + 1, max_length)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _feature_extraction(dataset: Dataset, tokenizer: Any, max_length: int, columns: Columns = None) -> Dataset:
    (text,) = choose_columns(TASKS["feature-extraction"], dataset.column_names, columns)
    check_texts(dataset, text)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(batch[text], truncation=True, max_length=max_length))

    return dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)


def _image_classification(dataset: Dataset, processor: Any, max_length: int, columns: Columns = None) -> Dataset:
    image, label = choose_columns(TASKS["image-classification"], dataset.column_names, columns)
    check_pictures(dataset, image)

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = processor([picture.convert("RGB") for picture in batch[image]], return_tensors="np")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch[label]}

    return dataset.map(process, batched=True, batch_size=64, remove_columns=dataset.column_names)


def _aligned(name: str) -> Callable[..., Dataset]:
    """Return what numbers the classes of a data set as a model does, where both of them name them."""

    def align(dataset: Dataset, model: PreTrainedModel, columns: Columns = None) -> Dataset:
        label = choose_columns(TASKS[name], dataset.column_names, columns)[-1]
        named = isinstance(dataset.features[label], ClassLabel)
        return align_labels(dataset, model, label) if named else dataset

    return align


TASKS: dict[str, Task] = {
    "text-classification": Task(
        auto_model="AutoModelForSequenceClassification",
        processor="AutoTokenizer",
        prepare=_text_classification,
        collator=DataCollatorWithPadding,
        columns=(
            "premise|question1|sentence1|question|sentence|text",
            "hypothesis|question2|sentence2|sentence|",
            "label|labels",
        ),
        align=_aligned("text-classification"),
    ),
    "token-classification": Task(
        auto_model="AutoModelForTokenClassification",
        processor="AutoTokenizer",
        prepare=_token_classification,
        collator=DataCollatorForTokenClassification,
        columns=("tokens|words", "ner_tags|tags|labels"),
    ),
    "feature-extraction": Task(
        auto_model="AutoModel",
        processor="AutoTokenizer",
        prepare=_feature_extraction,
        collator=DataCollatorWithPadding,
        columns=("text|sentence",),
        labelled=False,
    ),
    "text-generation": Task(
        auto_model="AutoModelForCausalLM",
        processor="AutoTokenizer",
        prepare=_text_generation,
        collator=lambda tokenizer: default_data_collator,
        columns=("text",),
        cuts_text=True,
    ),
    "image-classification": Task(
        auto_model="AutoModelForImageClassification",
        processor="AutoImageProcessor",
        prepare=_image_classification,
        collator=lambda processor: default_data_collator,
        columns=("image|img", "label|labels"),
        align=_aligned("image-classification"),
    ),
}
"""Tasks with the names of Transformers' pipelines, for any data set of their kind."""
