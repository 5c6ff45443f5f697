"""Architectures whose checkpoints have other tensors than the model: what of that must not touch compressed layers.

Transformers renames tensors when it saves and loads, and for some architectures also cuts or joins them, as a fused
projection of queries, keys and values. Factors cannot be joined, and the tensors of a layer are to stay together: a
compressed model keeps its own layers in its files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ..layers import is_factorized, rounded_modules, stored_in, without_wrappers
from .contents import layer_of

CONVERSIONS = "_weight_conversions"
"""Attribute in which Transformers keeps how a model was loaded, which saving does backwards."""


def harmless_conversions(model: Any) -> list[Any] | None:
    """Return what Transformers would do backwards when it saves a model, less what would change compressed layers.

    Args:
        model: a model with factorized or rounded layers.

    Returns:
        The rest; None where all of it is harmless.
    """
    present = getattr(model, CONVERSIONS, None)
    if present is None:  # a model that was not loaded: Transformers then takes off no prefix that it did not add
        found = get_model_conversion_mapping(model, add_legacy=False)
        present = [conversion for conversion in found if type(conversion).__name__ != "PrefixChange"]
    kept = apart_from_layers(present, model)
    return kept if len(kept) < len(present) else None


def apart_from_layers(conversions: Iterable[Any], model: nn.Module) -> list[Any]:
    """Leave out the conversions that cut or join tensors of factorized or rounded layers, or rename some of them.

    Args:
        conversions: those of the model.
        model: the model.

    Returns:
        The others.
    """
    names = {name for name, module in model.named_modules() if is_factorized(module)} | set(stored_in(model))
    names = set(map(without_wrappers, names)) | {name for name, *_ in rounded_modules(model)}
    tensors: dict[str, list[str]] = {}
    for key in map(without_wrappers, model.state_dict()):
        layer = layer_of(key, names)
        if layer is not None:
            tensors.setdefault(layer, []).append(key.removeprefix(layer))
    return [conversion for conversion in conversions if not _tears(conversion, tensors)]


def renaming_of(model: Any) -> Callable[[str], str]:
    """Return what makes the name of a module in the files, as Transformers does when it loads, its name in a model.

    Args:
        model: the model.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]

    def rename(name: str) -> str:
        key = f"{name}.weight"  # patterns are those of tensors
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        return key.removesuffix(".weight")

    return rename


def _tears(conversion: Any, tensors: Mapping[str, Iterable[str]]) -> bool:
    """Return whether a conversion, done backwards, leaves a layer otherwise than whole, under one name.

    Args:
        conversion: what Transformers does when it loads.
        tensors: name of a layer to the rests of the names of its tensors.
    """
    backwards = conversion.reverse_transform()
    for layer, rests in tensors.items():
        renamed = {rest: backwards.rename_source_key(f"{layer}{rest}") for rest in rests}
        if isinstance(conversion, WeightConverter):
            if any(pattern is not None for _, pattern in renamed.values()):
                return True
        elif len({key.removesuffix(rest) for rest, (key, _) in renamed.items()}) > 1:
            return True
    return False
