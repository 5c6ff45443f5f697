"""Tasks with the names of Transformers' pipelines.

Each prepares a `datasets.Dataset` whose columns are arguments of the model's forward; padding is left to the collator.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

from ..data import IGNORE_INDEX
from .task import Task


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
