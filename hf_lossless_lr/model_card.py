"""README of a checkpoint from its report, and the `save_pretrained` that writes both beside the weights."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers import PreTrainedModel
from transformers.utils import logging

from .config import CompressionOptions, LosslessLowRankConfig
from .files import write_atomically
from .fingerprint import tensors_fingerprint
from .report import REPORT_NAME, CompressionReport
from .verdict import claims_of, verdict_sentence

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
TAGS = ("hf-lossless-lr", "low-rank", "compressed")
MARK = re.compile(r"<!-- Written by hf-lossless-lr, text ([0-9a-f]{64})\. Edit freely: .*? -->\s*$")
TEMPLATE_DESCRIPTION = (  # what Transformers puts into the template of a new repository's card
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
CHANGED_WEIGHTS = (
    "the weights were changed after they were measured (by training or a cast, for example), so no figure here is "
    "about this checkpoint"
)


def model_card(report: CompressionReport, base_model: str | None = None) -> str:
    """Return the README of a checkpoint.

    Args:
        report: the report of the compression.
        base_model: name of the dense model on the Hub, where it is known.

    Returns:
        Markdown with YAML metadata.
    """
    data = ModelCardData(library_name="transformers", tags=list(TAGS), base_model=base_model)
    sections = [
        f"# {base_model or report.model} with {_percent(report.model_keep_ratio, 0)} of its parameters",
        "Compressed with `hf-lossless-lr`, by low-rank factorization without fine-tuning.",
        f"**Verdict:** {verdict_sentence(report)}",
        *_comparison(report),
        *_loading(report),
        *_kept_dense(report),
        *_origin(report),
    ]
    body = "\n\n".join(sections) + "\n\n"
    mark = f"<!-- Written by hf-lossless-lr, text {_digest(body)}. Edit freely: an edited card is never replaced. -->"
    return f"---\n{data.to_yaml()}\n---\n\n{body}{mark}\n"


def _comparison(report: CompressionReport) -> list[str]:
    dense, compressed, certificate = report.dense, report.compressed, report.certificate
    layers = report.layers.values()
    rows: list[tuple[str, ...]] = [
        (
            "targeted parameters",
            f"{sum(layer.dense_parameters for layer in layers):,}",
            f"{sum(layer.parameters for layer in layers):,}",
        ),
        ("parameters", f"{dense.parameters:,}", f"{compressed.parameters:,}"),
        ("loss (nats)", f"{dense.loss:.4f}", f"{compressed.loss:.4f}"),
    ]
    if dense.accuracy is not None and compressed.accuracy is not None:
        rows.append(("accuracy", _percent(dense.accuracy), _percent(compressed.accuracy)))
    if certificate is not None and certificate.calibration_error is not None:
        rows.append(("expected calibration error", *(f"{error:.4f}" for error in certificate.calibration_error)))
    if certificate is not None and certificate.temperatures is not None:
        rows.append(("fitted temperature", *(f"{temperature:.3f}" for temperature in certificate.temperatures)))
    sections = ["## Dense and compressed", _table(("", "dense", "compressed"), rows)]
    if certificate is None:
        return sections
    header = ("difference, positive is worse", "mean", "lower bound", "upper bound", "margin")
    names = {"the loss": "loss (nats)", "the accuracy": "accuracy drop (points)"}
    differences = [
        (
            names.get(claim.name, "loss at fitted temperatures (nats)"),
            *(
                f"{claim.scale * value:+.{4 if claim.scale == 1 else 2}f}" if math.isfinite(value) else "unknown"
                for value in vars(claim.found).values()
            ),
            f"{claim.scale * claim.margin:g}",
        )
        for claim in claims_of(certificate)
    ]
    if certificate.changed is not None:
        differences.append(("changed answers", _percent(certificate.changed), "", "", ""))
    if certificate.divergence is not None:
        differences.append(("KL divergence (nats)", f"{certificate.divergence:.4f}", "", "", ""))
    about = (
        f"Each bound is one-sided, at {100 * certificate.confidence:g} % confidence, from "
        f"{certificate.examples:,} held-out examples with {certificate.units:,} labelled units, which had no part in "
        f"the compression; {certificate.clusters} are taken as independent. The p-value of a difference beyond its "
        f"margin is {certificate.p_value:.2g}."
    )
    notes = [f"Note: {reason}." for reason in certificate.reasons]
    limits = (
        "This says nothing about data of another kind than the held-out examples, about single groups among them, or "
        "about speed, which depends on the layer widths and the hardware."
    )
    return [*sections, _table(header, differences), about, *notes, limits]


def _loading(report: CompressionReport) -> list[str]:
    source = "transformers" if hasattr(transformers, report.model) else "your_code"
    code = (
        "import hf_lossless_lr  # pip install hf-lossless-lr; lets Transformers read this format\n"
        f"from {source} import {report.model}\n\n"
        f'model = {report.model}.from_pretrained("path or name of this checkpoint")'
    )
    after = (
        "`model.dequantize()` makes it a plain dense model with the approximated weights. Without the import, "
        "Transformers refuses the checkpoint with a size mismatch."
    )
    return ["## Loading", f"```python\n{code}\n```", after]


def _kept_dense(report: CompressionReport) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(name)
    dense = [name for name, layer in report.layers.items() if layer.rank is None]
    lines = [f"* {reason}: {_patterns(names)}" for reason, names in reasons.items()]
    if dense:
        lines.append(f"* targeted, but left dense by the choice of ranks: {_patterns(dense)}")
    count = len(report.layers) - len(dense)
    text = (
        f"{count} of {len(report.layers)} targeted layers are factorized; with the others, they keep "
        f"{_percent(report.keep_ratio)} of their parameters. `{REPORT_NAME}` has the ranks."
    )
    return ["## Layers", text, *(["Left dense:", "\n".join(lines)] if lines else [])]


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def _patterns(names: Iterable[str]) -> str:
    """Shorten names that differ in numbers only, and count them."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\d+", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    first = {re.sub(r"\d+", "*", name): name for name in reversed(list(names))}
    return ", ".join(f"`{pattern}` ({n})" if n > 1 else f"`{first[pattern]}`" for pattern, n in counts.items())


