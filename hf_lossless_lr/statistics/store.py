"""Calibration statistics on disk: safetensors with a fingerprint of the model and of the data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..files import replacing
from ..fingerprint import tensors_fingerprint
from .checks import check_statistics
from .records import CalibrationStatistics, LayerStatistics

FORMAT_VERSION = 3  # 1 had no axis for several matrices of a layer, 2 had B of the gradients of labels


def save_statistics(statistics: CalibrationStatistics, path: str | os.PathLike[str], model_fingerprint: str) -> Path:
    """Write statistics to one safetensors file, atomically.

    Args:
        statistics: what to save; an input covariance shared by several layers is stored once.
        path: the file; its directory exists.
        model_fingerprint: fingerprint of the dense model, of its weights and what else it computes by.

    Returns:
        The path.
    """
    tensors: dict[str, torch.Tensor] = {}
    owner: dict[int, str] = {}
    layers = {}
    for name, layer in statistics.layers.items():
        shared = owner.setdefault(id(layer.input_covariance), name)
        tensors[f"{shared}.input_covariance"] = layer.input_covariance.contiguous()
        tensors[f"{name}.grad_covariance"] = layer.grad_covariance.contiguous()
        if layer.weight_grad is not None:
            tensors[f"{name}.weight_grad"] = layer.weight_grad.contiguous()
        layers[name] = {"tokens": layer.tokens, "units": layer.units, "input_covariance": shared}
    description = {
        "format_version": FORMAT_VERSION,
        "model_fingerprint": model_fingerprint,
        "data_fingerprint": statistics.data_fingerprint,
        "loss": statistics.loss,
        "examples": statistics.examples,
        "units": statistics.units,
        "groups": statistics.groups,
        "uncalled": statistics.uncalled,
        "layers": layers,
    }
    description["checksum"] = _checksum(description, tensors)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"statistics": json.dumps(description)})
    return Path(path)


def load_statistics(
    path: str | os.PathLike[str], model_fingerprint: str, device: torch.device
) -> CalibrationStatistics:
    """Read statistics, and refuse those of another model, or that were changed since they were written.

    Args:
        path: a file from `save_statistics`.
        model_fingerprint: fingerprint of the dense model at hand.
        device: device for the tensors.

    Returns:
        The statistics.

    Raises:
        CheckpointError: if the file is no statistics file, damaged, or of another model.
    """
    try:
        place = "cpu" if device.type == "cpu" else str(device)  # Accelerate numbers the CPUs of several processes
        with safe_open(path, framework="pt", device=place) as file:
            description = json.loads((file.metadata() or {})["statistics"])
            if description["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path}: format version {description['format_version']} is unknown. Calibrate again."
                )
            if description["model_fingerprint"] != model_fingerprint:
                raise CheckpointError(
                    f"{path}: these statistics belong to another model (or to other weights or settings of it). "
                    "Calibrate again."
                )

            # Copies are aligned as statistics that were just collected are, so that kernels sum in the same order.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        statistics = _statistics(description, tensors)
        check_statistics(statistics, str(path))
        if description["checksum"] != _checksum(description, tensors):
            raise CheckpointError(
                f"{path}: the content does not fit its checksum; the file was edited or damaged. Calibrate again."
            )
        return statistics
    except (
        SafetensorError,
        KeyError,
        TypeError,
        AttributeError,
        json.JSONDecodeError,
        RecursionError,
        OSError,
    ) as error:
        raise CheckpointError(f"{path} is no file of calibration statistics: {error}") from error


def _statistics(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> CalibrationStatistics:
    layers = {}
    for name, entry in description["layers"].items():
        layers[name] = LayerStatistics(
            weight_grad=tensors.get(f"{name}.weight_grad"),
            input_covariance=tensors[f"{entry['input_covariance']}.input_covariance"],
            grad_covariance=tensors[f"{name}.grad_covariance"],
            tokens=entry["tokens"],
            units=entry["units"],
        )
    return CalibrationStatistics(
        layers=layers,
        loss=description["loss"],
        examples=description["examples"],
        units=description["units"],
        data_fingerprint=description["data_fingerprint"],
        groups=tuple(tuple(group) for group in description["groups"]),
        uncalled=tuple(description["uncalled"]),
    )


def _checksum(description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of all that a file says, but for this."""
    said = {name: value for name, value in description.items() if name != "checksum"}
    text = json.dumps(said, sort_keys=True) + tensors_fingerprint(tensors)
    return hashlib.sha256(text.encode()).hexdigest()
