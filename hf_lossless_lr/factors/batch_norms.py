r"""Batch normalizations behind compressed layers: their statistics shifted as their inputs were.

A normalization keeps the mean `μ` and the variance `σ²` of its input over the training data. Where the input in the
compressed model has other moments than in the dense one, over the same data,

$$μ ← μ + (E[x'] - E[x]),\qquad σ^2 ← σ^2 + (\mathrm{Var}[x'] - \mathrm{Var}[x]).$$

Estimating both anew would forget the training data: networks are trained on augmented pictures, and the dense model
itself loses by it. Normalizations are taken in the order of the forward pass, each behind those that are shifted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import PaddingMasks, run_watching
from ..layers import evaluating, taking_turns
from ..statistics import Group, Pause, Rows, Stream, paired_streams, pausing

SMALLEST_VARIANCE = 0.1  # of what it was


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Return the batch normalizations of a model that keep statistics, by name."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None}


@torch.no_grad()
def shifted_batch_norms(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    loaders: Sequence[DataLoader],
    accelerator: Accelerator,
    most: int | None = None,
) -> dict[str, nn.Module]:
    """Return shifted copies of a model's batch normalizations for its compressed form.

    Args:
        model: the dense model; it is dense again afterwards.
        layers: what is in the compressed model, by name.
        loaders: the data; labels play no part.
        accelerator: made with `even_batches=False`.
        most: batches of each process that are used, the first ones; None for all.

    Returns:
        The copies, by name; of a normalization that is called several times in a forward pass, or not at all, none.
    """
    dense_norms, masks = batch_norms(model), PaddingMasks(model)
    with evaluating(model):
        batches = list(islice((batch for loader in loaders for batch in accelerator.prepare(loader)), most))
        order = _order(model, dense_norms, batches)
        shifted: dict[str, Any] = {name: deepcopy(dense_norms[name]) for name in order}
        pauses = [Pause((n,), norms[n], _input, behind=False) for norms in (dense_norms, shifted) for n in order]
        finished, turn = set[Group](), taking_turns(model, {**layers, **shifted})
        with pausing(model, masks.encoder, pauses), paired_streams(model, batches, masks) as (dense, compressed):
            for name in logging.tqdm(order, desc="Shifting", disable=not accelerator.is_main_process):
                group = (name,)
                moments = [_moments(dense, group, finished, shifted[name], accelerator)]
                with turn():
                    moments.append(_moments(compressed, group, finished, shifted[name], accelerator))
                finished.add(group)
                _shift(shifted[name], *moments)
    return shifted


def _input(masks: PaddingMasks, x: torch.Tensor, output: torch.Tensor | None) -> Rows:
    return Rows(lambda: x)


def _order(model: PreTrainedModel, norms: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the normalizations that a forward pass calls once, in its order; an idle process asks the others."""
    seen: list[str] = []
    for batch in batches[:1]:
        run_watching(model, norms, batch, lambda name, norm, x: seen.append(name))
    called: list[str] = next((names for names in gather_object([seen]) if names), [])
    return [name for name, count in Counter(called).items() if count == 1]


def _moments(
    streams: Sequence[Stream], group: Group, finished: set[Group], norm: Any, accelerator: Accelerator
) -> torch.Tensor:
    """Return the mean and the variance of each channel over all processes, in float64.  # shape: (2, channels)."""
    sums = torch.zeros(3, norm.num_features, dtype=torch.float64, device=norm.running_mean.device)
    for stream in streams:
        if stream.advance(group, finished) and stream.rows is not None:
            values = stream.rows.values().movedim(1, 0).flatten(1).double()
            sums += torch.stack(
                [values.sum(1), values.square().sum(1), torch.full_like(values[:, 0], values.shape[1])]
            )
    total, squares, count = accelerator.reduce(sums, "sum")
    mean = total / count.clamp_min(1)
    return torch.stack([mean, squares / count.clamp_min(1) - mean.square()])


def _shift(norm: Any, dense: torch.Tensor, compressed: torch.Tensor) -> None:
    mean, variance = (compressed - dense).to(norm.running_mean.dtype)
    norm.running_mean += mean
    norm.running_var.copy_(torch.maximum(norm.running_var + variance, SMALLEST_VARIANCE * norm.running_var))