def _origin(report: CompressionReport) -> list[str]:
    parts = {"calibration": report.calibration, "held_out": report.held_out}
    rows = [
        (part, f"{parts[part]['examples']:,}" if part in parts else "", f"`{digest}`")
        for part, digest in sorted(report.fingerprints.items())
    ]
    options = ", ".join(f"{name}={value!r}" for name, value in _chosen(report.config).items())
    code = (
        "from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor\n\n"
        f"config = LosslessLowRankConfig({options})\n"
        "compressor = LowRankCompressor(config)\n"
        "model = compressor.compress(model, calib_dataset, eval_dataset=held_out, processing_class=tokenizer)"
    )
    dense = f"`model` is the dense one, whose state dict has the SHA-256 `{report.model_fingerprint}`."
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    table = _table(("part of the data", "examples", "SHA-256"), rows)
    return ["## Reproduction", f"```python\n{code}\n```", dense, table, f"Versions: {versions}."]


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that differ from what the objective alone would set."""
    objective = config.get("objective", LosslessLowRankConfig.objective)
    default = LosslessLowRankConfig(objective=objective)
    chosen = {f.name: config[f.name] for f in fields(CompressionOptions) if f.name in config}
    chosen = {name: value for name, value in chosen.items() if value != getattr(default, name)}
    return ({} if objective == LosslessLowRankConfig.objective else {"objective": objective}) | chosen


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def attach_card(model: PreTrainedModel, report: CompressionReport) -> None:
    """Let `save_pretrained` and `push_to_hub` of a model write its card and report, for as long as it is compressed.

    A card that a user wrote or edited is never replaced. Once the weights are no longer those that were measured, card
    and report are written without a certificate.

    Args:
        model: a compressed model.
        report: its report.
    """
    signature = inspect.signature(model.save_pretrained)
    weights = tensors_fingerprint(model.state_dict())
    save = partial(_save_pretrained, model, report, _hub_name(model), weights)
    vars(save).update(__signature__=signature, __doc__=type(model).save_pretrained.__doc__)
    vars(model)["save_pretrained"] = save


def _hub_name(model: PreTrainedModel) -> str | None:
    """Return the name under which a model was loaded from the Hub: one that is in the cache, and no folder."""
    name = str(model.name_or_path or "")
    if not name or Path(name).exists():
        return None
    try:
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except ValueError:  # no name, but a path
        return None


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
    save = partial(type(model).save_pretrained, model, save_directory, is_main_process, state_dict, *args, **kwargs)
    writes = getattr(model, "should_save_on_this_rank", bool)(is_main_process)
    if not writes or os.path.isfile(save_directory) or getattr(model, "_hf_peft_config_loaded", False):
        save()
        return
    if _fingerprint(model.state_dict() if state_dict is None else state_dict) != weights:
        logger.warning_once("%s; its model card has no certificate.", CHANGED_WEIGHTS)
        report = replace(report, certificate=None, uncertified=CHANGED_WEIGHTS)
    card, path = model_card(report, base_model), Path(save_directory) / CARD_NAME
    users = path.read_bytes() if path.exists() and not _replaceable(path) else None
    uploaded = card if users is None else users.decode(errors="replace")
    vars(model)["_upload_modified_files"] = partial(_upload, model, report, uploaded)  # an upload follows a save
    try:
        save()
    finally:
        if users is not None and path.read_bytes() != users:
            path.write_bytes(users)  # with push_to_hub=True, Transformers has replaced it
    report.save(save_directory)
    _place(card, path)


def _fingerprint(state: Mapping[str, Any]) -> str | None:
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type != "meta" for t in state.values())
    return tensors_fingerprint(state) if plain else None


def _upload(
    model: PreTrainedModel, report: CompressionReport, card: str, working_dir: str, *args: Any, **kwargs: Any
) -> Any:
    """Upload a folder whose card is the repository's by now, or the template of Transformers."""
    report.save(working_dir)
    _place(card, Path(working_dir) / CARD_NAME)
    return type(model)._upload_modified_files(model, working_dir, *args, **kwargs)


