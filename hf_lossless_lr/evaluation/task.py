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


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the data of a task become examples of a model.

    Attributes:
        auto_model: name of the Auto class of its models.
        processor: name of the Auto class of their tokenizer or processor.
        prepare: `(dataset, processor, max_length) -> examples` with labels, as `compress` and `verify` take them; the
            tasks with `columns` also take the columns to use, as a fourth argument.
        collator: makes the collator of these examples from the processor.
        columns: default columns, first the inputs, last the label; `|` separates alternatives. Empty where the data
            set of the task has columns of its own.
        max_length: tokens that an input is cut to by default.
        align: `(dataset, model) -> dataset` with labels in the model's order of classes; call it before `prepare`.
    """

    auto_model: str
    processor: str
    prepare: Callable[..., Dataset]
    collator: Callable[[Any], Any]
    columns: tuple[str, ...] = ()
    max_length: int = 128
    align: Callable[[Dataset, PreTrainedModel], Dataset] = as_it_is


@dataclass(frozen=True, kw_only=True)
class EvaluationTask(Task):
    """A task that people publish figures on. It never knows that a model is compressed.

    Attributes:
        dataset: its data set on the hub: id, configuration, split to calibrate on, split to evaluate on.
        score: `(model, dataset, processor, options) -> scores`, one row of counts for each example of the data set
            (for a perplexity, for each block of text).
    """

    dataset: tuple[str, str | None, str, str]
    score: Callable[[PreTrainedModel, Dataset, Any, ScoringOptions], Scores]
