r"""Refit: fit each layer to the inputs that it really receives once everything before it is compressed.

With `X` the dense model's inputs to a layer and `X'` those of the compressed model, the layer that best
reproduces the dense outputs from the shifted inputs is

$$T = (W X X'^\top + WΛ)\,(X' X'^\top + Λ)^{-1}$$

with a ridge `Λ` of each channel (`shifted_weight`), which is then factorized at the layer's rank in the metric
`(X'X'ᵀ, B)`. Layers are taken in the order of the forward pass; layers that share their input (q, k, v; gate, up)
are one group. A layer whose outputs are added to a residual stream `R`, which is `R'` in the compressed model, is
fitted to `W X + R − R'` instead of `W X`.

Every batch is sent through the dense and through the compressed model once, and *pauses* where a group receives its
input (in the dense model behind a single layer that is no wider in its outputs: they are `W X` already), until the
group is refitted. So the cost is two forward passes and the products, for any architecture, and the memory that of
one point of the forward pass over all batches. The pauses are greenlets: the model's own forward runs as it is, and
nothing is re-implemented or run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import PaddingMasks
from ..errors import NumericalError
from ..formats import FLOAT
from ..layers import SPATIAL, evaluating, is_factorized, taking_turns, weight_matrices
from ..statistics import (
    CalibrationStatistics,
    Group,
    Pause,
    Residual,
    Stream,
    Watch,
    gram,
    paired_streams,
    pausing,
    precision_of,
    rows_of,
)
from ..timing import Clock
from .decomposition import is_finite, metric_svd
from .dimensions import NarrowLayer
from .factorize import Factorization
from .filling import fill
from .linalg import damped, shifted_weight
from .paired_rows import chunks
from .refitted import RefittedLayers
from .spatial import factorize_spatially

RIDGE = 6.0  # times features / rows, of each channel, towards the weight: docs/method.md
LARGEST_RIDGE = 0.2


@dataclass(frozen=True)
class RefitTarget:
    """A layer to refit.

    Attributes:
        dense: the dense layer.
        layer: the layer that replaces it, factorized or rounded, with its numbers loaded; changed in place.
        grad_covariance: returns B of the layer, which need not stay in memory, or None for a metric without it.
            # shape: (groups, out, out)
        number_format: the format that its numbers are rounded to.
        narrow: what it is with fewer dimensions, where `layer` is such a one.
    """

    dense: nn.Module
    layer: Any
    grad_covariance: Callable[[], torch.Tensor | None]
    number_format: str = FLOAT
    narrow: NarrowLayer | None = None


def refit_groups(statistics: CalibrationStatistics, targets: Mapping[str, RefitTarget]) -> list[Group]:
    """Return the groups of layers that can be refitted, in the order of the forward pass.

    A layer that is called several times in a pass (ALBERT's) has no one input to fit; it is left as it is.
    """
    groups = (tuple(name for name in group if name in targets) for group in statistics.groups)
    return [group for group in groups if group]


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    targets: Mapping[str, RefitTarget],
    groups: Sequence[Group],
    loaders: Sequence[DataLoader],
    accelerator: Accelerator,
    damping: float,
    clock: Clock,
    others: Mapping[str, nn.Module] = MappingProxyType({}),
    kept: RefittedLayers | None = None,
    most: int | None = None,
    residuals: Mapping[str, Residual] = MappingProxyType({}),
) -> list[str]:
    """Refit the layers to their shifted inputs, in the order of the forward pass.

    Args:
        model: the dense model; it is dense again afterwards.
        targets: layers, by name; the numbers in `layer` are replaced.
        groups: from `refit_groups`.
        loaders: calibration data, and more; labels play no part.
        accelerator: made with `even_batches=False`.
        damping: relative damping of the metric.
        clock: the times of the forward passes, of the products of their inputs and of the solves are added here.
        others: what else is in the compressed model, by name; left as it is.
        kept: where finished layers are kept, to go on after an interruption; None for nowhere.
        most: how many batches of this process there is memory for; None for all of them.
        residuals: what the outputs of layers are added to; where it is known, they make up for its error, too.

    Returns:
        The layers that were left as they are: in no group, not reached by the data, or with other rows in the
        compressed model than in the dense one (behind a router, where it is not known which these are), or in an
        expert that got fewer of them than it has features.

    Raises:
        NumericalError: if what a layer gets or gives is not finite.
    """
    left = set(targets)
    layers = {**others, **{name: target.layer for name, target in targets.items()}}
    masks = PaddingMasks(model)  # what it knows of the model serves all streams
    pauses, watches = _pauses(targets, groups), _watches(model, groups, layers, residuals)
    with evaluating(model), pausing(model, masks.encoder, pauses, watches):
        turn = taking_turns(model, layers)
        batches = list(islice((batch for loader in loaders for batch in accelerator.prepare(loader)), most))
        finished = set[Group]()
        with paired_streams(model, batches, masks) as (dense, compressed):
            for group in logging.tqdm(groups, desc="Refitting", disable=not accelerator.is_main_process):
                if kept is not None and all(name in kept for name in group):  # streams will pass it
                    for name in group:
                        kept.take(name, targets[name].layer)
                    finished.add(group)
                    left -= set(group)
                    continue
                with clock.timed("refit_forward"):
                    arrived = [stream.advance(group, finished) for stream in dense]
                    with turn():
                        arrived = [s.advance(group, finished) and a for s, a in zip(compressed, arrived, strict=True)]
                pairs = [(d, c) for d, c, a in zip(dense, compressed, arrived, strict=True) if a]
                with clock.timed("refit_products"):
                    makes_up = _made_up(group, residuals)
                    products = _products([targets[name] for name in group], pairs, accelerator, makes_up)
                finished.add(group)
                if products is not None:
                    left -= set(group)
                    _check_finite(group, products)
                    with clock.timed("refit_solves"):
                        for place, name in enumerate(group):
                            _solve(targets[name], products, place, damping)
                            if kept is not None and accelerator.is_main_process:
                                kept.put(name, targets[name].layer)
    return [name for name in targets if name in left]


def _pauses(targets: Mapping[str, RefitTarget], groups: Sequence[Group]) -> list[Pause]:
    """Return where streams wait: at each layer of a group, in both models."""
    pauses = []
    for group in groups:
        behind = _compares_outputs([targets[name] for name in group])
        for name in group:
            target = targets[name]
            pauses.append(Pause(group, target.dense, rows_of(target.dense), behind))
            pauses.append(Pause(group, target.layer, rows_of(target.dense), behind=False))
    return pauses


def _made_up(group: Group, residuals: Mapping[str, Residual]) -> bool:
    """Return whether a group makes up for the error of what is added to its output: one layer alone can."""
    return len(group) == 1 and group[0] in residuals


def _watches(
    model: nn.Module, groups: Sequence[Group], layers: Mapping[str, Any], residuals: Mapping[str, Residual]
) -> list[Watch]:
    """Return where streams see what is added to the output of a layer, in both models."""
    watches = []
    for group in groups:
        if _made_up(group, residuals):
            name, output = residuals[group[0]]
            modules = [model.get_submodule(name), *([layers[name]] if name in layers else [])]
            watches += [Watch(group, module, output) for module in modules]
    return watches


class _Products(NamedTuple):
    """Products over all rows that a group received, per row.

    Attributes:
        output_cross: `W X X'ᵀ` of each layer of the group, or `(W X + R − R') X'ᵀ` where `R` is added to its outputs.
        input_gram: `X' X'ᵀ`.
        ridge: of the fit to them; the fewer rows for each feature, the more.
    """

    output_cross: tuple[torch.Tensor, ...]
    input_gram: torch.Tensor
    ridge: float


def _check_finite(group: Group, products: _Products) -> None:
    if not all(is_finite(each) for each in (products.input_gram, *products.output_cross)):
        raise NumericalError(
            f"the refit met inputs or outputs of {group[0]!r} that are not finite (NaN or infinity); check the data "
            "that it takes: the calibration data and refit_dataset."
        )


def _compares_outputs(group: Sequence[RefitTarget]) -> bool:
    """Return whether the dense model's outputs `W X` stand for its inputs.

    They do where they are no wider, and have no bias or one that can be taken off: in 16 bits it may have rounded away
    the rest.
    """
    dense: Any = group[0].dense
    out, size = weight_matrices(dense).shape[-2:]
    return len(group) == 1 and out <= size and (dense.bias is None or dense.weight.dtype.itemsize >= 4)


def _products(
    group: Sequence[RefitTarget], streams: list[tuple[Stream, Stream]], accelerator: Accelerator, makes_up: bool
) -> _Products | None:
    """Return the products of a group over all processes; None if there are no rows, or they do not pair."""
    weights = [weight_matrices(target.dense) for target in group]
    stacked, outputs = torch.cat(weights, dim=-2), _compares_outputs(group)
    matrices, out, size = stacked.shape
    cross = stacked.new_zeros((matrices, out if outputs else size, size), dtype=precision_of(size))
    input_gram = cross.new_zeros((matrices, size, size))
    error_cross = cross.new_zeros((matrices, out if makes_up else 0, size))
    rows_seen = unpaired = 0
    for chunk in chunks(streams):
        if chunk is None:
            unpaired += 1
            continue
        rows_seen += chunk.dense.shape[-2]
        cross += chunk.dense.mT @ chunk.shifted
        input_gram += gram(chunk.shifted)
        if chunk.errors is not None:
            error_cross += chunk.errors.mT @ chunk.shifted
    routed = any(compressed.rows is not None and compressed.rows.routed() is not None for _, compressed in streams)
    counts = torch.tensor([rows_seen, unpaired, int(routed)], device=cross.device)
    sums = (cross, input_gram, error_cross, counts)
    cross, input_gram, error_cross, counts = (accelerator.reduce(total, "sum") for total in sums)
    rows, unpaired, routed = counts.tolist()
    if rows == 0 or unpaired or (routed and rows < size):
        return None
    if not outputs:
        cross = stacked.to(cross.dtype) @ cross
    ridge = min(RIDGE * size / rows, LARGEST_RIDGE)
    cross = cross + error_cross if makes_up else cross
    output_cross = torch.split(cross / rows, [weight.shape[-2] for weight in weights], dim=-2)
    return _Products(output_cross, input_gram / rows, ridge)


def _solve(target: RefitTarget, products: _Products, place: int, damping: float) -> None:
    input_gram, output_cross, layer = products.input_gram, products.output_cross[place], target.layer
    dense = weight_matrices(target.dense)
    if target.narrow is not None:
        dense, layer = target.narrow.weight, target.layer.inner
        output_cross, input_gram = target.narrow.seen(output_cross, input_gram)
    weight = shifted_weight(dense, output_cross, input_gram, products.ridge)
    inputs, factorization = damped(input_gram, damping), None
    moments = target.grad_covariance()
    if moments is not None and is_factorized(layer) and layer.form == SPATIAL:
        spatial = factorize_spatially(weight, input_gram, moments, layer.kernel_size, damping, layer.rank)
        fill(layer, weight, spatial, inputs, target.number_format)
        return
    if is_factorized(layer):
        outputs = None if moments is None else damped(moments, damping)
        factorization = Factorization(metric_svd(weight, inputs, outputs, layer.rank))
    fill(layer, weight, factorization, inputs, target.number_format)
