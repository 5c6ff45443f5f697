"""Measured loss and accuracy of one model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from .errors import DataError
from .heads import batch_examples, correct_predictions, forward_loss, questions
from .modes import evaluating


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a data set.

    Attributes:
        loss: mean loss per labelled unit, in nats.
        accuracy: share of labelled units answered correctly, or None where the head has no such thing.
        examples: number of examples.
        units: number of labelled units.
    """

    loss: float
    accuracy: float | None
    examples: int
    units: int


def evaluate(
    model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator, description: str | None = "Evaluating"
) -> Evaluation:
    """Measure a model on all examples of a loader, each once, whatever the number of processes.

    Args:
        model: the model, on `accelerator.device`; its training mode is restored.
        loader: batches with labels.
        accelerator: made with `even_batches=False`.
        description: label of the progress bar; None for no bar.

    Returns:
        Loss and accuracy.

    Raises:
        DataError: if a batch has no labels, the model no loss, or nothing is labelled.
        NumericalError: if a loss is not finite.
    """
    totals = torch.zeros(5, dtype=torch.float64, device=accelerator.device)  # loss, units, answered, right, examples
    hidden = description is None or not accelerator.is_main_process
    batches = logging.tqdm(accelerator.prepare(loader), desc=description, disable=hidden)
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(batches):
            loss, outputs, units = forward_loss(model, batch, index)
            asked = questions(model, batch, outputs)
            right = int(correct_predictions(asked).sum()) if asked else 0
            answered = units if asked else 0
            sums = [loss.item() * units if units else 0.0, units, answered, right, batch_examples(batch)]
            totals += torch.tensor(sums, dtype=torch.float64, device=totals.device)
    total, units, answered, right, examples = accelerator.reduce(totals, "sum").tolist()
    if units == 0:
        raise DataError("no held-out example has a label: every label is -100.")
    return Evaluation(total / units, right / units if answered == units else None, int(examples), int(units))