def _place(card: str, path: Path) -> None:
    """Write a card, unless a user's is there."""
    if not path.exists():
        write_atomically(path, card)
    elif _replaceable(path):
        write_atomically(path, _with_metadata(card, ModelCard.load(path, ignore_metadata_errors=True).data))


def _with_metadata(card: str, others: CardData) -> str:
    """Add what another card's metadata say besides, and its tags."""
    try:
        result = ModelCard(card, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError):  # a user's
        return card
    mine, theirs = result.data.to_dict(), others.to_dict()
    mine["tags"] = list(dict.fromkeys([*mine.get("tags", []), *theirs.get("tags", [])]))
    result.data = ModelCardData(**{**theirs, **mine}, ignore_metadata_errors=True)
    return str(result)


def _replaceable(path: Path) -> bool:
    """Return whether a card is the template of Transformers, or ours and not edited."""
    text = path.read_text(encoding="utf-8", errors="replace")
    block = REGEX_YAML_BLOCK.match(text)
    try:
        if block is None or not isinstance(yaml.safe_load(block[2]), dict):
            return False
    except yaml.YAMLError:
        return False
    body = text[block.end() :]
    mark = MARK.search(body)
    if mark is not None:
        return mark[1] == _digest(body[: mark.start()])
    try:
        template = ModelCard.from_template(ModelCardData(), model_description=TEMPLATE_DESCRIPTION)
    except ImportError:  # without Jinja2, Transformers has no template either
        return False
    return body.split() == template.text.split()


def _digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
