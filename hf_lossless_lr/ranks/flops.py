"""FLOPs as the size of a layer.

A layer's *rows* are what its matrix is applied to: tokens for a linear layer, output positions for a convolution.
A matrix of `n` stored numbers takes `2 n` FLOPs a row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..factors import LossCurve
from ..layers import SPATIAL, called_with, differentiating_only, layout_of, weight_matrices
from .sizes import LayerSize, parameter_size


class ForwardFlops(NamedTuple):
    """FLOPs of a forward pass as it is executed, padding included.

    Attributes:
        rows: rows of each target per example.
        fixed: FLOPs per example of everything outside the targets.
        widening: for each convolution, the width of its input as a multiple of that of its output: the first filters
            of the spatial form return so many more rows.
        inputs: shapes of what each target that is reached receives in the batch, and how often.
    """

    rows: dict[str, float]
    fixed: float
    widening: dict[str, float]
    inputs: dict[str, Counter[tuple[int, ...]]]


def forward_flops(
    model: nn.Module, targets: Mapping[str, nn.Module], batch: Mapping[str, Any], examples: int
) -> ForwardFlops:
    """Count the FLOPs of one forward pass: matrix products, convolutions and attention, as PyTorch's counter does.

    Args:
        model: the dense model.
        targets: its targeted layers, by name.
        batch: keyword arguments of its forward, on its device.
        examples: examples in the batch.

    Returns:
        The counts; 0 rows for a target that the batch does not reach.
    """
    counter, widening = FlopCounterMode(display=False), dict[str, float]()
    inputs: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)

    def note_shapes(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            x = called_with(args, kwargs)
            inputs[name][tuple(x.shape)] += 1
            if SPATIAL in layout_of(module).forms(module):
                widening[name] = x.shape[-1] / output.shape[-1]

        return hook

    hooks = [module.register_forward_hook(note_shapes(name), with_kwargs=True) for name, module in targets.items()]
    try:
        # The counter cannot see fused attention, nor follow all models whose weights require gradients.
        with differentiating_only(model, {}), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    flops = dict.fromkeys(targets, 0)
    names = {id(module): name for name, module in targets.items()}
    for name, module in model.named_modules(remove_duplicate=False):  # it is counted under the last of its names
        if id(module) in names:
            flops[names[id(module)]] += by_module.get(f"{type(model).__name__}.{name}", 0)
    rows = {name: count / (2 * weight_matrices(targets[name]).numel() * examples) for name, count in flops.items()}
    return ForwardFlops(rows, (counter.get_total_flops() - sum(flops.values())) / examples, widening, dict(inputs))


def flop_sizes(
    curves: Mapping[str, LossCurve], rows: Mapping[str, float], widening: Mapping[str, float]
) -> dict[str, LayerSize]:
    """Return FLOPs per example: `2 · stored numbers · rows`, at every rank; spatial forms see `widening`.

    Args:
        curves: a loss curve for each layer.
        rows: rows of each layer per example.
        widening: of the rows of the first filters of a spatial form.

    Returns:
        The sizes; those of a layer without rows are `unreached_size`.
    """
    sizes = {}
    for name, curve in curves.items():
        if not rows[name]:
            sizes[name] = unreached_size(curve)
            continue
        flops = 2 * rows[name]
        dense = flops * curve.dense_parameters
        others = {}
        for form, other in curve.others.items():
            numbers = other.groups * (other.in_features * widening.get(name, 1.0) + other.out_features)
            others[form] = LayerSize(flops * numbers * np.arange(len(other.second_order)), dense)
        for form, other in curve.paired.items():
            others[form] = LayerSize(flops * parameter_size(other).by_rank, flops * other.dense_parameters)
        sizes[name] = LayerSize(flops * parameter_size(curve).by_rank, dense, others=others)
    return sizes


def unreached_size(curve: LossCurve) -> LayerSize:
    """Return the size of a layer that the batch at hand does not reach: nothing, so no rank makes it smaller."""
    others = {form: unreached_size(other) for form, other in {**curve.others, **curve.paired}.items()}
    return LayerSize(np.full_like(parameter_size(curve).by_rank, np.inf, dtype=np.float64), 0.0, others=others)
