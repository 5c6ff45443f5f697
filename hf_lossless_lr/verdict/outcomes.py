"""What two models answer to the same examples: the paired evidence behind every comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import Representation, batch_examples, correct_predictions
from ..errors import DataError
from ..layers import evaluating, in_place
from .answers import Answer, KeptAnswers, answer_of

TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-5, 10))
"""Temperatures at which losses are taken: from 1/2 to 4, between which one is fitted, and a step beyond either."""

LOSS_TOLERANCE = 0.02  # relative gap between a model's loss and the cross-entropy of its logits: rounding in bfloat16


@dataclass(frozen=True)
class PairedOutcomes:
    """Answers of a dense and a compressed model to the same examples, summed over clusters.

    A *cluster* is an example; or a whole batch, where the model's loss is not the mean cross-entropy of its logits
    (regression, class weights, an auxiliary loss) and so cannot be told apart by example. Clusters without a labelled
    unit are left out. Where a first axis has length two it is (dense, compressed).

    Attributes:
        loss: summed loss in nats.  # shape: (2, clusters)
        units: labelled units.  # shape: (clusters,)
        examples: number of examples with a labelled unit.
        by_example: whether a cluster is an example.
        right: whether each unit is answered correctly; None where the head does not classify.  # shape: (2, units)
        confidence: probability that the model gives to its own answer.  # shape: (2, units)
        changed: whether the two models answer differently.  # shape: (units,)
        labels: the right class of each unit (of the first question).  # shape: (units,)
        cluster_of_unit: index of the unit's cluster.  # shape: (units,)
        example_of_unit: index of the unit's example, where that is no cluster but a part of one.  # shape: (units,)
        divergence: KL divergence of the compressed from the dense predictions, in nats; of representations, half
            their squared distance.  # shape: (units,)
        tempered: summed loss at each of `TEMPERATURES`, if asked for and `by_example`.
            # shape: (2, temperatures, clusters)
        explained: whether it is known which logits answer to which labels.
    """

    loss: np.ndarray
    units: np.ndarray
    examples: int
    by_example: bool
    right: np.ndarray | None = None
    confidence: np.ndarray | None = None
    changed: np.ndarray | None = None
    labels: np.ndarray | None = None
    cluster_of_unit: np.ndarray | None = None
    example_of_unit: np.ndarray | None = None
    divergence: np.ndarray | None = None
    tempered: np.ndarray | None = None
    explained: bool = True

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return len(self.units)

    @property
    def headless(self) -> bool:
        """Whether representations are compared, rather than predictions."""
        return self.right is None and self.divergence is not None

    @property
    def mean_loss(self) -> tuple[float, float]:
        """Mean loss per labelled unit of both models, in nats."""
        dense, compressed = self.loss.sum(1) / self.units.sum()
        return float(dense), float(compressed)

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """Share of the units that each model answers correctly, or None where the head does not classify."""
        if self.right is None:
            return None
        dense, compressed = self.right.mean(1)
        return float(dense), float(compressed)

    @property
    def loss_increase(self) -> np.ndarray:
        """Summed loss increase of each cluster, in nats.  # shape: (clusters,)."""
        return self.loss[1] - self.loss[0]

    @property
    def accuracy_drop(self) -> np.ndarray | None:
        """Correct answers lost in each example, less those gained.  # shape: (examples,)."""
        owner = self.cluster_of_unit if self.example_of_unit is None else self.example_of_unit
        if self.right is None or owner is None:
            return None
        return np.bincount(owner, self.right[0].astype(float) - self.right[1])

    @property
    def answers(self) -> np.ndarray:
        """Units of each example; of each cluster, where that is all that is known.  # shape: (examples,)."""
        return self.units if self.example_of_unit is None else np.bincount(self.example_of_unit)

    @property
    def mean_divergence(self) -> float | None:
        """Mean KL divergence from the dense model's predictions, in nats per unit; None as for `accuracy`."""
        return None if self.divergence is None else float(self.divergence.mean())


