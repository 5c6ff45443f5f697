r"""Directions to go backward from, for gradients whose second moment is the Gauss–Newton matrix, whatever the labels.

Of a loss `ℓ` of the outputs `z` of a head, that matrix is `Jᵀ H J` by the outputs of a layer, with `J` the derivative
of `z` by these and `H` the Hessian of `ℓ` by `z`:

| loss of a labelled unit | `H` | direction `v` |
|---|---|---|
| cross-entropy, `p = softmax(z)` | `diag(p) − p pᵀ` | `√p ∘ s − (√p · s) p`; of two classes `√(p₀ p₁) (s, −s)` |
| mean of `n` binary ones, `p = sigmoid(z)` | `diag(p (1 − p)) / n` | `√(p (1 − p) / n) ∘ s` |
| mean square of `n` numbers | `2 I / n` | `√(2 / n) s` |

For random signs `s`, `E[v vᵀ] = H`, so one backward pass from `v` gives gradients `Jᵀ v` of the right second moment.
Gradients of labels have it, too, if labels are as probable as the model says, but most of theirs comes from the few
units that the model gets wrong. The signs of an example come from its content: they depend neither on the batch nor
on the process. Source: Schraudolph 2002 and Martens 2020 for the matrix, Hutchinson 1990 for the signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import PreTrainedModel

from .alignment import TOLERANCE, main_loss, relative_gap
from .digests import example_digests
from .forward import ForwardPass
from .labels import Question, check_labels
from .representations import NOISE

Direction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of rows of outputs, and their signs


@torch.no_grad()
def gauss_newton_directions(
    model: PreTrainedModel, batch: Mapping[str, Any], forward: ForwardPass
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return outputs of a head to go backward from, each with its direction.

    Args:
        model: the model.
        batch: keyword arguments of its forward, with labels.
        forward: its way through the model.

    Returns:
        Pairs of the same shapes; none where the loss is of another kind, with class weights for one, or not known to
        come from these outputs: then its own gradient has to serve.
    """
    if NOISE in batch or not forward.units:
        return []
    loss = main_loss(model, forward.outputs, forward.loss)
    asked = [question for question in forward.questions if isinstance(question, Question)]
    if asked:
        if not _same(loss, torch.stack([_entropy(question) for question in asked]).mean()):
            return []
        parts = [(question.logits, question.examples) for question in asked]
        direction: Direction = _of_classes
    else:
        labels, logits = batch[check_labels(model, batch)], getattr(forward.outputs, "logits", None)
        found = _of_numbers(loss, logits, labels)
        if not isinstance(logits, torch.Tensor) or found is None:
            return []
        direction = found
        parts = [(logits, torch.arange(len(logits), device=logits.device))]
    seeds = sign_seeds(batch, model)
    if not all(outputs.requires_grad and int(examples.max()) < len(seeds) for outputs, examples in parts):
        return []
    share = len(parts) ** -0.5  # the loss is the mean over its parts
    return [
        (outputs, share * _directions(outputs, examples, [seed + place for seed in seeds], direction))
        for place, (outputs, examples) in enumerate(parts)
    ]


def sign_seeds(batch: Mapping[str, Any], model: PreTrainedModel) -> list[int]:
    """Return the seed of the signs of each example, from its content."""
    return [int(digest[:15], 16) for digest in example_digests(batch, model)]


def _entropy(question: Question) -> torch.Tensor:
    """Return the mean cross-entropy; not a number where a label is no class, as of a span beyond the tokens."""
    logits, labels = question.logits.float(), question.labels
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[-1]:
        return torch.full((), math.nan, device=logits.device)
    return cross_entropy(logits, labels)


def _same(loss: torch.Tensor, other: torch.Tensor) -> bool:
    return relative_gap(loss, other) <= TOLERANCE  # not where one is no number


def _directions(outputs: torch.Tensor, examples: torch.Tensor, seeds: list[int], direction: Direction) -> torch.Tensor:
    """Return the directions of all units, one example after the other: probabilities of a vocabulary are many."""
    result = torch.empty_like(outputs)
    for example in examples.unique().tolist():
        own = examples == example
        rows = outputs[own]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        result[own] = direction(rows, random_signs(rows.shape, seeds[example]).to(rows)).to(result.dtype)
    return result


def random_signs(shape: torch.Size, seed: int) -> torch.Tensor:
    """Return random signs of a shape, as int8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=torch.int8).random_(0, 2, generator=generator).mul_(2).sub_(1)


def _of_classes(logits: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    if p.shape[-1] == 2:
        return p.prod(-1, keepdim=True).sqrt() * signs[..., :1] * torch.tensor([1.0, -1.0]).to(p)
    roots = p.sqrt() * signs
    return roots - p * roots.sum(-1, keepdim=True)


def _of_numbers(loss: torch.Tensor, outputs: Any, labels: Any) -> Direction | None:
    """Return the directions for labels that are numbers, by the loss that they give; None for another one."""
    tensors = isinstance(outputs, torch.Tensor) and isinstance(labels, torch.Tensor)
    if not tensors or outputs.numel() != labels.numel():
        return None
    count = outputs[0].numel()
    targets, values = labels.float().reshape(-1), outputs.float().reshape(-1)
    if _same(loss, mse_loss(values, targets)):
        return lambda rows, signs: (2 / count) ** 0.5 * signs
    if 0 <= float(targets.min()) <= float(targets.max()) <= 1 and _same(
        loss, binary_cross_entropy_with_logits(values, targets)
    ):
        return lambda logits, signs: (logits.sigmoid() * (-logits).sigmoid() / count).sqrt() * signs
    return None
