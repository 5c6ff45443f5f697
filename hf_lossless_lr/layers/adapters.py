"""Where adapters go in a compressed model: the plain layers inside of factorized ones, which PEFT knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from ..errors import TargetError
from .factorized import is_factorized
from .layout import find_layout
from .stored import Stored
from .targets import check_patterns, default_skips, match_specificity

ALL_LINEAR = "all-linear"
FACTORS = ("down", "up")


def lora_targets(model: PreTrainedModel, target_modules: Sequence[str] | str | None = None) -> list[str]:
    """Return names for `LoraConfig(target_modules=...)` that mean the same layers as in the dense model.

    PEFT puts adapters on plain layers only, so a factorized layer is named by both of its factors: an adapter of one
    of them would be confined to the inputs that the other one lets through, or to the outputs that it reaches.

    Args:
        model: a compressed model, or a dense one.
        target_modules: patterns as in `LosslessLowRankConfig`: names or ends of names, `re:` and a regular expression,
            globs, types; `"all-linear"` for all linear layers but heads, poolers and tied ones; None for what PEFT
            takes by default in a model of this type.

    Returns:
        The names: those of the factors where a layer is factorized, of the layer itself where it is dense.

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
    else:
        patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        check_patterns("target_modules", patterns, layers)
        chosen = {n: m for n, m in layers.items() if any(match_specificity(p, n, m) for p in patterns)}
    names = [name for layer in chosen.items() for name in _plain(*layer)]
    return list(dict.fromkeys(names))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that a pattern may mean; a factor of a layer is one, too."""
    for name, module in model.named_modules():
        if is_factorized(module) or isinstance(module, Stored) or find_layout(module) is not None:
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    plain = module.down if is_factorized(module) else module
    plain = plain.template if isinstance(plain, Stored) else plain
    layout = find_layout(plain)
    return layout is not None and not layout.kernel_size(plain)


def _plain(name: str, module: nn.Module) -> list[str]:
    """Return the names of the plain layers that a layer consists of."""
    if any(isinstance(part, Stored) for part in module.modules()):
        raise TargetError(
            f"target_modules: {name!r} holds codes, beside which no adapter can be put. Load the checkpoint without "
            '`compute="stored"`; its numbers are then floating-point ones.'
        )
    return [f"{name}.{factor}" for factor in FACTORS] if is_factorized(module) else [name]


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
    return [p for p in patterns if any(match_specificity(p, name, module) for name, module in layers.items())]
