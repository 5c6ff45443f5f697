"""Which layers of a model are factorized.

Patterns are resolved by how specific they are: an exact name beats the end of a name (`q_proj`, as PEFT writes it),
which beats `re:` and a regular expression, then a glob, then a layer type. A layer is a target if its best match in
`target_modules` is more specific than its best match in `ignore`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from ..errors import TargetError
from .factorized import METHOD, has_hooks, is_factorized
from .layout import LAYOUTS, find_layout
from .offloaded import check_offloaded
from .patterns import TYPE, best_match, check_patterns
from .readers import read_by_others
from .subclasses import answers_as_its_base, has_more_than_its_base
from .whole import check_whole

NOT_ASKED_FOR = "not in `target_modules`"
POOLER, TASK_HEAD = HEADS = "pooler", "task head"


@dataclass(frozen=True)
class Targets:
    """The chosen layers and, for each other supported layer, why it stays dense.

    Attributes:
        chosen: name to layer, in the model's order; a layer with several names appears once.
        skipped: name to reason.
    """

    chosen: dict[str, nn.Module]
    skipped: dict[str, str]


def find_targets(
    model: PreTrainedModel,
    target_modules: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    heads: Sequence[str] = (),
) -> Targets:
    """Choose the layers to factorize.

    By default: every `nn.Linear`, `Conv1D`, `nn.Conv1d` and `nn.Conv2d` of the base model, and subclasses that answer
    as these do. Tied weights, output embeddings, task heads and poolers stay dense unless a name, regular expression
    or glob in `target_modules` asks for them; tied weights cannot be asked for. Depthwise convolutions, and layers
    that compute something else than their type, stay dense always.

    Args:
        model: the dense model.
        target_modules: patterns, or None for the default.
        ignore: patterns of layers to leave dense.
        heads: names of layers that are known to be heads, besides those that lie outside of a base model.

    Returns:
        The targets and the reasons for everything skipped.

    Raises:
        TargetError: if a pattern matches nothing, nothing is left, or a chosen layer is frozen, quantized or tied.
    """
    if any(is_factorized(module) for module in model.modules()):
        raise TargetError("the model is already compressed; call `dequantize()` on it, or start from the dense model.")
    reasons = dict.fromkeys(heads, TASK_HEAD) | default_skips(model)
    targets: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    candidates, read = _candidates(model), read_by_others(model)
    for name, module in candidates.items():
        wanted = best_match(target_modules or (), name, module)
        unwanted = best_match(ignore or (), name, module)
        if target_modules is None:
            wanted = TYPE
        if unwanted and unwanted >= wanted:
            skipped[name] = "in `ignore`"
        elif not wanted:
            skipped[name] = NOT_ASKED_FOR
        elif id(module) in read:
            skipped[name] = f"{read[id(module)]} reads its weight instead of calling it"
        elif refusal := _refusal(module):
            skipped[name] = refusal
        elif name in reasons and (wanted <= TYPE or reasons[name] == "tied"):
            if wanted > TYPE:
                raise TargetError(f"{name!r} shares its weight with another module and cannot be factorized.")
            skipped[name] = reasons[name]
        else:
            targets[name] = module
    check_patterns("target_modules", target_modules, candidates)
    check_patterns("ignore", ignore, candidates)
    if not targets:
        raise TargetError(_nothing_left(model, skipped))
    for name, module in targets.items():
        _check_layer(name, module)
    return Targets(targets, skipped)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that could be targets."""
    return {name: module for name, module in model.named_modules() if _is_layer(module)}


def _is_layer(module: nn.Module) -> bool:
    """A layer of a known type whose weight is its own parameter, not computed from others (by a weight norm)."""
    return _is_quantized(module) or (find_layout(module) is not None and "weight" in _own_parameters(module))


def _refusal(module: nn.Module) -> str | None:
    """Return why a layer cannot be factorized, whoever asks for it; quantized ones are an error later on."""
    layout = find_layout(module)
    if layout is None or _is_quantized(module) or module.weight.is_meta:
        return None
    if _is_hooked(module):
        return "something hangs on it (a hook, or a `forward` of its own), which would be lost"
    if not answers_as_its_base(module):
        return f"{type(module).__name__} computes something else than its base type"
    if has_more_than_its_base(module):
        return f"{type(module).__name__} has arguments or methods that its base type has not"
    return layout.refusal(module)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a call of a layer does more than its class says; what offloads its weights does not count."""
    return has_hooks(module) or ("forward" in vars(module) and not hasattr(module, "_hf_hook"))


def _is_quantized(module: nn.Module) -> bool:
    """A linear layer of another library that keeps its weight in another form (bitsandbytes, for one)."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and weight is not None and not weight.is_floating_point()


def _check_layer(name: str, module: nn.Module) -> None:
    weight = module.weight
    if _is_quantized(module):
        raise TargetError(
            f"{name!r} is quantized ({type(module).__name__}, {weight.dtype}). Compress the model in a floating-point "
            "dtype first and quantize the result, or add the layer to `ignore`."
        )
    if weight.is_meta:
        raise TargetError(f"{name!r} is on the meta device and has no values; load the weights first.")
    if not weight.requires_grad:
        raise TargetError(
            f"{name!r} is frozen (requires_grad=False), so it gets no gradient. Call "
            "`model.requires_grad_(True)`, or add the layer to `ignore`."
        )


