"""Everything that is hung on a user's model for as long as it is compressed, set and unset in this file."""

from __future__ import annotations

import inspect
import os
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import TargetError
from ..layers import (
    NarrowLinear,
    Unfused,
    at_hand,
    check_offloaded,
    check_whole,
    grids_in,
    is_factorized,
    replace_modules,
    restore_grids,
    to_dense,
)
from .config import LosslessLowRankConfig
from .conversions import CONVERSIONS, harmless_conversions
from .encoding import dequantize_stored, encoded_state, load_encoded, tied_again
from .manifest import current_records, current_unfused, narrow_records
from .parallel import warn_before_sharding
from .parts import config_of_part, parts_of

logger = logging.get_logger(__name__)


ATTACHED = ("dequantize", "save_pretrained", "_upload_modified_files")
"""Attributes of a compressed model; `mark_compressed` sets the first two."""

BEFORE = "_lossless_lr_conversions"
"""Attribute with what Transformers kept of how the dense model was loaded."""

HOOK = "_lossless_lr_load_hook"
"""Attribute with the handle of the hook that lets a model with rounded weights read its own checkpoints."""


def mark_compressed(model: PreTrainedModel, config: LosslessLowRankConfig) -> None:
    """Record a compression in a model, so that it saves as a compressed checkpoint and `model.dequantize()` works.

    Args:
        model: a model with factorized layers.
        config: the configuration with their manifest.
    """
    model.config.quantization_config = config
    conversions = harmless_conversions(model)
    if conversions is not None:
        vars(model).setdefault(BEFORE, getattr(model, CONVERSIONS, None))
        vars(model)[CONVERSIONS] = conversions
    mark_parts(model, config)
    warn_before_sharding()
    vars(model)["dequantize"] = partial(dequantize, model)  # a bound method would not survive pickling
    attach_save(model, partial(save_encoded, model))
    for part in _models_in(model):
        if grids_in(part) and getattr(part.config, "quantization_config", None) is not None:
            attach_save(part, partial(_save_state, part))
    if grids_in(model):
        vars(model)[HOOK] = model.register_load_state_dict_pre_hook(load_encoded)


def refresh_manifest(model: PreTrainedModel) -> None:
    """Make the manifest of a compressed model, and those of its parts, say what is compressed in it now.

    Args:
        model: a compressed model; a dense one, where nothing in it is compressed any more.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, LosslessLowRankConfig):  # someone took it away
        return
    config.modules = current_records(model, config.modules)
    config.unfused = current_unfused(model)
    config.narrowed = narrow_records(model)
    if config.is_of_compressed:
        mark_parts(model, config)
    else:
        unmark_compressed(model)


def mark_parts(model: PreTrainedModel, config: LosslessLowRankConfig) -> None:
    """Let the configuration of each part of a model say what of it is compressed, so that it loads on its own.

    Args:
        model: a compressed model.
        config: its configuration.
    """
    for path, part in parts_of(model).items():
        of_part = config_of_part(config, path)
        if of_part.is_of_compressed:
            part.config.quantization_config = of_part
        else:
            part.config.__dict__.pop("quantization_config", None)


def _models_in(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the models within a model, which may be saved on their own."""
    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]


def attach_save(model: PreTrainedModel, save: partial[None]) -> None:
    """Let `save_pretrained` of a model be another function, which looks like the one of its class.

    Args:
        model: the model, or a part of one.
        save: takes the arguments of `save_pretrained`.
    """
    vars(model).pop("save_pretrained", None)
    vars(save).update(
        __signature__=inspect.signature(model.save_pretrained), __doc__=type(model).save_pretrained.__doc__
    )
    vars(model)["save_pretrained"] = save


def save_encoded(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save a model as Transformers does, with a manifest of what it has now, and rounded weights as their codes."""
    if not getattr(model, "_hf_peft_config_loaded", False):  # else it saves the adapter alone
        refresh_manifest(model)
        state_dict = model.state_dict() if state_dict is None else tied_again(model, state_dict)
    _save_state(model, save_directory, is_main_process, state_dict, *args, **kwargs)


def _save_state(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save a model, or a part of one, as Transformers does, with rounded weights as their codes."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        state_dict = encoded_state(model, model.state_dict() if state_dict is None else state_dict)
    if args:
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)
    else:  # by name: a user's class may take no more than the folder by position
        given = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        type(model).save_pretrained(model, save_directory, **given)


def mark_loaded(model: PreTrainedModel, config: LosslessLowRankConfig) -> None:
    """Record that a model was loaded compressed, and take off what Transformers hangs on quantized models.

    Args:
        model: a model as `from_pretrained` leaves it.
        config: the configuration with its manifest; without any module, the model is a dense one.
    """
    config.compute, config.part = "dequantized", None  # they were about one load
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
    if config.is_of_compressed:
        mark_compressed(model, config)
    else:
        unmark_compressed(model)


def unmark_compressed(model: PreTrainedModel) -> None:
    """Undo `mark_compressed`, and let the model save as any other."""
    for name in ATTACHED:
        model.__dict__.pop(name, None)
    if BEFORE in vars(model):
        vars(model)[CONVERSIONS] = vars(model).pop(BEFORE)
        if vars(model)[CONVERSIONS] is None:  # it was not loaded
            del vars(model)[CONVERSIONS]
    for part in _models_in(model):
        part.__dict__.pop("save_pretrained", None)
    hook = vars(model).pop(HOOK, None)
    if hook is not None:
        hook.remove()
    for part in (model, *parts_of(model).values()):
        part.config.__dict__.pop("quantization_config", None)


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Turn a compressed model back into a plain dense one, with the approximated and the rounded weights.

    Args:
        model: a compressed model, changed in place.
        dtype: dtype of the result; default the model's own.

    Returns:
        The same model, without factorized layers and without our configuration.

    Raises:
        TargetError: if the model is not compressed, offloaded for want of room on a GPU, or spread over processes.
    """
    check_whole(model)
    check_offloaded(model)
    with at_hand(model):
        _to_dense(model)
    unmark_compressed(model)
    if dtype is not None:
        nn.Module.to(model, dtype)
    return model


def _to_dense(model: PreTrainedModel) -> None:
    dequantize_stored(model)
    factorized = {name: module for name, module in model.named_modules() if is_factorized(module)}
    narrow = {name: module for name, module in model.named_modules() if isinstance(module, NarrowLinear)}
    if not factorized and not narrow and not grids_in(model):
        raise TargetError(
            f"this {type(model).__name__} has no factorized or rounded layers; there is nothing to dequantize."
        )
    if factorized:
        replace_modules(model, {name: to_dense(module) for name, module in factorized.items()})
    replace_modules(model, {name: module.dense() for name, module in narrow.items()})
    unfused = {name: module for name, module in model.named_modules() if isinstance(module, Unfused)}
    replace_modules(model, {name: module.fused() for name, module in unfused.items()})
    restore_grids(model, {})
