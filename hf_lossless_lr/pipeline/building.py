"""From choices to layers: what takes the place of each target, with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint import LosslessLowRankConfig
from ..factors import damped, fill
from ..formats import FLOAT
from ..layers import choose_storage, copied, layout_of, storage_in, weight_matrices
from ..ranks import Choice
from .calibration import Calibration
from .embeddings import rounded_embeddings


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
