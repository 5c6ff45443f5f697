r"""First-order pruning while a model is trained: weights are kept without which the loss would change the most.

The score of a weight is the sum over the steps of `|w ∂L/∂w|`, of the loss of the masked model. In each step the
weights of a matrix with the largest scores are in place and the others are zero; gradients reach the former. Their
share falls from 1 to the asked one by a cubic schedule.

Sources: Molchanov et al. 2019, "Importance estimation for neural network pruning", arXiv 1906.10771, for the scores;
Sanh et al. 2020, "Movement pruning: adaptive sparsity by fine-tuning", arXiv 2005.07683, for masks and schedule. With
the signed scores of the latter, a hundred steps on calibration data ended at chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

BEGIN, END = 0.1, 0.7  # of the steps, between which the share falls


def share_kept(progress: float, share: float) -> float:
    """Return the share of the weights to keep: 1 at first, and the asked one after `END` of the steps.

    Args:
        progress: steps done, of all.
        share: the share to end with.

    Returns:
        `share + (1 − share) (1 − t)^3`, where `t` goes from 0 to 1 between `BEGIN` and `END`.
    """
    done = min(max((progress - BEGIN) / (END - BEGIN), 0.0), 1.0)
    return share + (1 - share) * (1 - done) ** 3


def kept(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return which weights are kept: exactly the share, rounded, of those with the largest scores.

    Args:
        scores: a score for each weight.
        share: the share to keep.

    Returns:
        True where a weight is kept, in the shape of the scores.
    """
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(round(share * scores.numel()), sorted=False).indices] = True
    return mask.view(scores.shape)


class FirstOrderPruning(TrainerCallback):
    """Prune some layers of a model while `Trainer` trains it.

    Args:
        layers: the layers by name.
        share: the share of the weights of each to keep.

    Attributes:
        scores: name of a layer to the scores of its weights.
    """

    def __init__(self, layers: Mapping[str, Any], share: float) -> None:
        self.layers, self.share = layers, share
        self.scores = {name: torch.zeros_like(layer.weight.detach()) for name, layer in layers.items()}
        self._masked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # masks, and the weights without them

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the masked weights in place."""
        share = share_kept(state.global_step / state.max_steps, self.share)
        for name, layer in self.layers.items():
            mask = kept(self._scores(name), share)
            self._masked[name] = mask, layer.weight.detach().clone()
            layer.weight.mul_(mask)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the gradients, and let the optimizer have the weights without masks."""
        for name, layer in self.layers.items():
            mask, weight = self._masked.pop(name)
            layer.weight.copy_(weight)
            if layer.weight.grad is not None:  # a layer that was not called has none
                self._scores(name).add_((layer.weight.grad * weight).abs_())
                layer.weight.grad.mul_(mask)

    @torch.no_grad()
    def finish(self) -> None:
        """Set the weights to zero that are not kept."""
        for name, layer in self.layers.items():
            layer.weight.mul_(kept(self._scores(name), self.share))

    def _scores(self, name: str) -> torch.Tensor:
        self.scores[name] = self.scores[name].to(self.layers[name].weight.device)
        return self.scores[name]
