"""What one model says to a batch, kept as far as it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..data import forward_loss

MAX_KEPT_BYTES = 2**30  # of logits; those of a classifier always fit, of a language model a few hundred texts


class Answer(NamedTuple):
    """What one model says to one batch: its mean loss, and what it was asked (see `Reading`) or represents."""

    loss: float
    units: int
    asked: list[Any]  # of questions, or of representations
    explained: bool
    shift: int | None = None

    @property
    def total(self) -> float:
        """The loss summed over units, in nats."""
        return self.loss * self.units if self.units else 0.0

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.itemsize for question in self.asked for tensor in question)

    def to(self, device: torch.device | str) -> Answer:
        """Return it with its tensors on a device."""
        return self._replace(asked=[type(q)(*(tensor.to(device) for tensor in q)) for q in self.asked])


class KeptAnswers:
    """A model's answers to the batches of one loader, kept on the CPU as far as they fit, so that they are given once.

    Args:
        max_bytes: most bytes of logits to keep; answers beyond are given again each time.
    """

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._left = max_bytes
        self._answers: dict[int, Answer] = {}

    def answer(self, model: PreTrainedModel, batch: Mapping[str, Any], index: int) -> Answer:
        """Return the model's answer to the batch of this number, of which only the first call needs a forward pass."""
        kept = self._answers.get(index)
        if kept is not None:
            return kept.to(model.device)
        given = answer_of(model, batch, index)
        if given.bytes <= self._left:
            self._left -= given.bytes
            self._answers[index] = given.to("cpu")
        return given


def answer_of(model: PreTrainedModel, batch: Mapping[str, Any], index: int, known_shift: int | None = None) -> Answer:
    """Let a model answer a batch.

    Args:
        model: the model.
        batch: the arguments of its forward pass.
        index: number of the batch, for errors.
        known_shift: that of another answer to it, by a model of the same class.

    Returns:
        The answer.
    """
    passed = forward_loss(model, batch, index, known_shift)
    return Answer(passed.loss.item(), passed.units, passed.questions, passed.explained, passed.shift)
