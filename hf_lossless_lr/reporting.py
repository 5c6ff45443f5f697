"""From a calibration and its trials to a `CompressionReport`."""

from __future__ import annotations

import platform
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from torch import nn

from .calibration import Calibration
from .config import CompressionOptions, LosslessLowRankConfig
from .curves import LossCurve
from .rank_selection import kept_parameters
from .report import CompressionReport, LayerReport, Measurement
from .trials import Trial


def visited_point(calibration: Calibration, trial: Trial, config: LosslessLowRankConfig) -> dict[str, Any]:
    """Return the record of a trial for the report."""
    curves = calibration.curves
    dense = sum(curve.dense_parameters for curve in curves.values())
    predicted = sum(float(curves[name].second_order[rank]) for name, rank in trial.ranks.items() if rank is not None)
    record: dict[str, Any] = {
        "keep_ratio": kept_parameters(curves, trial.ranks) / dense,
        "predicted_loss_increase": predicted,
        "refitted": trial.refitted,
    }
    if trial.loss is not None:
        record |= {"loss_increase": trial.loss.mean, "loss_increase_upper": trial.loss.upper}
    if trial.accuracy_drop is not None:
        record |= {"accuracy_drop": trial.accuracy_drop.mean, "accuracy_drop_upper": trial.accuracy_drop.upper}
    if trial.loss is not None:
        record["passes"] = trial.passes(config.loss_margin, config.metric_margin)
    return record


def make_report(
    calibration: Calibration,
    config: LosslessLowRankConfig,
    trial: Trial,
    trials: list[dict[str, Any]],
    epsilon: dict[str, float] | None,
    measured: Measurement,
) -> CompressionReport:
    """Return the report of a compression.

    Args:
        calibration: the calibration.
        config: the choices.
        trial: the chosen trial.
        trials: records of every point visited.
        epsilon: noise bounds of the paper's objectives.
        measured: the compressed model on the evaluation data.

    Returns:
        The report.
    """
    statistics, before = calibration.statistics, calibration.dense_evaluation
    return CompressionReport(
        model=type(calibration.model).__name__,
        config={f.name: getattr(config, f.name) for f in fields(CompressionOptions)},
        layers={
            name: _layer_report(module, calibration.curves[name], trial.ranks[name], trial.layers.get(name))
            for name, module in calibration.targets.items()
        },
        skipped=calibration.selection.skipped,
        refitted=trial.refitted,
        trials=trials,
        dense=Measurement(before.loss, before.accuracy, calibration.dense_parameters),
        compressed=measured,
        calibration={
            "examples": statistics.examples,
            "units": statistics.units,
            "loss": statistics.loss,
            "fingerprint": statistics.data_fingerprint,
        },
        evaluation={"examples": before.examples, "units": before.units},
        model_fingerprint=calibration.model_fingerprint,
        epsilon=epsilon,
        versions=_versions(),
        seconds=dict(calibration.seconds),
    )


def _layer_report(module: nn.Module, curve: LossCurve, rank: int | None, layer: Any) -> LayerReport:
    return LayerReport(
        layer_type=type(module).__name__,
        out_features=curve.out_features,
        in_features=curve.in_features,
        rank=rank,
        storage=None if layer is None else layer.storage,
        dense_parameters=curve.dense_parameters,
        parameters=curve.parameters(rank),
        first_order=0.0 if rank is None else float(curve.first_order[rank]),
        second_order=0.0 if rank is None else float(curve.second_order[rank]),
    )


def _versions() -> dict[str, str]:
    packages = ("hf-lossless-lr", "torch", "transformers", "accelerate", "safetensors", "numpy", "scipy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
