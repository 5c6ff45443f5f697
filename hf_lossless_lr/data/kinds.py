"""Is what the user passes a list of examples or of ready-made batches? Found by trying."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from ..errors import LosslessLowRankError
from ..layers import evaluating
from .forward import forward_loss, run_batch
from .labels import label_columns
from .representations import NOISE

REFUSALS = (
    LosslessLowRankError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    AssertionError,  # attention of torch, for one
)
"""What a model raises at a batch that it does not take."""


def are_examples(
    items: Sequence[Mapping[str, Any]], model: PreTrainedModel, collate: Callable[[list[Any]], Any]
) -> bool:
    """Return whether items are examples, which a collator joins, rather than batches, which a model takes as they are.

    Both are tried: the model is given the first item, and the first two joined. If it takes both (a GPT-2 takes a
    sequence without a batch dimension) or none, the shapes of the labels and of the main input decide.

    Args:
        items: at least one item.
        model: the model; left as it was.
        collate: the collator of examples.

    Returns:
        Whether they are examples.
    """
    first = items[0]
    if not any(isinstance(value, torch.Tensor) for value in first.values()):
        return True
    as_batch = _takes(model, lambda: first)
    as_examples = _takes(model, lambda: collate(list(items[:2])))
    return as_examples if as_batch != as_examples else _looks_like_example(first, model)


def _takes(model: PreTrainedModel, make: Callable[[], Any]) -> bool:
    """Return whether a model gives a loss to a batch, or runs it if it has no labels."""
    config = dict(vars(model.config))  # a loss may set problem_type
    try:
        with evaluating(model), torch.no_grad():
            batch = send_to_device(taken_by(model, make()), model.device)
            labelled = NOISE in batch or any(name in batch for name in label_columns(model))
            (forward_loss if labelled else run_batch)(model, batch, 0)
    except REFUSALS:
        return False
    finally:
        vars(model.config).clear()
        vars(model.config).update(config)
    return True


def _looks_like_example(item: Mapping[str, Any], model: PreTrainedModel) -> bool:
    labels = next((item[name] for name in label_columns(model) if name in item), None)
    if isinstance(labels, Number) or (isinstance(labels, torch.Tensor) and labels.ndim == 0):
        return True
    main = item.get(model.main_input_name)
    if isinstance(main, torch.Tensor):
        return main.ndim <= (3 if model.main_input_name == "pixel_values" else 1)
    dims = [value.ndim for value in item.values() if isinstance(value, torch.Tensor)]
    return max(dims, default=0) <= 1


def taken_by(model: PreTrainedModel, batch: Any) -> Any:
    """Leave out of a batch what the model's forward cannot take: names of files, numbers of rows.

    Args:
        model: the model.
        batch: the batch.

    Returns:
        The batch itself where all is taken.
    """
    if not isinstance(batch, Mapping):
        return batch
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def taken(name: str, value: Any) -> bool:
        return name in parameters or name == NOISE or (open_ended and not _is_text(value))

    if all(taken(name, value) for name, value in batch.items()):
        return batch
    return {name: value for name, value in batch.items() if taken(name, value)}


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, bytes)) or (
        isinstance(value, (list, tuple)) and any(isinstance(entry, (str, bytes)) for entry in value)
    )
