"""The loss of a batch, and of a whole data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import DataError, NumericalError
from ..layers import called_with, evaluating
from .labels import Question, check_labels, read_labels
from .products import quick_products
from .representations import NOISE, Representation, model_inputs, noisy_loss, representations

logger = logging.get_logger(__name__)

K = TypeVar("K")


class ForwardPass(NamedTuple):
    """A batch's way through a model.

    Attributes:
        loss: mean loss in nats, in float32.
        outputs: what the forward returned.
        units: labelled units behind the loss.
        questions: what the labels ask; see `Reading`. Of a model without a head, its representations.
        explained: whether it is known which logits answer to which labels.
        shift: by how many positions the labels are ahead of the logits that answer to them, where that is known.
    """

    loss: torch.Tensor
    outputs: Any
    units: int
    questions: list[Question] | list[Representation]
    explained: bool
    shift: int | None = None


def forward_loss(
    model: PreTrainedModel, batch: Mapping[str, Any], index: int, known_shift: int | None = None
) -> ForwardPass:
    """Run a batch and return its mean loss, with what the labels ask.

    Args:
        model: the model.
        batch: keyword arguments of its forward.
        index: number of the batch, for errors.
        known_shift: see `read_labels`.

    Returns:
        The pass.

    Raises:
        ConfigurationError: if a CTC head sums its loss.
        DataError: if there are no labels or the model returns no loss.
        NumericalError: if the loss is not finite.
    """
    if NOISE in batch:
        return _represented(model, batch, index)
    check_labels(model, batch)
    outputs = run_batch(model, batch, index)
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise DataError(
            f"batch {index}: {type(model).__name__} returned no loss. Use a model class with a task head, and a batch "
            "with labels."
        )
    loss = loss.float().mean()
    reading = read_labels(model, batch, outputs, loss, known_shift)
    if reading.units and not torch.isfinite(loss):
        raise NumericalError(f"batch {index}: the loss is {loss.item()}; check the labels and the inputs.")
    if not reading.explained:
        logger.warning_once(
            f"the loss of {type(model).__name__} does not show which logits answer to which labels, neither those of "
            "the same position nor of the one before: there is no accuracy, and units are the labels other than -100."
        )
    return ForwardPass(loss, outputs, *reading)


def _represented(model: PreTrainedModel, batch: Mapping[str, Any], index: int) -> ForwardPass:
    outputs = run_batch(model, batch, index)
    found = representations(outputs, batch)
    loss, units = noisy_loss(found, batch[NOISE]), len(found[0].rows)
    if not torch.isfinite(loss):
        raise NumericalError(f"batch {index}: a representation is not finite; check the inputs.")
    return ForwardPass(loss, outputs, units, found, explained=True)


def run_batch(model: PreTrainedModel, batch: Mapping[str, Any], index: int = 0, quick: bool = True) -> Any:
    """Run a batch, without a cache of keys and values unless it asks for one.

    Args:
        model: the model.
        batch: keyword arguments of its forward.
        index: number of the batch, for errors.
        quick: whether 16-bit products may be computed in float32 where the processor has none.

    Returns:
        What the model returns, with its parts as attributes.

    Raises:
        DataError: if the model returns a tuple, whose parts have no names, or its tables have no row for an input.
        IndexError: if the model raises one for another reason.
    """
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    inputs = {name: _outside_inference(value) for name, value in {**extra, **model_inputs(batch)}.items()}
    try:
        with quick_products(model) if quick else nullcontext():
            outputs = model(**inputs)
    except IndexError as error:
        if "index out of range" not in str(error):
            raise
        raise DataError(
            f"batch {index}: it has a token, a position or a type that {type(model).__name__} has no row for in its "
            "tables. Is the tokenizer that of this model, and are inputs not longer than it takes?"
        ) from error
    if isinstance(outputs, Mapping) and not hasattr(outputs, "loss"):
        return SimpleNamespace(**outputs)
    if isinstance(outputs, (tuple, list)) and not hasattr(outputs, "loss"):
        raise DataError(
            f"batch {index}: {type(model).__name__} returns a {type(outputs).__name__}, whose parts have no names. "
            "Let its forward return a ModelOutput of Transformers, or a dictionary with loss and logits."
        )
    return outputs


def run_watching(
    model: PreTrainedModel,
    layers: Mapping[K, nn.Module],
    batch: Mapping[str, Any],
    note: Callable[[K, nn.Module, torch.Tensor], object],
) -> None:
    """Run a batch and note the input of each call of some layers.

    Args:
        model: the model.
        layers: the layers, by any key.
        batch: keyword arguments of its forward.
        note: called before each of their calls, with the key, the layer and its input.
    """

    def hook_of(key: K) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            note(key, module, called_with(args, kwargs))

        return hook

    hooks = [layer.register_forward_pre_hook(hook_of(key), with_kwargs=True) for key, layer in layers.items()]
    try:
        run_batch(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def _outside_inference(value: Any) -> Any:
    """Return a tensor that can be saved for a backward pass: a copy of one that was made under inference_mode."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def mean_loss(model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator) -> float:
    """Measure a model's loss on all examples of a loader, each once, whatever the number of processes.

    Args:
        model: the model, on `accelerator.device`; its training mode is restored.
        loader: batches with labels.
        accelerator: made with `even_batches=False`.

    Returns:
        Mean loss per labelled unit, in nats.

    Raises:
        DataError: if a batch has no labels, the model no loss, or nothing is labelled.
        NumericalError: if a loss is not finite.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # loss, units
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(accelerator.prepare(loader)):
            loss, _, units, *_ = forward_loss(model, batch, index)
            totals += torch.tensor([loss.item() * units if units else 0.0, units], dtype=torch.float64).to(totals)
    total, units = accelerator.reduce(totals, "sum").tolist()
    if units == 0:
        raise DataError("no example of the data has a label: every label is -100.")
    return total / units
