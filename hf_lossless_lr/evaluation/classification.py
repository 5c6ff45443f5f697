"""Heads that give one answer to each example: their labels, their answers, and metrics of summed counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import make_dataloader
from ..errors import DataError, NumericalError
from ..layers import evaluating
from .scores import Score, Scores
from .task import ScoringOptions

logger = logging.get_logger(__name__)


_PLACEHOLDER = re.compile(r"(label[ _-]?)?\d+", re.IGNORECASE)  # LABEL_0 and 0 say nothing
_SHOWN = 5  # names of labels in a message
_OTHER_ORDER = 0.25  # accuracy that another order of the labels must add to be reported,
_ENOUGH = 100  # and the examples from which on that is not chance


def divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient, and 0 where the denominator is 0, as scikit-learn defines F1 and Matthews' coefficient."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(denominator)), where=denominator != 0)


def share(name: str, column: int) -> Score:
    """Return the metric "sum of a column divided by the number of examples", where column 0 counts the examples."""
    return Score(name, lambda sums: divided(sums[..., column], sums[..., 0]), right=lambda counts: counts[..., column])


ACCURACY = share("accuracy", 1)
"""Share of right answers, of the counts that `accuracy_scores` gives."""


def accuracy_scores(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    """Score classes, (examples,), against labels, (examples,); the counts are 1, and whether the two are equal."""
    return Scores(np.stack([np.ones(len(labels)), predictions == labels], 1), (ACCURACY,))


def model_labels(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's labels in their order; their number is that of its outputs."""
    names: dict[Any, str] = {**(model.config.id2label or {})}
    return [str(names[index]) for index in sorted(names, key=int)]


def check_labels(dataset: Dataset, column: str) -> np.ndarray:
    """Return the labels of a data set, checked.

    Args:
        dataset: the data set.
        column: its column of labels.

    Returns:
        Whole numbers from 0.  # shape: (examples,)

    Raises:
        DataError: if there is no example or no such column, or a label is missing, hidden or no whole number.
    """
    if column not in dataset.column_names:
        raise DataError(f"the data set has no column {column!r}; it has {', '.join(dataset.column_names)}.")
    if not len(dataset):
        raise DataError("the data set is empty.")
    labels = list(dataset.with_format(None).select_columns(column)[column])
    for index, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int):
            raise DataError(f"the label of example {index} is {label!r}; labels must be whole numbers from 0.")
        if label < 0:
            raise DataError(
                f"the label of example {index} is {label}: the labels of this split are hidden. Take a split that has "
                "them, such as the validation split."
            )
    return np.array(labels)


def align_labels(
    dataset: Dataset, model: PreTrainedModel, column: str = "label", names: Sequence[str] = ()
) -> Dataset:
    """Number the labels of a data set as the model does, by their names.

    Names are compared without regard to case. Where the model or the data set has none (but LABEL_0 and the like, or
    numbers), or they have no name in common, the labels keep their numbers.

    Args:
        dataset: a data set with a column of labels.
        model: a classifier.
        column: the column.
        names: what the labels 0, 1, ... of such data mean, for data that do not say.

    Returns:
        The data set itself if its labels are as the model's, else one with other labels, which have the model's names.

    Raises:
        DataError: if the labels cannot be used, or cannot be told to be the model's.
    """
    labels = check_labels(dataset, column)
    feature = dataset.features[column]
    own = list(feature.names) if isinstance(feature, ClassLabel) else []
    if not own and names:  # each label must occur: two of three would be another task
        own = list(names) if labels.max() + 1 == len(names) else [str(label) for label in range(labels.max() + 1)]
    theirs = model_labels(model)
    order = _order(own, theirs)
    if labels.max() >= (len(order) or len(theirs)):
        raise DataError(f"the data set has the label {labels.max()}, but {_described(own, theirs)}.")
    if all(place == label for label, place in enumerate(order)):
        return dataset
    unique = [name if theirs.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(theirs)]
    aligned = dataset.remove_columns(column)
    return aligned.add_column(column, np.array(order)[labels], feature=ClassLabel(names=unique))


