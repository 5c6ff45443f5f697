"""What a task is: how its data become examples of a model, and how a model is scored on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel

from .scores import Scores


class ScoringOptions(NamedTuple):
    """How a model is run over a task.

    Attributes:
        batch_size: examples per forward pass.
        max_length: tokens that an input is cut to.
    """

    batch_size: int
    max_length: int


def as_it_is(dataset: Dataset, model: PreTrainedModel) -> Dataset:
    """Return the data set unchanged: for tasks whose labels do not depend on a model's order of classes."""
    return dataset


@dataclass(frozen=True)
class EvaluationTask:
    """A task that people publish figures on. It never knows that a model is compressed.

    Attributes:
        auto_model: name of the Auto class of its models.
        processor: name of the Auto class of their tokenizer or processor.
        dataset: its data set on the hub: id, configuration, split to calibrate on, split to evaluate on.
        max_length: tokens that an input is cut to by default.
        prepare: `(dataset, processor, max_length) -> examples` with labels, as `compress` and `verify`
            take them.
        collator: makes the collator of these examples from the processor.
        score: `(model, dataset, processor, options) -> scores`, one row of counts for each example of the data set
            (for a perplexity, for each block of text).
        align: `(dataset, model) -> dataset` with labels in the model's order of classes; call it before `prepare`.
    """

    auto_model: str
    processor: str
    dataset: tuple[str, str | None, str, str]
    max_length: int
    prepare: Callable[[Dataset, Any, int], Dataset]
    collator: Callable[[Any], Any]
    score: Callable[[PreTrainedModel, Dataset, Any, ScoringOptions], Scores]
    align: Callable[[Dataset, PreTrainedModel], Dataset] = as_it_is


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