def default_skips(model: PreTrainedModel) -> dict[str, str]:
    """Return the reason for each module that the defaults leave alone: tied, output embeddings, pooler, task head."""
    reasons: dict[str, str] = {}
    outside = _outside_of_bases(model)
    heads = {id(module) for module in _classifiers(model)}
    places = Counter(id(parameter) for module in model.modules() for parameter in _own_parameters(module).values())
    tied_keys = getattr(model, "all_tied_weights_keys", None) or {}
    tied_keys = set(tied_keys) | set(tied_keys.values())
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        if places[id(_own_parameters(module).get("weight"))] > 1 or f"{name}.weight" in tied_keys:
            reasons[name] = "tied"
        elif module is output:
            reasons[name] = "output embeddings"
        elif "pooler" in name.split("."):
            reasons[name] = POOLER
        elif id(module) in outside or id(module) in heads:
            reasons[name] = TASK_HEAD
    return reasons


def _classifiers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of the classifiers that models inside name by themselves, as timm's do."""
    for whole in model.modules():
        ask = getattr(whole, "get_classifier", None)
        found = ask() if callable(ask) else ()
        for head in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(head, nn.Module):
                yield from head.modules()


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _outside_of_bases(model: PreTrainedModel) -> set[int]:
    """Return the ids of what lies beside a base model, also in the models inside (a decoder with a head)."""
    outside: set[int] = set()
    for whole in model.modules():
        if isinstance(whole, PreTrainedModel) and whole.base_model is not whole and not _is_without_head(whole):
            base = set(map(id, whole.base_model.modules()))
            outside |= {id(module) for module in whole.modules() if module is not whole} - base
    return outside


def _is_without_head(model: PreTrainedModel) -> bool:
    """Return whether a class has no head: of what it calls its base, it may be more (DINOv3, with its embeddings)."""
    names = MODEL_MAPPING_NAMES.get(getattr(model.config, "model_type", ""), ())
    return type(model).__name__ in ((names,) if isinstance(names, str) else names)


def _nothing_left(model: PreTrainedModel, skipped: dict[str, str]) -> str:
    name = type(model).__name__
    if not skipped:
        known = ", ".join(kind.__name__ for kind in LAYOUTS)
        return f"{name} has no layer that can be factorized ({known})."
    order = sorted(skipped.items(), key=lambda entry: entry[1] == NOT_ASKED_FOR)  # first what was asked for
    listed = "; ".join(f"{layer} ({reason})" for layer, reason in order[:5])
    return (
        f"no layer of {name} is left to factorize; skipped: {listed}{' …' if len(skipped) > 5 else ''}. Name layers "
        "in `target_modules`."
    )


def check_gradients() -> None:
    """Refuse to work, or to make parameters, where there are no gradients.

    Raises:
        TargetError: under `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise TargetError("there are no gradients under torch.inference_mode(). Compress outside of it.")


def check_model(model: Any) -> None:
    """Refuse what cannot be compressed, before any work.

    Args:
        model: what the user passed.

    Raises:
        TargetError: if it is no dense floating-point `PreTrainedModel`, or neither whole nor at hand.
    """
    check_whole(model)
    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            f"compress() takes a transformers PreTrainedModel, got {type(model).__name__}. Unwrap it first (for PEFT: "
            "`merge_and_unload()`; for torch.compile: `._orig_mod`)."
        )
    name = type(model).__name__
    existing = getattr(model.config, "quantization_config", None)
    if getattr(existing, "quant_method", None) == METHOD or any(is_factorized(module) for module in model.modules()):
        raise TargetError(
            f"this {name} is already compressed. Call `model.dequantize()`, or start from the dense checkpoint."
        )
    if existing is not None or getattr(model, "is_quantized", False):
        raise TargetError(f"this {name} is quantized. Compress it in floating point first and quantize the result.")
    check_offloaded(model)
    _check_state(model, f"this {name}")


def _check_state(model: PreTrainedModel, this: str) -> None:
    """Refuse models whose layers are not plain ones of their own, or cannot get gradients."""
    adapters = any(type(module).__module__.split(".")[0] == "peft" for module in model.modules())
    if adapters or getattr(model, "_hf_peft_config_loaded", False):
        raise TargetError(
            f"{this} has an adapter, beside which compressed weights would not be saved. Merge it first: load the "
            "dense model, then peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(); or take it off with "
            "model.delete_adapter(name)."
        )
    compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
    if compiled:
        raise TargetError(f"{this} is compiled. Compress the model as it was loaded, then compile the result.")
    if getattr(model.config, "return_dict", True) is False:
        raise TargetError(f"{this} returns tuples, whose parts have no names. Set model.config.return_dict = True.")
    check_gradients()
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise TargetError(
            f"{this} was built under torch.inference_mode(), so that its weights never get gradients. Build or load "
            "it outside of that."
        )
