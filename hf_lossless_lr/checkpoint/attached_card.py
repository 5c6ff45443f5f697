"""The card and the report that hang on a compressed model, and are saved and uploaded with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import CheckpointError, LosslessLowRankError
from ..files import replacing
from ..fingerprint import tensors_fingerprint
from ..layers import at_hand, files_of_offloaded, without_wrappers
from ..report import CARD_NAME, REPORT_NAME, CompressionReport
from .attached import attach_save, save_encoded
from .cards import base_model_in, card_of, hub_name, is_replaceable, place_card

logger = logging.get_logger(__name__)


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
    attach_save(model, partial(_save_pretrained, model, report, hub_name(model), weights))


def attach_saved_card(model: PreTrainedModel, folder: Path) -> None:
    """Let a loaded model write its card and report again, as the compression did; see `attach_card`.

    Args:
        model: a compressed model.
        folder: what it was loaded from; without a report that says which weights it is about, nothing is attached.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return
    base = base_model_in(folder / CARD_NAME)
    try:
        report = CompressionReport.from_json(path.read_text(encoding="utf-8"))
        card_of(report, base)
    except (LosslessLowRankError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used, and will not be saved with the model again: %s", path, error)
        return
    if report.compressed_fingerprint is not None:
        attach_save(model, partial(_save_pretrained, model, report, base, report.compressed_fingerprint))


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
    save = partial(save_encoded, model, save_directory, is_main_process, state_dict, *args, **kwargs)
    writes = getattr(model, "should_save_on_this_rank", bool)(is_main_process)
    if not writes or os.path.isfile(save_directory) or getattr(model, "_hf_peft_config_loaded", False):
        vars(model).pop("_upload_modified_files", None)  # an upload is of the adapter alone
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
    return tensors_fingerprint({without_wrappers(name): t for name, t in state.items()}) if plain else None


def _upload(
    model: PreTrainedModel, report: CompressionReport, card: str, working_dir: str, *args: Any, **kwargs: Any
) -> Any:
    """Upload a folder whose card is the repository's by now, or the template of Transformers."""
    report.save(working_dir)
    place_card(card, Path(working_dir) / CARD_NAME)
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)
