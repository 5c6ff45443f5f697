"""From choices to layers: what takes the place of each target, with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint import LosslessLowRankConfig
from ..factors import NarrowLayer, damped, factorize, fill
from ..formats import FLOAT
from ..layers import (
    FORMS,
    INPUTS,
    OUTPUTS,
    NarrowLinear,
    choose_storage,
    copied,
    layout_of,
    storage_in,
    weight_matrices,
)
from ..ranks import Choice
from .calibration import Calibration
from .embeddings import rounded_embeddings
from .value_pairs import count_of, narrowed


def build_layers(
    calibration: Calibration, choices: Mapping[str, Choice], config: LosslessLowRankConfig
) -> dict[str, Any]:
    """Return what takes the place of dense layers, and of embeddings; what stays as it is is left out.

    Args:
        calibration: the calibration of a model, which is dense.
        choices: rank, number format and form of each target.
        config: damping, and the format of the embeddings.

    Returns:
        The layers by name, with their numbers.
    """
    layers: dict[str, Any] = dict(rounded_embeddings(calibration.dense.model, config.embeddings))
    factors = calibration.factors
    for name, choice in choices.items():
        rank, number_format, form = choice
        module: Any = factors.targets.chosen[name]
        if choice == Choice():
            continue
        narrow = narrow_layer(calibration, name, choice, config.damping)
        if narrow is not None:
            layers[name] = _narrow(calibration, name, choice, narrow, config)
            continue
        hessian = None
        if number_format != FLOAT:
            hessian = damped(calibration.statistics.layers[name].input_covariance, config.damping)
        if rank is None:
            layers[name] = copied(module)
            fill(layers[name], weight_matrices(module), None, hessian, number_format)
            continue
        curve = factors.curves[name].in_form(form)
        storage = storage_in(number_format, curve.storage)
        stored = choose_storage(curve.out_features, curve.in_features, rank, storage)
        layers[name] = layout_of(module).factorized(module, rank, stored, form)
        fill(layers[name], weight_matrices(module), factors.factorizations[name][form], hessian, number_format)
        if module.bias is not None:
            with torch.no_grad():
                layers[name].bias.copy_(module.bias).requires_grad_(module.bias.requires_grad)
    return layers


def narrow_layer(calibration: Calibration, name: str, choice: Choice, damping: float) -> NarrowLayer | None:
    """Return what a layer is with fewer dimensions between it and its pair; None where it keeps all.

    Args:
        calibration: the calibration of a model.
        name: name of the layer.
        choice: what it becomes.
        damping: relative damping of the second moments.
    """
    if choice.form in FORMS:
        return None
    pair, targets = calibration.pairs[name], calibration.factors.targets
    found = narrowed(pair, count_of(choice.form), targets, calibration.statistics, damping)
    return found.values if name == pair.values else found.output


@torch.no_grad()
def _narrow(
    calibration: Calibration, name: str, choice: Choice, narrow: NarrowLayer, config: LosslessLowRankConfig
) -> NarrowLinear:
    module: Any = calibration.factors.targets.chosen[name]
    layer = NarrowLinear(module, len(narrow.places), INPUTS if narrow.rows is None else OUTPUTS)
    layer.place(narrow.places)
    statistics, factorization, hessian = narrow.statistics, None, None
    bias = module.bias
    if choice.format != FLOAT:
        hessian = damped(statistics.input_covariance, config.damping)
    if choice.rank is not None:
        curve = calibration.factors.curves[name].paired[choice.form]
        storage = storage_in(choice.format, curve.storage)
        stored = choose_storage(curve.out_features, curve.in_features, choice.rank, storage)
        layer.inner = layout_of(layer.inner).factorized(layer.inner, choice.rank, stored)
        factorization = factorize(narrow.weight, statistics, str(config.metric), config.damping)
    fill(layer.inner, narrow.weight, factorization, hessian, choice.format)
    layer.requires_grad_(module.weight.requires_grad)
    if bias is not None:
        layer.inner.bias.copy_(bias if narrow.rows is None else narrow.rows.to(bias.device) @ bias.double())
        layer.inner.bias.requires_grad_(bias.requires_grad)
    return layer