def _order(own: Sequence[str], theirs: Sequence[str]) -> list[int]:
    """Return the model's number of each label of the data, [] for data of unnamed and uncounted labels."""
    same = list(range(len(own)))
    if own and informative(own) and informative(theirs):
        mine, others = [_plain(name) for name in own], [_plain(name) for name in theirs]
        order = [others.index(name) if mine.count(name) == others.count(name) == 1 else -1 for name in mine]
        if -1 not in order:
            return order
        found = [(label, place) for label, place in enumerate(order) if place >= 0]
        if len(own) != len(theirs) or any(label != place for label, place in found):
            raise DataError(
                f"{_described(own, theirs)}, and they cannot be matched by name. Give a model of this task, or set "
                "model.config.id2label to the names of the data set."
            )
        if not found:
            logger.warning(
                "%s: they have no name in common, so their order is taken to be the same.", _described(own, theirs)
            )
    elif own and len(own) != len(theirs):
        raise DataError(
            f"{_described(own, theirs)}. Give a model of this task; if it is one and the data only happen to lack a "
            "label, cast their column to datasets.ClassLabel with the names of all."
        )
    return same


def informative(names: Sequence[str]) -> bool:
    """Return whether the names of labels mean something, unlike `LABEL_0` and `0`."""
    return not all(_PLACEHOLDER.fullmatch(name) for name in names)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def label_position(dataset: Dataset, column: str, name: str, default: int) -> int:
    """Return the number of a label by its name, or a default where the data set has no such name."""
    feature = dataset.features[column]
    names = [_plain(each) for each in feature.names] if isinstance(feature, ClassLabel) else []
    return names.index(_plain(name)) if _plain(name) in names else default


def _described(own: Sequence[str], theirs: Sequence[str]) -> str:
    return f"the data set has {_listed(own)} and the model {_listed(theirs)}"


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "unnamed labels"
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} label{'' if len(names) == 1 else 's'} ({', '.join(names[:_SHOWN])}{more})"


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Return the class of the largest logit."""
    return logits.argmax(-1)


def answer_examples(
    model: PreTrainedModel,
    examples: Dataset,
    collator: Any,
    options: ScoringOptions,
    choose: Callable[[torch.Tensor], torch.Tensor] = largest,
) -> tuple[np.ndarray, np.ndarray]:
    """Run a model over prepared examples.

    Args:
        model: the model; its training mode is restored.
        examples: examples with labels.
        collator: collator of the examples.
        options: the batch size.
        choose: from logits, (batch, classes), in float32, to answers, (batch, ...).

    Returns:
        The answers and the labels, in the order of the examples.  # shapes: (examples, ...), (examples,)

    Raises:
        DataError: if there are too few examples, or the model does not give one row of logits for each.
        NumericalError: if a logit is not finite.
    """
    loader = make_dataloader(
        examples, model, batch_size=options.batch_size, data_collator=collator, name="the data set"
    )
    answers, wanted = [], []
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(logging.tqdm(loader, desc="Scoring")):
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            labels = inputs.pop("labels")  # without them there is no loss to compute
            logits = getattr(model(**inputs), "logits", None)
            if logits is None or logits.ndim != 2 or len(logits) != len(labels):
                raise DataError(
                    f"{type(model).__name__} does not give one row of logits for each example; use a model class with "
                    "the task's head."
                )
            if not torch.isfinite(logits).all():
                raise NumericalError(f"batch {index}: a logit is not finite; check the model and the inputs.")
            answers.append(choose(logits.float()).cpu().numpy())
            wanted.append(labels.cpu().numpy())
    return np.concatenate(answers), np.concatenate(wanted)


def warn_of_other_order(model: PreTrainedModel, confusion: np.ndarray) -> None:
    """Warn where a model whose labels have no names answers much better if they are taken in another order.

    Args:
        model: the model.
        confusion: examples by label of the data and answer of the model.  # shape: (labels, labels)
    """
    from scipy.optimize import linear_sum_assignment  # here: scipy is slow to import

    names = model_labels(model)
    if informative(names) or confusion.sum() < _ENOUGH:
        return
    rows, columns = linear_sum_assignment(confusion, maximize=True)
    best, found = confusion[rows, columns].sum() / confusion.sum(), np.trace(confusion) / confusion.sum()
    if best - found > _OTHER_ORDER:
        logger.warning(
            "the accuracy is %.3f, but it would be %.3f if the labels 0, 1, ... of the data were the model's %s. The "
            "model names its labels %s; if their order differs, set model.config.id2label to their true names.",
            found,
            best,
            ", ".join(map(str, columns)),
            ", ".join(names[:_SHOWN]),
        )
