r"""Mixed-rank fine-tuning: layers answer at random by their factors or by the full matrix that these stand for.

Each call of a layer takes its factors with a probability that rises linearly to 1, so that few errors have to be made
up for at a time. Each batch goes through the model twice, and the answers of both passes are to agree: to the loss is
added the mean over the rows of logits of `(KL(p ‖ q) + KL(q ‖ p)) / 2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

BEGIN, END = 0.5, 0.5  # probability of the factors at first; share of the steps after which it is 1


class MixedRank(nn.Module):
    """A layer that is full at times while it is trained, and always its factors while it is not.

    Args:
        full: the layer that the factors stand for, which is not trained.
        factors: the factorized layer.

    Attributes:
        probability: that of the factors in a call.
    """

    def __init__(self, full: nn.Module, factors: nn.Module) -> None:
        super().__init__()
        self.full, self.factors, self.probability = full.requires_grad_(False), factors, BEGIN

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the factorized layer, for model code that asks for its dtype."""
        return self.factors.weight  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply one of the two."""
        by_factors = not self.training or torch.rand(()).item() < self.probability
        return (self.factors if by_factors else self.full)(*args, **kwargs)


class RisingProbability(TrainerCallback):
    """Let the factors be taken more and more often.

    Args:
        layers: the layers by name.
    """

    def __init__(self, layers: Mapping[str, MixedRank]) -> None:
        self.layers = layers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the probability of this step."""
        for layer in self.layers.values():
            layer.probability = probability(state.global_step / state.max_steps)


def probability(progress: float) -> float:
    """Return the probability of the factors: from `BEGIN` to 1, which it is after `END` of the steps.

    Args:
        progress: steps done, of all.
    """
    return BEGIN + (1 - BEGIN) * min(progress / END, 1.0)


class ConsistentTrainer(Trainer):
    """A trainer whose loss is that of two passes, and how far their answers are apart."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch."""
        first, one = super().compute_loss(model, inputs, True, num_items_in_batch)
        second, other = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = (first + second) / 2 + disagreement(one, other)
        return (loss, one) if return_outputs else loss


def disagreement(one: Any, other: Any) -> torch.Tensor | float:
    """Return how far the answers of two passes are apart, in nats; 0 where the head gives no logits.

    Args:
        one: outputs of a model.
        other: those of another pass.
    """
    total: torch.Tensor | float = 0.0
    for name in (name for name in one if name.endswith("logits")):
        p, q = (outputs[name].float().log_softmax(-1) for outputs in (one, other))
        total = total + ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    return total
