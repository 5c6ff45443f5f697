"""Another storage for the layers of a compressed model, which stay the same maps: for training, and for saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, TargetError
from ..factors import Factorization, metric_svd
from ..layers import (
    SPATIAL,
    STORAGES,
    Stored,
    check_whole,
    grid_of,
    is_factorized,
    layout_of,
    replace_modules,
    to_dense,
)
from .attached import refresh_manifest


@torch.no_grad()
def change_storage(model: PreTrainedModel, storage: str) -> PreTrainedModel:
    r"""Store the factors of a compressed model in another way, at the same ranks.

    Each layer's matrix `W` stays what it is, up to rounding. With its singular value decomposition `W = U S Vᵀ`, two
    factors are the balanced ones, `U √S` and `√S Vᵀ`; pivots are made of the same. Pivots store fewer numbers, but an
    optimizer's step moves `W` several times as far through them as through two balanced factors, or as in a dense
    layer: `docs/after_compression.md` has figures. So change to `two-factor` to train, and back to save.

    Left as they are: layers with numbers of 8 bits or fewer, spatial forms, and ranks that pivots do not go with.

    Args:
        model: a compressed model, changed in place; an optimizer for it must be made afterwards.
        storage: `two-factor` or `pivoted`.

    Returns:
        The same model.

    Raises:
        ConfigurationError: if the storage is unknown.
        TargetError: if the model is not compressed, wrapped, or spread over processes.
    """
    if storage not in STORAGES:
        raise ConfigurationError(f"storage: {storage!r} is unknown; choose one of {', '.join(STORAGES)}.")
    check_whole(model)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if is_factorized(module)}
    if not layers:
        raise TargetError(f"this {type(model).__name__} has no factorized layers, whose storage could change.")
    for name, layer in layers.items():
        check_plain(name, layer)
    changed = {name: _stored(layer, storage) for name, layer in layers.items() if _can_change(layer, storage)}
    replace_modules(model, changed)
    refresh_manifest(model)
    return model


def check_plain(name: str, module: nn.Module) -> None:
    """Refuse a module that has an adapter on it, or is not in memory.

    Args:
        name: its name, for the message.
        module: the module.

    Raises:
        TargetError: if it is so.
    """
    if any(hasattr(part, "base_layer") for part in module.modules()):
        raise TargetError(f"{name!r} has an adapter on it; merge it first, with `merge_and_unload()`.")
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        raise TargetError(f"{name!r} is offloaded; load the model into memory first.")


def _can_change(layer: Any, storage: str) -> bool:
    if layer.storage == storage or layer.form == SPATIAL:
        return False
    if any(isinstance(factor, Stored) or grid_of(factor) is not None for factor in (layer.down, layer.up)):
        return False
    return storage == "two-factor" or layer.rank < min(layer.out_features, layer.in_features)


def _stored(layer: Any, storage: str) -> nn.Module:
    """Return a layer of the same matrix in another storage."""
    dense = to_dense(layer)
    new = layout_of(dense).factorized(dense, layer.rank, storage, layer.form)
    weight = layer.dense_weight().unflatten(0, (layer.groups, -1))
    factors = Factorization(metric_svd(weight, rank=layer.rank)).truncate(layer.rank, storage, new.pivots_inputs)
    new.load_factors(*factors, bias=layer.bias)
    return new.requires_grad_(layer.up.weight.requires_grad)
