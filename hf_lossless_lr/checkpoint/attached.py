"""Everything that is hung on a user's model for as long as it is compressed, set and unset in this file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import CheckpointError, LosslessLowRankError, TargetError
from ..files import replacing
from ..fingerprint import tensors_fingerprint
from ..layers import (
    NarrowLinear,
    Unfused,
    at_hand,
    check_offloaded,
    check_whole,
    files_of_offloaded,
    grids_in,
    is_factorized,
    replace_modules,
    restore_grids,
    to_dense,
)
from ..report import CARD_NAME, REPORT_NAME, CompressionReport
from .cards import base_model_in, card_of, hub_name, is_replaceable, place_card
from .config import LosslessLowRankConfig
from .conversions import CONVERSIONS, harmless_conversions
from .encoding import dequantize_stored, encoded_state, load_encoded, tied_again
from .manifest import current_records, module_at, narrow_records
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
    _attach_save(model, partial(_save_encoded, model))
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
    config.unfused = [name for name in config.unfused if module_at(model, name) is not None]
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


def _attach_save(model: PreTrainedModel, save: partial[None]) -> None:
    vars(model).pop("save_pretrained", None)
    vars(save).update(
        __signature__=inspect.signature(model.save_pretrained), __doc__=type(model).save_pretrained.__doc__
    )
    vars(model)["save_pretrained"] = save


def _save_encoded(
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
        state_dict = encoded_state(model, state_dict) if grids_in(model) else state_dict
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)


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


CHANGED_WEIGHTS = (
    "the weights were changed after they were measured (by training, a cast or another head, for example), so no "
    "figure here is about this checkpoint"
)


def attach_card(model: PreTrainedModel, report: CompressionReport) -> None:
    """Let `save_pretrained` and `push_to_hub` of a model write its card and report, for as long as it is compressed.

    A card that a user wrote or edited is never replaced. Once the weights are no longer those that were measured, card
    and report are written without a certificate.

    Args:
        model: a compressed model.
        report: its report.
    """
    weights = report.compressed_fingerprint or tensors_fingerprint(model.state_dict())
    _attach_save(model, partial(_save_pretrained, model, report, hub_name(model), weights))


def attach_saved_card(model: PreTrainedModel, folder: Path) -> None:
    """Let a loaded model write its card and report again, as the compression did; see `attach_card`.

    Args:
        model: a compressed model.
        folder: what it was loaded from; without a report that says which weights it is about, nothing is attached.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return
    try:
        report = CompressionReport.from_json(path.read_text(encoding="utf-8"))
    except (LosslessLowRankError, ValueError, OSError) as error:
        logger.warning("%s cannot be used, and will not be saved with the model again: %s", path, error)
        return
    if report.compressed_fingerprint is not None:
        base = base_model_in(folder / CARD_NAME)
        _attach_save(model, partial(_save_pretrained, model, report, base, report.compressed_fingerprint))


def _save_pretrained(
    model: PreTrainedModel,
    report: CompressionReport,
    base_model: str | None,
    weights: str,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save a model with its card and report; what is offloaded of it is read from where it is."""
    whole = state_dict is None and not getattr(model, "_hf_peft_config_loaded", False)  # not the adapter alone
    read = sorted(path for path in files_of_offloaded(model) if path.parent == Path(save_directory).resolve())
    if whole and read:
        raise CheckpointError(f"{save_directory}: the model still reads offloaded weights from {read[0].name} there.")
    with at_hand(model) if whole else nullcontext():
        state_dict = model.state_dict() if whole else state_dict
        _save_with_card(
            model, report, base_model, weights, save_directory, is_main_process, state_dict, *args, **kwargs
        )


def _save_with_card(
    model: PreTrainedModel,
    report: CompressionReport,
    base_model: str | None,
    weights: str,
    save_directory: str | os.PathLike[str],
    is_main_process: bool,
    state_dict: dict[str, Any] | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    save = partial(_save_encoded, model, save_directory, is_main_process, state_dict, *args, **kwargs)
    writes = getattr(model, "should_save_on_this_rank", bool)(is_main_process)
    if not writes or os.path.isfile(save_directory) or getattr(model, "_hf_peft_config_loaded", False):
        save()
        return
    if _fingerprint(state_dict or {}) != weights:
        logger.warning_once("%s; its model card has no certificate.", CHANGED_WEIGHTS)
        report = replace(report, certificate=None, uncertified=CHANGED_WEIGHTS, compressed_fingerprint=None)
    card, path = card_of(report, base_model), Path(save_directory) / CARD_NAME
    users = path.read_bytes() if path.exists() and not is_replaceable(path) else None
    uploaded = card if users is None else users.decode(errors="replace")
    vars(model)["_upload_modified_files"] = partial(_upload, model, report, uploaded)  # an upload follows a save
    try:
        save()
    finally:
        if users is not None and path.read_bytes() != users:
            with replacing(path) as temporary:  # with push_to_hub=True, Transformers has replaced it
                temporary.write_bytes(users)
    report.save(save_directory)
    place_card(card, path)


def _fingerprint(state: Mapping[str, Any]) -> str | None:
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type != "meta" for t in state.values())
    return tensors_fingerprint(state) if plain else None


def _upload(
    model: PreTrainedModel, report: CompressionReport, card: str, working_dir: str, *args: Any, **kwargs: Any
) -> Any:
    """Upload a folder whose card is the repository's by now, or the template of Transformers."""
    report.save(working_dir)
    place_card(card, Path(working_dir) / CARD_NAME)
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)
