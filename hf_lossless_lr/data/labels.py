"""What a task head's labels and loss mean: the labels' names, the labelled units of a batch, the correct answers.

A *labelled unit* is what the loss averages over: an example of a classifier, a token of a language model or tagger.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import find_labels

from ..errors import ConfigurationError, DataError
from .alignment import main_loss, measured_shift, shift_by_gradient
from .architectures import CTC

IGNORE_INDEX = -100


_TARGETS = ("future_values", "target_values")  # what models of time series call their labels


def takes_labels(model: PreTrainedModel) -> bool:
    """Return whether a model's forward has an argument for labels."""
    return bool(_label_arguments(model))


def label_names(model: PreTrainedModel) -> list[str]:
    """Return the label arguments of a model's forward, such as `labels`, or `start_positions` and `end_positions`."""
    return [name for name in _label_arguments(model) if name != "next_sentence_label"] or ["labels"]


def _label_arguments(model: PreTrainedModel) -> list[str]:
    arguments: list[str] = find_labels(type(model))
    targets = [name for name in inspect.signature(type(model).forward).parameters if name in _TARGETS]
    headless = bool(targets) and model.base_model is model  # it may take targets as inputs
    return arguments or ([] if headless else targets)


ALIASES = ("label", "label_ids")  # names that the default collators turn into `labels`


def label_columns(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the columns of an example that are labels of a model, under the names of its forward or of a collator."""
    return (*label_names(model), *ALIASES)


_LABELS = ("labels", *ALIASES, "start_positions")


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


class Reading(NamedTuple):
    """What the labels of a batch ask, as the model's loss reads them.

    Attributes:
        units: labelled units that the loss averages over, possibly 0.
        questions: two for question answering (start and end of the span), one for other classifying heads, none for
            regression, multi-label and CTC heads, and for outputs without logits.
        explained: whether it is known which logits answer to which labels: those of the same position, or of the one
            before. If not, there are no questions, and units are the labels that are not `-100`.
        shift: by how many positions the labels are ahead of these logits; None where that is not asked, or not known.
    """

    units: int
    questions: list[Question]
    explained: bool = True
    shift: int | None = None


def check_labels(model: PreTrainedModel, batch: Mapping[str, Any]) -> str:
    """Return the name of the labels in a batch.

    Args:
        model: the model whose labels they are.
        batch: keyword arguments of its forward.

    Returns:
        The first of `label_names` that the batch has.

    Raises:
        ConfigurationError: if a CTC head sums its loss.
        DataError: if the batch has no labels.
    """
    names = [name for name in label_names(model) if isinstance(batch.get(name), (torch.Tensor, list, tuple))]
    if not names and not takes_labels(model):
        raise DataError(
            f"{type(model).__name__} takes no labels, and a model is judged by its loss on labelled examples. Compare "
            "its representations with labels='model', take a class with a task head, or write one whose forward takes "
            "labels and returns their loss: examples/your_own_task.py."
        )
    if not names:
        raise DataError(
            f"the data has no labels: {type(model).__name__} takes {' or '.join(label_names(model))}, the batch has "
            f"{', '.join(batch)}. For a language model use DataCollatorForLanguageModeling, or labels=input_ids; "
            "others need none with labels='model'."
        )
    if _is_ctc(model) and model.config.ctc_loss_reduction != "mean":
        raise ConfigurationError(
            f"{type(model).__name__} sums its loss over a batch (ctc_loss_reduction="
            f"{model.config.ctc_loss_reduction!r}), so that it depends on the batch size. Set "
            'model.config.ctc_loss_reduction = "mean".'
        )
    return names[0]


def read_labels(
    model: PreTrainedModel, batch: Mapping[str, Any], outputs: Any, loss: torch.Tensor, known: int | None = None
) -> Reading:
    """Return what the labels of a batch ask.

    Integer labels count each entry that is not `-100`; everything else (floating-point labels, the positions of a
    span, the transcript of a CTC head) counts examples. For labels of sequences the loss itself shows which logits
    answer to which labels: those of the same position, or (left-to-right language models) of the one before.

    Args:
        model: the model whose loss it is.
        batch: keyword arguments of its forward, with labels.
        outputs: what the forward returned.
        loss: its loss.
        known: the shift of another model of the same class, whose loss may show another one by chance (one that
            predicts several tokens, for example); None to find it.

    Returns:
        The units and the questions behind them.
    """
    name = check_labels(model, batch)
    labels, logits = batch[name], getattr(outputs, "logits", None)
    if not isinstance(labels, torch.Tensor):  # a dictionary of boxes for each picture
        return Reading(batch_examples(batch), [])
    if name == "start_positions" and hasattr(outputs, "start_logits"):
        examples = torch.arange(len(outputs.start_logits), device=outputs.start_logits.device)
        spans = ((outputs.start_logits, "start_positions"), (outputs.end_logits, "end_positions"))
        return Reading(batch_examples(batch), [Question(scores, batch[key], examples) for scores, key in spans])
    if labels.is_floating_point() or name == "start_positions" or _is_ctc(model):
        return Reading(batch_examples(batch), [])
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 <= logits.shape[-1] and labels.shape[1:] == (1,):
        labels = labels.squeeze(1)  # the loss takes it as one class for each example
    labelled = labels != IGNORE_INDEX
    classes = isinstance(logits, torch.Tensor) and logits.ndim == labels.ndim + 1 and logits.shape[-1] >= 2
    if not isinstance(logits, torch.Tensor) or not classes or logits.shape[:-1] != labels.shape:
        return Reading(int(labelled.sum()), [], explained=labels.ndim == 1)
    if labels.ndim == 1:
        return Reading(int(labelled.sum()), [_question(logits, labels)])
    shift = known
    if shift is None:
        shift = measured_shift(logits, labels, main_loss(model, outputs, loss), IGNORE_INDEX)
    if shift is None:
        shift = shift_by_gradient(model, batch, outputs, loss, labels, IGNORE_INDEX)
    if shift is None:
        return Reading(int(labelled.sum()), [], explained=False)
    question = _question(logits[..., : logits.shape[-2] - shift, :], labels[..., shift:])
    return Reading(len(question.labels), [question], shift=shift)


def _question(logits: torch.Tensor, labels: torch.Tensor) -> Question:
    labelled = labels != IGNORE_INDEX
    return Question(logits[labelled], labels[labelled], labelled.nonzero()[:, 0])


def _is_ctc(model: PreTrainedModel) -> bool:
    """Return whether a head is for CTC: its class, or one of Transformers that the user's own derives from."""
    return any(base.__name__ in CTC for base in type(model).__mro__)


def correct_predictions(asked: Sequence[Question]) -> torch.Tensor:
    """Return for each labelled unit whether the arg max answers all its questions correctly.

    Args:
        asked: at least one question, from `read_labels`.

    Returns:
        Booleans.  # shape: (units,)
    """
    return torch.stack([q.logits.argmax(-1) == q.labels for q in asked]).all(0)
