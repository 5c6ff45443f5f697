"""Layers that work once for a whole batch rather than for each example: projections of relative positions, for one.

Their gradients are sums over the examples of a batch, and their rows reach as far as its longest example: statistics
of such a layer depend on the batches, unless examples go through the model one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data import batch_examples, comes_apart, part_of, run_watching, unpadded

Batch = Mapping[str, Any]


@torch.no_grad()
def layers_with_shared_rows(model: PreTrainedModel, targets: Mapping[str, nn.Module], batch: Batch) -> list[str]:
    """Return the layers that have the same inputs for one example, another one, and the two together.

    Args:
        model: the model, in evaluation mode.
        targets: layers to look at, by name.
        batch: a batch; one that cannot be taken apart, or has one example only, shows nothing.

    Returns:
        Their names.
    """
    if not targets or not comes_apart(batch) or batch_examples(batch) < 2:
        return []
    one, other, both = (_inputs(model, targets, part_of(batch, slice(*part))) for part in ((0, 1), (1, 2), (0, 2)))
    return [name for name in both if _common(one.get(name, []), both[name]) & _common(other.get(name, []), both[name])]


def one_by_one(model: PreTrainedModel, batch: Batch) -> list[dict[str, Any]]:
    """Return the examples of a batch as batches of their own, without the padding behind them.

    Args:
        model: the model.
        batch: a batch that comes apart.

    Returns:
        The examples.
    """
    return [unpadded(model, part_of(batch, slice(i, i + 1))) for i in range(batch_examples(batch))]


def _inputs(model: PreTrainedModel, targets: Mapping[str, nn.Module], batch: Batch) -> dict[str, list[torch.Tensor]]:
    seen: dict[str, list[torch.Tensor]] = {}
    run_watching(model, targets, batch, lambda name, _, x: seen.setdefault(name, []).append(x))
    return seen


def _common(alone: list[torch.Tensor], together: list[torch.Tensor]) -> set[int]:
    """Return which calls for two examples together have the same input as one for an example alone."""
    return {
        index
        for index, x in enumerate(together)
        if any(x.shape == y.shape and torch.allclose(x, y, equal_nan=True) for y in alone)
    }
