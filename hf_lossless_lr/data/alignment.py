"""Which logits answer to which labels of a sequence: measured, by the loss that the model itself returns.

A tagger and a masked language model answer to a label at its own position, a left-to-right language model at the one
before. Which it is does not show in the name of a class: a user's own class may do either. A loss that is no plain
cross-entropy (class weights, smoothed labels) shows it by its gradient, which is negative at the right class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..layers import differentiating_only

TOLERANCE = 0.02  # relative gap between a loss and the cross-entropy that it is: rounding in bfloat16
SMALLEST = 1e-3  # nats below which gaps are not relative
SHIFTS = (0, 1)


def main_loss(model: PreTrainedModel, outputs: Any, loss: torch.Tensor) -> torch.Tensor:
    """Return a loss without what a mixture of experts adds for the balance of its router."""
    auxiliary = getattr(outputs, "aux_loss", None)
    share = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if not isinstance(auxiliary, torch.Tensor) or not isinstance(share, float):
        return loss
    return loss - share * auxiliary.to(loss)


def relative_gap(loss: torch.Tensor, entropy: torch.Tensor) -> float:
    """Return how far a loss is from what it may be, relative to that; up to `TOLERANCE` it is rounding."""
    return float((entropy - loss.float()).abs() / entropy.abs().clamp_min(SMALLEST))


@torch.no_grad()
def measured_shift(logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor, ignored: int) -> int | None:
    """Return by how many positions the labels are ahead of the logits that answer to them: 0 or 1.

    Args:
        logits: scores of the classes.  # shape: (..., length, classes)
        labels: the right classes.  # shape: (..., length)
        loss: mean loss of the batch, in nats.
        ignored: label of positions that do not count.

    Returns:
        The shift whose cross-entropy is the loss, the nearer one if both are; None if none is. Where nothing is
        labelled, a loss is not a number, and a shift at which nothing is labelled explains it.
    """
    gaps = {}
    for shift in SHIFTS:
        target = labels[..., shift:]
        labelled = target != ignored
        scores = logits[..., : logits.shape[-2] - shift, :][labelled].float()
        target = target[labelled]
        if not torch.isfinite(loss) or not len(target):
            gaps[shift] = float("inf") if torch.isfinite(loss) or len(target) else 0.0
        elif int(target.min()) >= 0 and int(target.max()) < scores.shape[-1]:
            entropy = torch.nn.functional.cross_entropy(scores, target)
            gaps[shift] = relative_gap(loss, entropy)
    best = min(gaps, key=lambda shift: gaps[shift], default=None)
    return best if best is not None and gaps[best] <= TOLERANCE else None


def shift_by_gradient(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    outputs: Any,
    loss: torch.Tensor,
    labels: torch.Tensor,
    ignored: int,
) -> int | None:
    """Return the shift at which the loss' gradient by the logits is most negative at the labels.

    Args:
        model: the model.
        batch: keyword arguments of its forward, which is run once more where it built no graph.
        outputs: what the forward returned.
        loss: its loss.
        labels: the right classes.  # shape: (..., length)
        ignored: label of positions that do not count.

    Returns:
        0 or 1, or None where the gradient shows neither.
    """
    if outputs.logits.requires_grad:
        (grad,) = torch.autograd.grad(loss, outputs.logits, retain_graph=True, allow_unused=True)
        return None if grad is None else _shift_of(grad, labels, ignored)
    with torch.enable_grad(), differentiating_only(model, {}):
        for parameters in (list(model.parameters())[-1:], list(model.parameters())):  # the last one is often enough
            for parameter in parameters:
                parameter.requires_grad_(True)
            again = model(**batch)
            if again.logits.requires_grad and again.loss.requires_grad:
                (grad,) = torch.autograd.grad(again.loss.float().mean(), again.logits, allow_unused=True)
                return None if grad is None else _shift_of(grad, labels, ignored)
    return None


def _shift_of(grad: torch.Tensor, labels: torch.Tensor, ignored: int) -> int | None:
    """Return the shift at which more than half of the positions that the loss reads are steepest at their label.

    Not all need be: with smoothed labels, a class that is rated too high already pulls the other way.
    """
    used, steepest = grad.abs().amax(-1) > 0, grad.argmin(-1)
    shares = {}
    for shift in SHIFTS:
        length = labels.shape[-1] - shift
        target, reached = labels[..., shift:], used[..., :length]
        possible = reached.any() and not used[..., length:].any() and (target != ignored)[reached].all()
        shares[shift] = float((steepest[..., :length] == target)[reached].float().mean()) if possible else 0.0
    best = max(shares, key=lambda shift: shares[shift])
    return best if shares[best] > 0.5 else None