class _Record(NamedTuple):
    """What both models say to one batch; `by_unit` is empty where the head does not classify."""

    loss: np.ndarray  # shape: (2,), summed
    units: int
    examples: int
    by_unit: dict[str, np.ndarray]  # arrays whose last dimension is the unit
    explained: bool = True


def paired_outcomes(
    dense: PreTrainedModel,
    compressed: PreTrainedModel | Mapping[str, nn.Module],
    loader: DataLoader,
    accelerator: Accelerator,
    description: str | None = None,
    temperatures: bool = False,
    dense_answers: KeptAnswers | None = None,
) -> PairedOutcomes:
    """Let two models answer every example of a loader once, whatever the number of processes.

    Args:
        dense: the dense model, on `accelerator.device`; its training mode is restored.
        compressed: the other model, or the layers that make it out of the dense one, by name.
        loader: batches with labels.
        accelerator: made with `even_batches=False`.
        description: label of the progress bar; None for no bar.
        temperatures: whether to take losses at all of `TEMPERATURES`, too.
        dense_answers: the dense model's answers to this loader, as far as they are known; new ones are added.

    Returns:
        The outcomes, the same on each process.

    Raises:
        DataError: if there are no labels, or the models do not answer the same questions.
        NumericalError: if a loss is not finite.
    """
    records = []
    dense_answers = KeptAnswers(0) if dense_answers is None else dense_answers
    hidden = description is None or not accelerator.is_main_process
    batches = logging.tqdm(accelerator.prepare(loader), desc=description, disable=hidden)
    with ExitStack() as modes, torch.no_grad():
        modes.enter_context(evaluating(dense))
        if isinstance(compressed, nn.Module):
            modes.enter_context(evaluating(compressed))
        for index, batch in enumerate(batches):
            before = dense_answers.answer(dense, batch, index)
            if isinstance(compressed, nn.Module):
                known = before.shift if type(compressed) is type(dense) else None
                after = answer_of(compressed, batch, index, known)
            else:
                with in_place(dense, compressed):
                    after = answer_of(dense, batch, index, before.shift)
            records.append(_record(before, after, batch_examples(batch), index, temperatures))
    by_process = gather_object([records])  # batches were dealt out in turn
    return _combine([record for turn in zip_longest(*by_process) for record in turn if record is not None])


def _record(dense: Answer, compressed: Answer, examples: int, index: int, temperatures: bool) -> _Record:
    explained = dense.explained and compressed.explained
    if not explained:  # what is known of one alone does not compare them
        units = (compressed if dense.explained else dense).units
        dense, compressed = (answer._replace(asked=[], units=units) for answer in (dense, compressed))
    shapes = [[rows.shape for rows, *_ in answer.asked] for answer in (dense, compressed)]
    if dense.units != compressed.units or shapes[0] != shapes[1]:
        raise DataError(f"batch {index}: the two models do not answer the same questions, so they cannot be compared.")
    loss = np.array([dense.total, compressed.total])
    if not dense.asked or not dense.units:
        return _Record(loss, dense.units, examples, {}, explained)
    if isinstance(dense.asked[0], Representation):
        return _distance(dense, compressed, examples)
    logs = [[q.logits.float().log_softmax(-1) for q in answer.asked] for answer in (dense, compressed)]
    labels = [q.labels.clamp(0, q.logits.shape[-1] - 1) for q in dense.asked]
    by_unit = {
        "loss": torch.stack([_cross_entropy(log, labels, 1.0) for log in logs]),
        "right": torch.stack([correct_predictions(answer.asked) for answer in (dense, compressed)]),
        "confidence": torch.stack([sum(q.amax(-1) for q in log).exp() for log in logs]),
        "changed": torch.stack([p.argmax(-1) != q.argmax(-1) for p, q in zip(*logs, strict=True)]).any(0),
        "labels": dense.asked[0].labels,
        "example": dense.asked[0].examples,
        "divergence": torch.stack([_divergence(p, q) for p, q in zip(*logs, strict=True)]).mean(0),
    }
    if temperatures:
        by_unit["tempered"] = torch.stack(
            [torch.stack([_cross_entropy(log, labels, t) for t in TEMPERATURES]) for log in logs]
        )
    return _Record(loss, dense.units, examples, {name: value.cpu().numpy() for name, value in by_unit.items()})


