"""What a task is: how its data become examples of a model, and how a model is scored on them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel

from .scores import Scores


class ScoringOptions(NamedTuple):
    """How a model is run over a task.

    Attributes:
        batch_size: examples per forward pass.
        max_length: tokens that an input is cut to.
        blocks: most blocks to take, from the start, of a text that is cut into blocks; None for all.
    """

    batch_size: int
    max_length: int
    blocks: int | None = None


def as_it_is(dataset: Dataset, model: PreTrainedModel, columns: list[str] | None = None) -> Dataset:
    """Return the data set unchanged: for tasks whose labels do not depend on a model's order of classes."""
    return dataset


def with_own_processor(function: Callable[..., Any], position: int) -> Callable[..., Any]:
    """Let a function work on a copy of its processor.

    A fast tokenizer remembers how it was last called: saved after that, it would cut what its users give it, or no
    longer cut what they had it cut.

    Args:
        function: the function.
        position: place of the processor among its arguments.

    Returns:
        A function of the same arguments, after which the processor is as before.
    """

    @wraps(function)
    def with_copy(*arguments: Any, **named: Any) -> Any:
        copied = [deepcopy(value) if place == position else value for place, value in enumerate(arguments)]
        processors = {name: deepcopy(named[name]) for name in ("tokenizer", "processor") if name in named}
        return function(*copied, **named | processors)

    return with_copy


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
        labelled: whether there are labels; without, the dense model's own answers are what is to be kept.
        max_length: tokens that an input is cut to by default.
        align: `(dataset, model) -> dataset` with labels in the model's order of classes; call it before `prepare`. The
            tasks with `columns` take those here, too.
        cuts_text: whether all rows are one text, and an example is a block of it.
    """

    auto_model: str
    processor: str
    prepare: Callable[..., Dataset]
    collator: Callable[[Any], Any]
    columns: tuple[str, ...] = ()
    labelled: bool = True
    max_length: int = 128
    align: Callable[..., Dataset] = as_it_is
    cuts_text: bool = False

    def __post_init__(self) -> None:
        """Let nothing that a task does to texts show in the tokenizer of its caller."""
        object.__setattr__(self, "prepare", with_own_processor(self.prepare, 1))


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

    def __post_init__(self) -> None:
        """Let neither preparing nor scoring show in the tokenizer of its caller."""
        super().__post_init__()
        object.__setattr__(self, "score", with_own_processor(self.score, 2))
