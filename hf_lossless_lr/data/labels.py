"""What a task head's labels and loss mean: the labels' names, the labelled units of a batch, the correct answers.

A *labelled unit* is what the loss averages over: an example of a classifier, a token of a language model or tagger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import find_labels

from ..errors import ConfigurationError, DataError
from .architectures import CTC, SHIFTED

IGNORE_INDEX = -100


def label_names(model: PreTrainedModel) -> list[str]:
    """Return the label arguments of a model's forward, such as `labels`, or `start_positions` and `end_positions`."""
    names: list[str] = find_labels(type(model))
    return [name for name in names if name != "next_sentence_label"] or ["labels"]


_LABELS = ("labels", "label", "label_ids", "start_positions")


def batch_examples(batch: Mapping[str, Any]) -> int:
    """Return the number of examples in a batch: that of its labels, which every example has.

    Other tensors may have one row for all examples (`position_ids`) or several for each (patches of pictures); without
    labels, the first tensor that is no `position_ids` counts.
    """
    names = [*_LABELS, *(name for name in batch if "label" in name)]
    for name in (*names, *(name for name in batch if name != "position_ids"), *batch):
        value = batch.get(name)
        if (isinstance(value, torch.Tensor) and value.ndim) or (name in names and isinstance(value, (list, tuple))):
            return len(value)
    return 0


def _is_one_of(model: PreTrainedModel, names: set[str]) -> bool:
    """Return whether these have the model's class, or one of Transformers that the user's own derives from."""
    return any(base.__name__ in names for base in type(model).__mro__)


def _target(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return the labels that the loss compares, without the first token of a left-to-right language model."""
    shifted = _is_one_of(model, SHIFTED) and not model.config.is_encoder_decoder
    return labels[..., 1:] if shifted and labels.ndim == 2 else labels


def labelled_units(model: PreTrainedModel, batch: Mapping[str, Any]) -> int:
    """Return how many labelled units the loss of this batch averages over.

    Integer labels count each entry that is not `-100` (shifted by one for causal language models); everything else
    (floating-point labels, the positions of a span, the transcript of a CTC head) counts examples.

    Args:
        model: the model whose loss it is.
        batch: keyword arguments of its forward.

    Returns:
        The number of units, possibly 0.

    Raises:
        ConfigurationError: if a CTC head sums its loss.
        DataError: if the batch has no labels.
    """
    names = [name for name in label_names(model) if isinstance(batch.get(name), (torch.Tensor, list, tuple))]
    if not names:
        raise DataError(
            f"the data has no labels: {type(model).__name__} takes {' or '.join(label_names(model))}, the batch has "
            f"{', '.join(batch)}. For a language model use DataCollatorForLanguageModeling, or labels=input_ids."
        )
    labels = batch[names[0]]
    if _is_one_of(model, CTC) and model.config.ctc_loss_reduction != "mean":
        raise ConfigurationError(
            f"{type(model).__name__} sums its loss over a batch (ctc_loss_reduction="
            f"{model.config.ctc_loss_reduction!r}), so that it depends on the batch size. Set "
            'model.config.ctc_loss_reduction = "mean".'
        )
    if not isinstance(labels, torch.Tensor):  # a dictionary of boxes for each picture
        return batch_examples(batch)
    if labels.is_floating_point() or names[0] == "start_positions" or _is_one_of(model, CTC):
        return batch_examples(batch)
    return int((_target(model, labels) != IGNORE_INDEX).sum())


class Question(NamedTuple):
    """One question that a head answers for each labelled unit, by choosing among classes.

    Attributes:
        logits: scores of the classes.  # shape: (units, classes)
        labels: the right class.  # shape: (units,)
        examples: index of each unit's example in the batch.  # shape: (units,)
    """

    logits: torch.Tensor
    labels: torch.Tensor
    examples: torch.Tensor


def questions(model: PreTrainedModel, batch: Mapping[str, Any], outputs: Any) -> list[Question]:
    """Return the questions behind the labelled units of a batch.

    Args:
        model: the model.
        batch: keyword arguments of its forward.
        outputs: what the forward returned.

    Returns:
        Two for question answering (start and end of the span), one for other classifying heads, none for regression,
        multi-label and CTC heads, and outputs without logits.
    """
    if "start_positions" in batch and hasattr(outputs, "start_logits"):
        examples = torch.arange(len(outputs.start_logits), device=outputs.start_logits.device)
        return [
            Question(outputs.start_logits, batch["start_positions"], examples),
            Question(outputs.end_logits, batch["end_positions"], examples),
        ]
    labels, logits = batch.get("labels"), getattr(outputs, "logits", None)
    if not isinstance(labels, torch.Tensor) or not isinstance(logits, torch.Tensor) or labels.is_floating_point():
        return []
    if _is_one_of(model, CTC):
        return []
    target = _target(model, labels)
    if logits.ndim != target.ndim + 1 or logits.shape[-1] < 2:
        return []
    if target is not labels and target.shape != labels.shape:
        logits = logits[..., :-1, :]
    if logits.shape[:-1] != target.shape:
        return []
    labelled = target != IGNORE_INDEX
    return [Question(logits[labelled], target[labelled], labelled.nonzero()[:, 0])]


def correct_predictions(asked: Sequence[Question]) -> torch.Tensor:
    """Return for each labelled unit whether the arg max answers all its questions correctly.

    Args:
        asked: at least one question, from `questions`.

    Returns:
        Booleans.  # shape: (units,)
    """
    return torch.stack([q.logits.argmax(-1) == q.labels for q in asked]).all(0)
