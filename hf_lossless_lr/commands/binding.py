"""Are the weights of a checkpoint those that its report is about?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError
from ..fingerprint import tensors_fingerprint
from ..report import REPORT_NAME, CompressionReport
from .loading import load_auto

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_report(folder: Path) -> CompressionReport:
    """Read the report of a checkpoint.

    Args:
        folder: the checkpoint.

    Returns:
        The report.

    Raises:
        CheckpointError: if there is none.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        raise CheckpointError(
            f"there is no folder {folder}."
            if not folder.is_dir()
            else f"{folder} has no {REPORT_NAME}, which a checkpoint has that this package compressed."
        )
    try:
        return CompressionReport.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def doubt_about_weights(folder: Path, report: CompressionReport) -> str | None:
    """Return why it is not known whether a checkpoint has the weights of its report; None where it has, or has none.

    Args:
        folder: the checkpoint.
        report: its report.

    Returns:
        The doubt in words.

    Raises:
        CheckpointError: if the weights are others, or cannot be read.
    """
    tensors = _stored(folder)
    if not tensors:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        return f"{others[0]} in {folder} is no {WEIGHTS}, and was not compared" if others else None
    if report.compressed_fingerprint is None:
        return f"the report does not say which weights it is about, so it may be about others than those of {folder}"
    if tensors_fingerprint(tensors) == report.compressed_fingerprint:
        return None
    # Files lack what is tied, and have other names for some architectures; the model has them all.
    model_class = getattr(transformers, report.model, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        return f"{report.model} is no class of Transformers, so the weights in {folder} cannot be compared"
    model = load_auto(report.model, str(folder), dtype="auto")
    found = tensors_fingerprint(model.state_dict())
    if found != report.compressed_fingerprint:
        raise CheckpointError(
            f"the weights in {folder} are not those that its report is about, so none of its figures is: their "
            f"SHA-256 is {found[:12]}…, the report's {report.compressed_fingerprint[:12]}…."
        )
    return None


def what_is_known(folder: Path) -> tuple[set[str], str | None]:
    """Return the data that a checkpoint was made from, and why its report may be about other weights.

    Args:
        folder: the checkpoint; one without a report is known nothing of.

    Returns:
        Fingerprints of the data, and the doubt in words.
    """
    if not (folder / REPORT_NAME).is_file():
        return set(), None
    report = read_report(folder)
    used = {digest for part, digest in report.fingerprints.items() if part != "held_out"}
    try:
        return used, doubt_about_weights(folder, report)
    except CheckpointError as error:
        return used, str(error).rstrip(".")


def _stored(folder: Path) -> dict[str, Any]:
    """Return the tensors in a checkpoint's files."""
    try:
        names = [WEIGHTS] if (folder / WEIGHTS).exists() else []  # Transformers reads it before an index
        if not names and (folder / INDEX).exists():
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted({Path(name).name for name in index["weight_map"].values()})
        return {key: value for name in names for key, value in load_file(folder / name).items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read the weights in {folder}: {error}") from error
