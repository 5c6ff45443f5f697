"""GLUE: nine tasks on English sentences, each with its own metrics.

Spearman's correlation of STS-B is left out: ranks are not sums, so leaving out an example changes those of all others.

Source: A. Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding, ICLR
    2019.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Value
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..data import TASKS, choose_columns
from ..errors import DataError
from .classification import (
    ACCURACY,
    align_labels,
    check_labels,
    count_answers,
    divided,
    label_position,
    model_labels,
    right_answers,
    warn_of_other_order,
)
from .scores import Metric, Scores
from .task import EvaluationTask, ScoringOptions, as_it_is

_TEXT = TASKS["text-classification"]
_LABEL = "label"
_ROUNDING = 1e-13  # a variance below this share of the mean square is a rounding error


def f1_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return F1 of the positive class, `2 TP / (2 TP + FP + FN)`, of (examples, right, TP, FP, FN, TN)."""
    _, _, tp, fp, fn, _ = np.moveaxis(sums, -1, 0)
    return divided(2 * tp, 2 * tp + fp + fn)


def matthews_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return Matthews' correlation of (examples, right, TP, FP, FN, TN).

    `(TP TN − FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))`
    """
    _, _, tp, fp, fn, tn = np.moveaxis(sums, -1, 0)
    return divided(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def pearson_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of (examples, x, y, x², y², x y); 0 where one of them is constant."""
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    x_spread, y_spread = count * xx - x**2, count * yy - y**2
    constant = (x_spread <= _ROUNDING * count * xx) | (y_spread <= _ROUNDING * count * yy)
    return divided(count * xy - x * y, np.where(constant, 0, np.sqrt(np.maximum(x_spread * y_spread, 0))))


F1 = Metric("F1", f1_of_sums)
MATTHEWS = Metric("Matthews correlation", matthews_of_sums)
PEARSON = Metric("Pearson correlation", pearson_of_sums)


class _Glue(NamedTuple):
    """What a GLUE task consists of; no label names for regression."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...]
    split: str = "validation"
    config: str | None = None


_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = _Glue(
    ("premise", "hypothesis"),
    ("entailment", "neutral", "contradiction"),
    (ACCURACY,),
    "validation_matched",
    "mnli",
)
_TASKS = {
    "cola": _Glue(("sentence",), ("unacceptable", "acceptable"), (MATTHEWS,)),
    "sst2": _Glue(("sentence",), ("negative", "positive"), (ACCURACY,)),
    "mrpc": _Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), (F1, ACCURACY)),
    "qqp": _Glue(("question1", "question2"), ("not_duplicate", "duplicate"), (F1, ACCURACY)),
    "stsb": _Glue(("sentence1", "sentence2"), (), (PEARSON,)),
    "mnli": _MNLI,
    "mnli_mismatched": _MNLI._replace(split="validation_mismatched"),
    "qnli": _Glue(("question", "sentence"), _ENTAILMENT, (ACCURACY,)),
    "rte": _Glue(("sentence1", "sentence2"), _ENTAILMENT, (ACCURACY,)),
    "wnli": _Glue(("sentence1", "sentence2"), _ENTAILMENT[::-1], (ACCURACY,)),
}

GLUE_LABELS: dict[str, tuple[str, ...]] = {name: parts.labels for name, parts in _TASKS.items()}
"""Names of the labels 0, 1, ... of each task, for `classification.align_labels`; none for `stsb`."""


def _prepare(parts: _Glue, dataset: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    columns = choose_columns(_TEXT, dataset.column_names, [*parts.texts, _LABEL])
    if parts.labels:
        check_labels(dataset, _LABEL)
    else:
        dataset = _with_scores(dataset)
    return _TEXT.prepare(dataset, tokenizer, columns, max_length)


def _with_scores(dataset: Dataset) -> Dataset:
    """Check the labels of a regression and return them as floating-point numbers, which is how a model tells it."""
    if not len(dataset):
        raise DataError("the data set is empty.")
    for index, label in enumerate(dataset[_LABEL]):
        if not isinstance(label, (int, float)) or not math.isfinite(label):
            raise DataError(f"the label of example {index} is {label!r}; a similarity must be a number from 0.")
        if label < 0:
            raise DataError(
                f"the label of example {index} is {label}: the labels of this split are hidden. Take a split that has "
                "them, such as the validation split."
            )
    return dataset.cast_column(_LABEL, Value("float32"))


def _score(parts: _Glue, model: PreTrainedModel, dataset: Dataset, tokenizer: Any, options: ScoringOptions) -> Scores:
    choose_columns(_TEXT, dataset.column_names, [*parts.texts, _LABEL])
    collator = DataCollatorWithPadding(tokenizer)
    if not parts.labels:
        return _score_similarity(
            parts, model, _prepare(parts, dataset, tokenizer, options.max_length), collator, options
        )
    aligned = align_labels(dataset, model, _LABEL, parts.labels)
    positive = label_position(aligned, _LABEL, parts.labels[1], 1)
    classes = len(model_labels(model))

    def count(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chosen, wanted = logits.argmax(-1) == positive, labels == positive
        table = torch.stack([chosen & wanted, chosen & ~wanted, ~chosen & wanted, ~chosen & ~wanted], -1)
        cell = torch.nn.functional.one_hot(labels * classes + logits.argmax(-1), classes**2)
        return torch.cat([right_answers(logits, labels), table, cell], -1)

    examples = _prepare(parts, aligned, tokenizer, options.max_length)
    counts = count_answers(model, examples, collator, options, count)
    warn_of_other_order(model, counts[:, 6:].sum(0).reshape(classes, classes))
    return Scores(counts[:, : 2 if parts.metrics == (ACCURACY,) else 6], parts.metrics)


def _score_similarity(
    parts: _Glue, model: PreTrainedModel, examples: Dataset, collator: Any, options: ScoringOptions
) -> Scores:
    outputs = len(model_labels(model))
    if outputs != 1:
        raise DataError(
            f"the labels are similarities, so the model must have one output (num_labels=1), but it has {outputs}."
        )
    pairs = count_answers(
        model, examples, collator, options, lambda logits, labels: torch.stack([logits[:, 0], labels.float()], -1)
    )
    x, y = pairs[:, 0] - pairs[:, 0].min(), pairs[:, 1]  # the correlation is the same, and no count is negative
    return Scores(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1), parts.metrics)


GLUE: dict[str, EvaluationTask] = {
    name: EvaluationTask(
        auto_model=_TEXT.auto_model,
        processor=_TEXT.processor,
        dataset=("nyu-mll/glue", parts.config or name, "train", parts.split),
        max_length=128,
        prepare=partial(_prepare, parts),
        collator=DataCollatorWithPadding,
        score=partial(_score, parts),
        align=partial(align_labels, column=_LABEL, names=parts.labels) if parts.labels else as_it_is,
    )
    for name, parts in _TASKS.items()
}
"""The GLUE tasks by name; `mnli` is on the matched and `mnli_mismatched` on the mismatched validation set."""
