"""Measured loss and metric of models on held-out data, and the difference of two models on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from .errors import DataError
from .heads import batch_examples, correct_predictions, forward_loss, predictions
from .modes import evaluating
from .replacement import in_place


class BatchOutcome(NamedTuple):
    """Sums over one batch: loss in nats, labelled units, correct answers (None where the head has no such thing)."""

    loss: float
    units: int
    correct: int | None


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a data set.

    Attributes:
        loss: mean loss per labelled unit, in nats.
        accuracy: share of labelled units answered correctly, or None where the head has no such thing.
        examples: number of examples.
        units: number of labelled units.
        batches: sums of each batch, in the order of the data (by process).
    """

    loss: float
    accuracy: float | None
    examples: int
    units: int
    batches: tuple[BatchOutcome, ...] = ()


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
    outcomes: list[BatchOutcome] = []
    examples = 0
    hidden = description is None or not accelerator.is_main_process
    batches = logging.tqdm(accelerator.prepare(loader), desc=description, disable=hidden)
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(batches):
            loss, outputs, units = forward_loss(model, batch, index)
            right = correct_predictions(model, batch, outputs)
            outcomes.append(BatchOutcome(loss.item() * units if units else 0.0, units, right))
            examples += batch_examples(batch)
    outcomes, counts = gather_object(outcomes), gather_object([examples])
    total = sum(outcome.units for outcome in outcomes)
    if total == 0:
        raise DataError("no example of the evaluation set has a label: every label is -100.")
    correct = [outcome.correct for outcome in outcomes if outcome.correct is not None]
    accuracy = sum(correct) / total if len(correct) == len(outcomes) else None
    return Evaluation(sum(outcome.loss for outcome in outcomes) / total, accuracy, sum(counts), total, tuple(outcomes))


def mean_divergence(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], loader: DataLoader, accelerator: Accelerator
) -> float | None:
    """Return the mean KL divergence of a compressed model's predictions from the dense model's, in nats per unit.

    Much less noisy than a difference of losses: the labels play no part.

    Args:
        model: the dense model.
        layers: the layers that compress it, by name.
        loader: batches with labels.
        accelerator: made with `even_batches=False`.

    Returns:
        `Σ p_dense log(p_dense / p_compressed)` averaged over labelled units; None where the head does not classify.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(accelerator.prepare(loader)):
            dense = predictions(model, batch, forward_loss(model, batch, index)[1])
            with in_place(model, layers):
                compressed = predictions(model, batch, forward_loss(model, batch, index)[1])
            for p, q in zip(dense, compressed, strict=True):
                totals[0] += (p.exp() * (p - q)).sum()
                totals[1] += len(p)
    total, units = accelerator.reduce(totals, "sum").tolist()
    return total / units if units else None


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference between two models over the same labelled units.

    Attributes:
        mean: mean difference per labelled unit.
        upper: one-sided upper confidence bound of it.
    """

    mean: float
    upper: float


def paired_differences(
    dense: Evaluation, compressed: Evaluation, confidence: float
) -> tuple[PairedDifference, PairedDifference | None]:
    r"""Compare two evaluations on the same batches.

    The difference is a ratio of sums over batches, `Σ d_b / Σ u_b`; its standard error treats batches as clusters,
    `sqrt(n / (n - 1) Σ (d_b − mean u_b)²) / Σ u_b`, and the bound takes Student's t with `n − 1` degrees of freedom.

    Args:
        dense: the dense model.
        compressed: the compressed model, on the same loader.
        confidence: level of the one-sided bounds.

    Returns:
        Loss increase in nats, and drop of the accuracy as a fraction (None where there is no accuracy).

    Raises:
        DataError: if the two did not see the same batches.
    """
    if [outcome.units for outcome in dense.batches] != [outcome.units for outcome in compressed.batches]:
        raise DataError("the two evaluations are not of the same batches, so they cannot be paired.")
    pairs = list(zip(dense.batches, compressed.batches, strict=True))
    units = [before.units for before, _ in pairs]
    loss = _clustered([after.loss - before.loss for before, after in pairs], units, confidence)
    drops = [
        before.correct - after.correct
        for before, after in pairs
        if before.correct is not None and after.correct is not None
    ]
    return loss, _clustered(drops, units, confidence) if len(drops) == len(units) else None


def _clustered(differences: Sequence[float], units: Sequence[int], confidence: float) -> PairedDifference:
    from scipy.stats import t  # here: scipy is slow to import

    d, u = np.asarray(differences, dtype=np.float64), np.asarray(units, dtype=np.float64)
    mean, count = d.sum() / u.sum(), len(d)
    if count < 2:
        return PairedDifference(float(mean), float("inf"))
    error = np.sqrt(count / (count - 1) * ((d - mean * u) ** 2).sum()) / u.sum()
    return PairedDifference(float(mean), float(mean + t.ppf(confidence, count - 1) * error))
