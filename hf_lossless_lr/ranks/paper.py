"""Everything of arXiv 2412.06867: its two algorithms, and the neighbourhood `ε` of its eq. 8.

`ε` is the noise that a layer takes before the first-order prediction of the loss fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import dataset_size, mean_loss, subset
from ..errors import ConfigurationError
from ..factors import Forms, loss_curve
from ..layers import CHANNEL, break_even_rank, finish, layout_of, weight_matrices
from ..statistics import collect_statistics
from .sizes import Choice, Choices, Curves


def select_paper(curves: Curves, epsilon: Mapping[str, float], compact: bool) -> Choices:
    """Apply Algorithm 1 (lossless) or 2 (compact) of arXiv 2412.06867 to each layer.

    Candidates are ranks `0 < k < NM / (N + M)` whose noise stays in the neighbourhood, `max |Ŵ_k − W| ≤ ε`, and whose
    first-order change `⟨G, Ŵ_k − W⟩` is negative. Algorithm 1 takes the candidate with the lowest predicted loss,
    Algorithm 2 the smallest rank; a layer without candidates stays dense.

    Args:
        curves: a loss curve for each layer, with `max_noise`.
        epsilon: elementwise noise bound of each layer.
        compact: whether to apply Algorithm 2.

    Returns:
        The choices.

    Raises:
        ConfigurationError: if a curve has no `max_noise`, or no `first_order`.
    """
    choices: Choices = {}
    for name, curve in curves.items():
        noise, first = curve.max_noise, curve.first_order
        if noise is None or first is None:
            missing = "max_noise" if noise is None else "first_order"
            raise ConfigurationError(f"the curve of {name!r} has no {missing}, which the paper's rules need.")
        limit = break_even_rank(curve.out_features, curve.in_features, "two-factor")
        bound = epsilon[name] * (1 + ROUNDING)  # found as the noise of a rank, it lets that rank pass
        fits = [k for k in range(1, limit + 1) if noise[k] <= bound and first[k] < 0]
        costs = list(range(len(first))) if compact else first.tolist()
        choices[name] = Choice(min(fits, key=costs.__getitem__, default=None))
    return choices


ROUNDING = 1e-9  # by which the same noise may differ, computed in two ways
EXAMPLES = 64  # eq. 8 compares two losses on the same examples, so few of them suffice


def find_epsilon(
    model: PreTrainedModel,
    targets: Mapping[str, nn.Module],
    factorizations: Mapping[str, Forms],
    loader: DataLoader,
    accelerator: Accelerator,
    tolerance: float,
) -> dict[str, float]:
    """Find for each layer the largest noise at which the first-order prediction of the loss still holds.

    For one layer at a time, the weight is replaced by its rank-`k` approximation, and the smallest `k` is searched by
    bisection for which `|L(Ŵ_k) − L(W) − ⟨G, Ŵ_k − W⟩| < tolerance`, all on the same few examples. The layer's `ε` is
    the largest element of `|Ŵ_k − W|` at that rank.

    Args:
        model: the dense model; weights are restored after each measurement.
        targets: layers, by name.
        factorizations: their factorizations.
        loader: calibration data; its first 64 items (examples, or ready-made batches) are used.
        accelerator: made with `even_batches=False`.
        tolerance: accepted gap, in nats.

    Returns:
        `ε` of each layer.

    Source: Zhang et al. 2024, arXiv 2412.06867, eq. 8.
    """
    few = subset(loader, range(min(dataset_size(loader), EXAMPLES)))
    statistics = collect_statistics(model, targets, few, accelerator, weight_grads=True)
    epsilon = {}
    for name, module in logging.tqdm(
        targets.items(), desc="Calibrating epsilon", disable=not accelerator.is_main_process
    ):
        weight = weight_matrices(module).double().clone()
        factorization: Any = factorizations[name][CHANNEL]
        approximation = factorization.weight
        first_order: Any = np.zeros(min(weight.shape[-2:]) + 1)  # of a layer that these examples do not reach
        if name in statistics.layers:
            first_order = loss_curve(weight, factorization, statistics.layers[name]).first_order
        low, high = 0, len(first_order) - 1  # the gap at full rank is 0
        while high - low > 1:
            middle = (low + high) // 2
            loss = _loss_with(model, module, approximation(middle), few, accelerator)
            gap = abs(loss - statistics.loss - float(first_order[middle]))
            low, high = (low, middle) if gap < tolerance else (middle, high)
        epsilon[name] = float((approximation(high) - weight).abs().max())
    return epsilon


@torch.no_grad()
def _loss_with(
    model: PreTrainedModel, module: Any, matrix: torch.Tensor, loader: DataLoader, accelerator: Accelerator
) -> float:
    original = module.weight.detach().clone()
    restore = partial(module.weight.copy_, original)
    try:
        layout_of(module).matrices(module, module.weight).copy_(matrix.reshape(weight_matrices(module).shape))
        return mean_loss(model, loader, accelerator)
    finally:
        try:
            finish([restore])
        except BaseException:  # before its first step, too
            finish([restore])
            raise
