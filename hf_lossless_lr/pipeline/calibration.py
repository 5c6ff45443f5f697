"""Calibration: everything about a model and its data that is computed once and serves every compression ratio."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..data import DataSplits, forward_loss, subset
from ..errors import CheckpointError, NumericalError
from ..factors import Factorization, LossCurve, factorize, loss_curve
from ..fingerprint import tensors_fingerprint
from ..layers import Targets, evaluating, on_device, weight_matrix
from ..ranks import OBJECTIVES, Budget
from ..statistics import CalibrationStatistics, collect_statistics, data_fingerprint, load_statistics, save_statistics
from ..timing import timed


@dataclass(frozen=True)
class Calibration:
    """A dense model with its statistics, factorizations and curves.

    Attributes:
        model: the model; its targets are in `selection`.
        selection: which layers are targeted, and why others are not.
        data: the loaders.
        accelerator: the processes and the device.
        statistics: calibration statistics.
        factorizations: nested factors of each target.
        curves: predicted loss of each target.
        dense_parameters: parameters of the dense model.
        model_fingerprint: SHA-256 of the dense model's state dict.
        seconds: time of each stage.
        budgets: what each kind of budget counts, as far as it was asked for: a latency is measured once.
    """

    model: PreTrainedModel
    selection: Targets
    data: DataSplits
    accelerator: Accelerator
    statistics: CalibrationStatistics
    factorizations: dict[str, Factorization]
    curves: dict[str, LossCurve]
    dense_parameters: int
    model_fingerprint: str
    seconds: dict[str, float]
    budgets: dict[tuple[str, str, int], Budget] = field(default_factory=dict)

    @property
    def targets(self) -> dict[str, nn.Module]:
        """The dense layers to factorize, by name."""
        return self.selection.targets


def calibrate(
    model: PreTrainedModel,
    config: LosslessLowRankConfig,
    data: DataSplits,
    selection: Targets,
    statistics_path: str | os.PathLike[str] | None = None,
) -> Calibration:
    """Collect statistics and factorize every target.

    Args:
        model: the dense model; left as it was.
        config: the choices.
        data: the loaders.
        selection: the targets.
        statistics_path: file of statistics: read if it exists, else written.

    Returns:
        The calibration.

    Raises:
        CheckpointError: if the statistics file belongs to another model or to other data.
        NumericalError: if a loss, a gradient or a decomposition is not finite.
    """
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
    seconds: dict[str, float] = {}
    with on_device(model, accelerator.device):
        fingerprint = tensors_fingerprint(model.state_dict())
        for loader in (data.held_out, data.selection):  # what is wrong with them shows now, not after the work
            if loader is not None:
                _try_first(model, loader, accelerator)
        with timed(seconds, "statistics"):
            statistics = _statistics(model, selection, data, accelerator, fingerprint, statistics_path)
        with timed(seconds, "factorization"):
            factorizations, curves = _factorize(config, selection.targets, statistics)
    return Calibration(
        model=model,
        selection=selection,
        data=data,
        accelerator=accelerator,
        statistics=statistics,
        factorizations=factorizations,
        curves=curves,
        dense_parameters=model.num_parameters(),
        model_fingerprint=fingerprint,
        seconds=seconds,
    )


def _try_first(model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator) -> None:
    """Run the first item; it need not be labelled."""
    with evaluating(model), torch.no_grad():
        for batch in accelerator.prepare(subset(loader, [0])):
            forward_loss(model, batch, 0)


def _statistics(
    model: PreTrainedModel,
    selection: Targets,
    data: DataSplits,
    accelerator: Accelerator,
    fingerprint: str,
    path: str | os.PathLike[str] | None,
) -> CalibrationStatistics:
    if path is not None and Path(path).exists():
        statistics = load_statistics(path, fingerprint, accelerator.device)
        if statistics.data_fingerprint != data_fingerprint(data.calibration, accelerator):
            raise CheckpointError(f"{path}: these statistics belong to other calibration data. Calibrate again.")
        missing = [name for name in selection.targets if name not in statistics.layers]
        if missing:
            raise CheckpointError(f"{path}: these statistics do not cover {missing[0]!r}. Calibrate again.")
        return statistics
    statistics = collect_statistics(model, selection.targets, data.calibration, accelerator)
    if path is not None and accelerator.is_main_process:
        save_statistics(statistics, path, fingerprint)
    return statistics


def _factorize(
    config: LosslessLowRankConfig, targets: Mapping[str, nn.Module], statistics: CalibrationStatistics
) -> tuple[dict[str, Factorization], dict[str, LossCurve]]:
    factorizations, curves = {}, {}
    with_noise = OBJECTIVES[config.objective].needs_noise
    for name, module in logging.tqdm(targets.items(), desc="Factorizing"):
        weight, stats = weight_matrix(module), statistics.layers[name]
        try:
            factorizations[name] = factorize(weight, stats, str(config.metric), config.damping)
        except NumericalError as error:
            raise NumericalError(f"{name!r}: {error}") from error
        curves[name] = loss_curve(weight, factorizations[name], stats, config.storage, with_noise)
    return factorizations, curves
