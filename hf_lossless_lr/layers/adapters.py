"""Where adapters go in a compressed model: the plain layers inside of factorized ones, which PEFT knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import TargetError
from .factorized import Factorized, is_factorized
from .layout import find_layout
from .narrow import NarrowLinear
from .patterns import check_patterns, match_specificity
from .stored import Stored
from .targets import default_skips

ALL_LINEAR = "all-linear"


def lora_targets(model: PreTrainedModel, target_modules: Sequence[str] | str | None = None) -> list[str]:
    """Return names for `LoraConfig(target_modules=...)` that mean the same layers as in the dense model.

    PEFT puts adapters on plain layers only, so a factorized layer is named by a factor. It is `up`: with an adapter,
    that makes any change of the outputs out of what `down` lets through of the inputs. Where pivots are outputs, which
    `down` computes and `up` does not reach, it is both. `studies/train_compressed.py` compares the places.

    Args:
        model: a compressed model, or a dense one.
        target_modules: patterns as in `LosslessLowRankConfig`: names or ends of names, `re:` and a regular expression,
            globs, types; `"all-linear"` for all linear layers but heads, poolers and tied ones; None for what PEFT
            takes by default in a model of this type.

    Returns:
        The names: of one or both factors where a layer is factorized, of the layer itself where it is dense.

    Raises:
        TargetError: if a pattern matches no layer, a layer holds codes instead of numbers, or there is no default.
        ImportError: if the default is asked for, and PEFT is not installed.
    """
    layers = dict(_layers(model))
    if target_modules is None:
        target_modules = _default_of_peft(model, layers)
    if target_modules == ALL_LINEAR:
        left = default_skips(model)
        chosen = {n: m for n, m in layers.items() if n not in left and _is_linear(m)}
        if not chosen:
            raise TargetError(
                f"target_modules: {type(model).__name__} has no linear layer besides heads; name layers."
            )
    else:
        patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        unknown = [p for p in patterns if not any(_matches(p, n, m) for n, m in layers.items())]
        check_patterns("target_modules", unknown, layers)
        chosen = {n: m for n, m in layers.items() if any(_matches(p, n, m) for p in patterns)}
    return [plain for name, layer in chosen.items() for plain in _plain(name, layer)]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that a pattern may mean; a factor of a layer is none."""
    layers: list[Any] = [module for module in model.modules() if is_factorized(module)]
    factors = {id(factor) for layer in layers for factor in (layer.down, layer.up)}
    factors |= {id(module.inner) for module in model.modules() if isinstance(module, NarrowLinear)}
    for name, module in model.named_modules():
        known = isinstance(module, (Factorized, NarrowLinear, Stored)) or find_layout(module) is not None
        if known and id(module) not in factors:
            yield name, module


def _matches(pattern: str, name: str, module: Any) -> bool:
    """Return whether a pattern means a layer; a factorized one is also of the type that it replaced."""
    if isinstance(module, NarrowLinear):
        return bool(match_specificity(pattern, name, module)) or pattern == "Linear"
    return bool(match_specificity(pattern, name, module)) or (is_factorized(module) and pattern == module.layer_type)


def _is_linear(module: Any) -> bool:
    module = module.inner if isinstance(module, NarrowLinear) else module
    plain = module.down if is_factorized(module) else module
    plain = plain.template if isinstance(plain, Stored) else plain
    layout = find_layout(plain)
    return layout is not None and not layout.kernel_size(plain)


def _plain(name: str, module: Any) -> list[str]:
    """Return the names of the plain layers that an adapter of a layer is put on."""
    if any(isinstance(part, Stored) for part in module.modules()):
        raise TargetError(
            f"target_modules: {name!r} holds codes, beside which no adapter can be put. Load the checkpoint without "
            '`compute="stored"`; its numbers are then floating-point ones.'
        )
    if isinstance(module, NarrowLinear):
        return _plain(f"{name}.inner", module.inner)
    if not is_factorized(module):
        return [name]
    pivots_are_outputs = module.permutation is not None and not module.pivots_inputs
    return [f"{name}.{factor}" for factor in (("down", "up") if pivots_are_outputs else ("up",))]


def _default_of_peft(model: PreTrainedModel, layers: dict[str, nn.Module]) -> list[str]:
    """Return patterns for what PEFT takes by default; names that it lists for relatives of this model are left out."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    model_type = model.config.model_type
    found = DEFAULTS.get(model_type)
    if found is None:
        raise TargetError(
            f"target_modules: PEFT has no default for models of the type {model_type!r}; name layers, or take "
            f'"{ALL_LINEAR}".'
        )
    patterns = [f"re:{found}"] if isinstance(found, str) else list(found)
    return [p for p in patterns if any(_matches(p, name, module) for name, module in layers.items())]
