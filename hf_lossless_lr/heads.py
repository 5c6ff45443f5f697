"""What a task head's labels and loss mean: the labels' names, the labelled units of a batch, the correct answers.

A *labelled unit* is what the loss averages over: an example of a classifier, a token of a language model or tagger.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import find_labels

from .errors import DataError, NumericalError

IGNORE_INDEX = -100
_SHIFTED = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) | set(
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
)
_SHIFTED -= {"XLNetLMHeadModel", "XLMWithLMHeadModel"}  # they compare each position with its own label


def label_names(model: PreTrainedModel) -> list[str]:
    """Return the label arguments of a model's forward, such as `labels`, or `start_positions` and `end_positions`."""
    names: list[str] = find_labels(type(model))
    return [name for name in names if name != "next_sentence_label"] or ["labels"]


def _first_tensor(batch: Mapping[str, Any]) -> torch.Tensor:
    return next(value for value in batch.values() if isinstance(value, torch.Tensor))


def batch_examples(batch: Mapping[str, Any]) -> int:
    """Return the number of examples in a batch."""
    return len(_first_tensor(batch))


def _target(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return the labels that the loss compares, without the first token of a left-to-right language model."""
    shifted = type(model).__name__ in _SHIFTED and not model.config.is_encoder_decoder
    return labels[..., 1:] if shifted and labels.ndim == 2 else labels


def _per_token(labels: torch.Tensor) -> bool:
    return labels.ndim >= 2 and not labels.is_floating_point()


def labelled_units(model: PreTrainedModel, batch: Mapping[str, Any]) -> int:
    """Return how many labelled units the loss of this batch averages over.

    Integer labels with two or more dimensions count each entry that is not `-100` (shifted by one for causal language
    models); everything else counts examples.

    Args:
        model: the model whose loss it is.
        batch: keyword arguments of its forward.

    Returns:
        The number of units, possibly 0.

    Raises:
        DataError: if the batch has no labels.
    """
    names = [name for name in label_names(model) if isinstance(batch.get(name), torch.Tensor)]
    if not names:
        raise DataError(
            f"the data has no labels: {type(model).__name__} takes {' or '.join(label_names(model))}, the batch has "
            f"{', '.join(batch)}. For a language model use DataCollatorForLanguageModeling, or labels=input_ids."
        )
    labels = batch[names[0]]
    if not _per_token(labels):
        return batch_examples(batch)
    return int((_target(model, labels) != IGNORE_INDEX).sum())


def correct_predictions(model: PreTrainedModel, batch: Mapping[str, Any], outputs: Any) -> int | None:
    """Return how many labelled units the arg max of the logits answers correctly.

    Question answering counts examples whose start and end are both right. Regression, multi-label heads and outputs
    without logits have no such count.

    Args:
        model: the model.
        batch: keyword arguments of its forward.
        outputs: what the forward returned.

    Returns:
        The count, or None where accuracy means nothing.
    """
    if "start_positions" in batch and hasattr(outputs, "start_logits"):
        start = outputs.start_logits.argmax(-1) == batch["start_positions"]
        return int((start & (outputs.end_logits.argmax(-1) == batch["end_positions"])).sum())
    labels, logits = batch.get("labels"), getattr(outputs, "logits", None)
    if not isinstance(labels, torch.Tensor) or not isinstance(logits, torch.Tensor) or labels.is_floating_point():
        return None
    target = _target(model, labels)
    if logits.ndim != target.ndim + 1 or logits.shape[-1] < 2:
        return None
    if target is not labels and target.shape != labels.shape:
        logits = logits[..., :-1, :]
    if logits.shape[:-1] != target.shape:
        return None
    return int(((logits.argmax(-1) == target) & (target != IGNORE_INDEX)).sum())


def predictions(model: PreTrainedModel, batch: Mapping[str, Any], outputs: Any) -> list[torch.Tensor]:
    """Return the log-probabilities behind each labelled unit, one tensor for each question that the head answers.

    Args:
        model: the model.
        batch: keyword arguments of its forward.
        outputs: what the forward returned.

    Returns:
        Tensors in float32 (two for question answering, one for other classifying heads, none where the head does not
        classify).  # shape: (units, classes)
    """
    if "start_positions" in batch and hasattr(outputs, "start_logits"):
        return [outputs.start_logits.float().log_softmax(-1), outputs.end_logits.float().log_softmax(-1)]
    if correct_predictions(model, batch, outputs) is None:
        return []
    labels, logits = batch["labels"], outputs.logits
    target = _target(model, labels)
    if target.shape != labels.shape:
        logits = logits[..., :-1, :]
    return [logits[target != IGNORE_INDEX].float().log_softmax(-1)]


def forward_loss(model: PreTrainedModel, batch: Mapping[str, Any], index: int) -> tuple[torch.Tensor, Any, int]:
    """Run a batch and return its mean loss in float32, the outputs, and the labelled units behind the loss.

    Args:
        model: the model.
        batch: keyword arguments of its forward.
        index: number of the batch, for errors.

    Returns:
        Loss in nats, outputs, units.

    Raises:
        DataError: if there are no labels or the model returns no loss.
        NumericalError: if the loss is not finite.
    """
    units = labelled_units(model, batch)
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    outputs = model(**{**extra, **batch})
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise DataError(
            f"batch {index}: {type(model).__name__} returned no loss. Use a model class with a task head, and a batch "
            "with labels."
        )
    loss = loss.float().mean()
    if units and not torch.isfinite(loss):
        raise NumericalError(f"batch {index}: the loss is {loss.item()}; check the labels and the inputs.")
    return loss, outputs, units
