"""From statistics to the factors and the curves of every target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..errors import NumericalError
from ..factors import (
    Factorization,
    Forms,
    LossCurve,
    RoundingCost,
    ShelvedFactorizations,
    SpatialFactorization,
    dimension_counts,
    factorize,
    factorize_spatially,
    loss_curve,
    rounding_costs,
    spatial_curve,
    spatial_kernel,
    spatial_matrix,
    spatial_metric,
)
from ..formats import FLOAT
from ..layers import CHANNEL, PLACE_BYTES, SPATIAL, Targets, layout_of, weight_matrices
from ..ranks import OBJECTIVES, default_multiple
from ..statistics import CalibrationStatistics, LayerStatistics, Shelf
from .value_pairs import ValuePair, form_of, narrowed


def factorize_targets(
    config: LosslessLowRankConfig,
    targets: Targets,
    statistics: CalibrationStatistics,
    accelerator: Accelerator,
    shelf: Shelf | None,
    pairs: Mapping[str, ValuePair] = MappingProxyType({}),
) -> tuple[Mapping[str, Forms], dict[str, LossCurve]]:
    """Factorize every target, and predict its loss at every rank.

    With a shelf, layers that are on it are not factorized again, and each process does a share of the others.

    Args:
        config: the choices.
        targets: the layers to factorize.
        statistics: their statistics.
        accelerator: the processes.
        shelf: where factors are kept; None to keep them in memory.
        pairs: of a layer that has one.

    Returns:
        Factors and curves by name; of forms that pairs take together, curves alone.

    Raises:
        NumericalError: if a decomposition is not finite; it names the layer.
    """
    curves: dict[str, LossCurve] = {}
    is_main = accelerator.is_main_process

    def factorized(name: str) -> tuple[Forms, LossCurve]:
        forms, curve = _factorized(name, targets.chosen[name], statistics.layers[name], config)
        return forms, _in_pair(name, curve, pairs[name], targets, statistics, config) if name in pairs else curve

    if shelf is None:
        factorizations: dict[str, Forms] = {}
        for name in logging.tqdm(targets.chosen, desc="Factorizing", disable=not is_main):
            forms, curves[name] = factorized(name)
            factorizations[name] = {form: each.contiguous() for form, each in forms.items()}
        return factorizations, curves
    kept = ShelvedFactorizations(shelf, accelerator.device)
    owner = _owners(targets, accelerator.num_processes)
    missing = [name for name in targets.chosen if owner[name] == accelerator.process_index and not kept.has(name)]
    accelerator.wait_for_everyone()
    for name in logging.tqdm(missing, desc="Factorizing", disable=not is_main):
        kept.put(name, *factorized(name))
    accelerator.wait_for_everyone()
    for name in targets.chosen:
        curves[name] = kept.take(name)
    return kept, curves


def _owners(targets: Targets, processes: int) -> dict[str, int]:
    """Return which process factorizes a layer: the largest ones first, each to the one with the least work so far."""
    work, owner = [0.0] * processes, {}
    costs = {name: _cost(module) for name, module in targets.chosen.items()}
    for name in sorted(costs, key=lambda each: -costs[each]):
        owner[name] = work.index(min(work))
        work[owner[name]] += costs[name]
    return owner


def _cost(module: nn.Module) -> float:
    groups, out, size = weight_matrices(module).shape
    return float(groups * min(out, size) * (out + size) ** 2)


def _factorized(
    name: str, module: Any, stats: LayerStatistics, config: LosslessLowRankConfig
) -> tuple[Forms, LossCurve]:
    """Return the factorizations of a layer in each of its forms, and its curve, with those of the other forms."""
    weight, layout = weight_matrices(module), layout_of(module)
    storage = "fastest" if (config.storage, config.size) == ("auto", "latency") else config.storage
    try:
        factorization = factorize(weight, stats, str(config.metric), config.damping)
        spatial = _spatial(module, weight, stats, config)
    except NumericalError as error:
        raise NumericalError(f"{name!r}: {error}") from error
    curve = loss_curve(weight, factorization, stats, storage, OBJECTIVES[config.objective].needs_noise)
    pivots_inputs = layout.pivots_narrow_side and curve.in_features < curve.out_features
    curve = replace(_finished(curve, weight, factorization, stats, config), pivots_inputs=pivots_inputs)
    if spatial is None:
        return {CHANNEL: factorization}, curve
    return {CHANNEL: factorization, SPATIAL: spatial[0]}, replace(curve, others={SPATIAL: spatial[1]})


def _in_pair(
    name: str,
    curve: LossCurve,
    pair: ValuePair,
    targets: Targets,
    statistics: CalibrationStatistics,
    config: LosslessLowRankConfig,
) -> LossCurve:
    """Return the curve of a layer with those of the forms that it takes together with another one."""
    features = weight_matrices(targets.chosen[pair.values]).shape[-2]
    paired = {}
    for count in dimension_counts(features, pair.heads[1]):
        fewer = narrowed(pair, count, targets, statistics, config.damping)
        side, values = (fewer.values, True) if name == pair.values else (fewer.output, False)
        factorization = factorize(side.weight, side.statistics, str(config.metric), config.damping)
        narrow = loss_curve(side.weight, factorization, side.statistics, curve.storage)
        narrow = _finished(narrow, side.weight, factorization, side.statistics, config)
        base = fewer.cost if values else 0.0
        form = form_of(count)
        paired[form] = replace(
            narrow,
            form=form,
            base=base,
            second_order=base + narrow.second_order,
            pivots_inputs=narrow.in_features < narrow.out_features,
            places_bytes=PLACE_BYTES * (features if values else narrow.in_features),
        )
    return replace(curve, pair=(pair.values, pair.output), paired=paired)


def _spatial(
    module: Any, weight: torch.Tensor, stats: LayerStatistics, config: LosslessLowRankConfig
) -> tuple[SpatialFactorization, LossCurve] | None:
    kernel = spatial_kernel(module) if SPATIAL in (config.forms or ()) else None
    if kernel is None:
        return None
    A, B = stats.input_covariance, stats.grad_covariance
    spatial = factorize_spatially(weight, A, B, kernel, config.damping)
    curve, matrix = spatial_curve(weight, spatial, A, B), spatial_matrix(weight, kernel)
    seen = LayerStatistics(None, *spatial_metric(A, B, kernel), stats.tokens, stats.units)
    return spatial, _finished(curve, matrix, Factorization(spatial.factors), seen, config)


def _finished(
    curve: LossCurve,
    weight: torch.Tensor,
    factorization: Factorization,
    stats: LayerStatistics,
    config: LosslessLowRankConfig,
) -> LossCurve:
    """Return a curve with the costs of rounding, and with the multiple that its ranks are taken from."""
    rounded = [number_format for number_format in config.formats or () if number_format != FLOAT]
    costs = rounding_costs(weight, factorization, stats, config.damping, rounded) if rounded else {}
    in_float: dict[str, RoundingCost | None] = {FLOAT: None} if FLOAT in (config.formats or ()) else {}
    multiple = config.rank_multiple or default_multiple(weight.device.type, min(weight.shape[-2:]))
    return replace(curve, rounding={**in_float, **costs}, rank_multiple=multiple)