def _distance(dense: Answer, compressed: Answer, examples: int) -> _Record:
    """Return half the squared distance between representations, the loss of the second model; the first has none."""
    pairs = zip(dense.asked, compressed.asked, strict=True)
    distance = torch.stack([0.5 * (p.rows - q.rows).square().sum(-1) for p, q in pairs]).mean(0)
    by_unit = {
        "loss": torch.stack([torch.zeros_like(distance), distance]),
        "example": dense.asked[0].examples,
        "divergence": distance,
    }
    loss = np.array([0.0, float(distance.sum())])
    return _Record(loss, dense.units, examples, {name: value.cpu().numpy() for name, value in by_unit.items()})


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return `Σ exp(p) (p − q)` of each unit, where classes that `p` rules out add nothing.  # shape: (units,)."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0.0)  # below it by rounding


def _cross_entropy(logs: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """Return the loss of each unit at a temperature, the mean over its questions.  # shape: (units,)."""
    terms = []
    for log, label in zip(logs, labels, strict=True):
        scaled = log / temperature
        terms.append(scaled.logsumexp(-1) - scaled.gather(-1, label[:, None]).squeeze(-1))
    return torch.stack(terms).mean(0)


def _combine(records: Sequence[_Record]) -> PairedOutcomes:
    records = [record for record in records if record.units]
    examples = sum(len(np.unique(r.by_unit["example"])) if r.by_unit else r.examples for r in records)
    if not records:
        raise DataError("no held-out example has a label: every label is -100.")
    if any(not record.by_unit for record in records):
        losses = np.stack([record.loss for record in records], axis=1)
        units, explained = np.array([record.units for record in records]), all(record.explained for record in records)
        return PairedOutcomes(losses, units, examples, by_example=False, explained=explained)
    columns = {
        name: np.concatenate([record.by_unit[name] for record in records], axis=-1) for name in records[0].by_unit
    }
    by_example = all(_explains(record) for record in records)
    starts = np.cumsum([0, *(record.examples for record in records[:-1])])
    example = np.concatenate([r.by_unit["example"] + start for r, start in zip(records, starts, strict=True)])
    batch = np.repeat(np.arange(len(records)), [len(record.by_unit["example"]) for record in records])
    _, owner, units = np.unique(example if by_example else batch, return_inverse=True, return_counts=True)

    def summed(values: np.ndarray) -> np.ndarray:
        rows = [np.bincount(owner, row, minlength=len(units)) for row in values.reshape(-1, values.shape[-1])]
        return np.stack(rows).reshape(*values.shape[:-1], len(units))

    return PairedOutcomes(
        loss=summed(columns["loss"]) if by_example else np.stack([record.loss for record in records], axis=1),
        units=units,
        examples=examples,
        by_example=by_example,
        right=columns.get("right"),
        confidence=columns.get("confidence"),
        changed=columns.get("changed"),
        labels=columns.get("labels"),
        cluster_of_unit=owner,
        example_of_unit=None if by_example else np.unique(example, return_inverse=True)[1],
        divergence=columns["divergence"],
        tempered=summed(columns["tempered"]) if by_example and "tempered" in columns else None,
    )


def _explains(record: _Record) -> bool:
    """Return whether the loss of both models is the mean cross-entropy of their logits."""
    entropy = record.by_unit["loss"].sum(1)
    return bool(np.all(np.abs(entropy - record.loss) <= LOSS_TOLERANCE * (np.abs(record.loss) + 0.05 * record.units)))
