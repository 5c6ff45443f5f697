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
from datasets import Dataset, Value
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..errors import DataError
from .classification import (
    ACCURACY,
    accuracy_scores,
    align_labels,
    answer_examples,
    check_labels,
    divided,
    label_position,
    model_labels,
    warn_of_other_order,
)
from .pipelines import TASKS
from .scores import Score, Scores
from .sources import choose_columns
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


F1 = Score("F1", f1_of_sums)
MATTHEWS = Score("Matthews correlation", matthews_of_sums)
PEARSON = Score("Pearson correlation", pearson_of_sums)


class _Glue(NamedTuple):
    """What a GLUE task consists of; no label names for regression."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[Score, ...]
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
    return _TEXT.prepare(dataset, tokenizer, max_length, columns)


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


def glue_scores(name: str, predictions: np.ndarray, labels: np.ndarray, positive: int = 1) -> Scores:
    """Score answers to the examples of a GLUE task.

    Args:
        name: the task.
        predictions: classes, or similarities of any scale for `stsb`.  # shape: (examples,)
        labels: the right ones.  # shape: (examples,)
        positive: the class whose F1 is meant.

    Returns:
        The scores. The counts are 1 and whether the answer is right, with TP, FP, FN and TN for F1 and Matthews'
        correlation, or (1, x, y, x², y², x y) for `stsb`.
    """
    metrics = _TASKS[name].metrics
    if metrics == (ACCURACY,):
        return accuracy_scores(predictions, labels)
    if metrics == (PEARSON,):
        x, y = predictions.astype(np.float64), labels.astype(np.float64)
        x -= x.min()  # the correlation is the same, and no count is negative
        return Scores(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1), metrics)
    chosen, wanted = predictions == positive, labels == positive
    table = [chosen & wanted, chosen & ~wanted, ~chosen & wanted, ~chosen & ~wanted]
    return Scores(np.stack([np.ones(len(labels)), predictions == labels, *table], 1), metrics)


def _score(name: str, model: PreTrainedModel, dataset: Dataset, tokenizer: Any, options: ScoringOptions) -> Scores:
    parts, classes, collator = _TASKS[name], len(model_labels(model)), DataCollatorWithPadding(tokenizer)
    choose_columns(_TEXT, dataset.column_names, [*parts.texts, _LABEL])
    if parts.labels:
        dataset = align_labels(dataset, model, _LABEL, parts.labels)
    examples = _prepare(parts, dataset, tokenizer, options.max_length)
    if not parts.labels:
        if classes != 1:
            raise DataError(
                f"the labels are similarities, so the model must have one output (num_labels=1), but it has {classes}."
            )
        return glue_scores(name, *answer_examples(model, examples, collator, options, lambda logits: logits[:, 0]))
    predictions, labels = answer_examples(model, examples, collator, options)
    confusion = np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)
    warn_of_other_order(model, confusion)
    return glue_scores(name, predictions, labels, label_position(dataset, _LABEL, parts.labels[1], 1))


GLUE: dict[str, EvaluationTask] = {
    name: EvaluationTask(
        auto_model=_TEXT.auto_model,
        processor=_TEXT.processor,
        dataset=("nyu-mll/glue", parts.config or name, "train", parts.split),
        max_length=128,
        prepare=partial(_prepare, parts),
        collator=DataCollatorWithPadding,
        score=partial(_score, name),
        align=partial(align_labels, column=_LABEL, names=parts.labels) if parts.labels else as_it_is,
    )
    for name, parts in _TASKS.items()
}
"""The GLUE tasks by name; `mnli` is on the matched and `mnli_mismatched` on the mismatched validation set."""
