"""Calibration: everything about a model and its data that is computed once and serves every compression ratio."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object, send_to_device
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..data import DataSplits, answering_layers, forward_loss, subset
from ..errors import CheckpointError, NumericalError, TargetError
from ..factors import Factorization, LossCurve, RoundingCost, factorize, loss_curve, rounding_costs, silent_layers
from ..fingerprint import tensors_fingerprint
from ..formats import FLOAT
from ..layers import (
    Targets,
    checkpoint_bytes,
    evaluating,
    find_targets,
    layout_of,
    on_device,
    other_weights,
    weight_matrices,
)
from ..ranks import OBJECTIVES, default_multiple
from ..report import SkippedWeight
from ..statistics import CalibrationStatistics, collect_statistics, data_fingerprint, load_statistics, save_statistics
from ..timing import Clock
from ..verdict import KeptAnswers

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Dense:
    """The dense model, which is dense again between two compressions.

    Attributes:
        model: the model.
        fingerprint: SHA-256 of its state dict.
        parameters: number of its parameters.
        bytes: bytes of its checkpoint.
        answers: its answers to the data that compressions are chosen by, as far as they were asked for and fit.
    """

    model: PreTrainedModel
    fingerprint: str
    parameters: int
    bytes: int
    answers: KeptAnswers


@dataclass(frozen=True)
class Factors:
    """What every choice of ranks is made from.

    Attributes:
        targets: which layers are factorized, and why others are not.
        skipped: the same about every other weight, with its size.
        factorizations: nested factors of each target.
        curves: predicted loss of each target.
    """

    targets: Targets
    skipped: dict[str, SkippedWeight]
    factorizations: dict[str, Factorization]
    curves: dict[str, LossCurve]


@dataclass(frozen=True)
class Calibration:
    """Everything about a model and its data that serves every compression ratio.

    Attributes:
        dense: the dense model.
        parts: the loaders.
        statistics: calibration statistics.
        factors: what choices are made from.
        accelerator: the processes and the device.
        seconds: time of each stage.
    """

    dense: Dense
    parts: DataSplits
    statistics: CalibrationStatistics
    factors: Factors
    accelerator: Accelerator
    seconds: Mapping[str, float]

    def first_batch(self) -> dict[str, Any]:
        """Return the first calibration batch, on the accelerator's device: what sizes and times are those of."""
        return dict(send_to_device(dict(next(iter(self.parts.calibration))), self.accelerator.device))


def calibrate(
    model: PreTrainedModel,
    config: LosslessLowRankConfig,
    parts: DataSplits,
    targets: Targets,
    statistics_path: str | os.PathLike[str] | None = None,
) -> Calibration:
    """Collect statistics and factorize every target.

    Args:
        model: the dense model; left as it was.
        config: the choices.
        parts: the loaders.
        targets: the layers to factorize.
        statistics_path: file of statistics: read if it exists, else written.

    Returns:
        The calibration.

    Raises:
        CheckpointError: if the statistics file belongs to another model or to other data.
        NumericalError: if a loss, a gradient or a decomposition is not finite.
    """
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
    clock = Clock()
    with on_device(model, accelerator.device):
        fingerprint = tensors_fingerprint(model.state_dict())
        dense = Dense(model, fingerprint, model.num_parameters(), checkpoint_bytes(model), KeptAnswers())
        for loader in (parts.held_out, parts.selection):  # what is wrong with them shows now, not after the work
            if loader is not None:
                _try_first(model, loader, accelerator)
        targets = _without_heads(model, config, parts, targets, accelerator)
        with clock.timed("statistics"):
            with_gradients = OBJECTIVES[config.objective].needs_noise
            statistics = _statistics(dense, targets, parts, accelerator, statistics_path, with_gradients)
        targets = _called(targets, statistics)
        with clock.timed("factorization"):
            factors = _factorize(config, dense, _heard(config, targets, statistics), statistics)
    return Calibration(dense, parts, statistics, factors, accelerator, clock.seconds)


def check_unchanged(calibration: Calibration) -> None:
    """Refuse a model that is no longer the one that was calibrated.

    Args:
        calibration: its calibration.

    Raises:
        TargetError: if a layer or a weight is another one.
    """
    model = calibration.dense.model
    for name, module in calibration.factors.targets.chosen.items():
        if model.get_submodule(name) is not module:
            raise TargetError(
                f"{name!r} is another module than the one that was calibrated. Calibrate the model again."
            )
    if tensors_fingerprint(model.state_dict()) != calibration.dense.fingerprint:
        raise TargetError(
            "the weights of the model changed since it was calibrated (by training or a cast, for example), so its "
            "statistics are about a model that no longer exists. Calibrate it again."
        )


def _try_first(model: PreTrainedModel, loader: DataLoader, accelerator: Accelerator) -> None:
    """Run the first item; it need not be labelled."""
    with evaluating(model), torch.no_grad():
        for batch in accelerator.prepare(subset(loader, [0])):
            forward_loss(model, batch, 0)


def _without_heads(
    model: PreTrainedModel,
    config: LosslessLowRankConfig,
    parts: DataSplits,
    targets: Targets,
    accelerator: Accelerator,
) -> Targets:
    """Leave the layers dense, unless they are asked for, whose output is the model's answer."""
    heads: list[str] = []
    for batch in accelerator.prepare(subset(parts.calibration, [0])):  # one process has it
        heads = answering_layers(model, targets.chosen, batch)
    heads = list(dict.fromkeys(gather_object(heads)))
    return find_targets(model, config.target_modules, config.ignore, heads) if heads else targets


def _statistics(
    dense: Dense,
    targets: Targets,
    parts: DataSplits,
    accelerator: Accelerator,
    path: str | os.PathLike[str] | None,
    weight_grads: bool,
) -> CalibrationStatistics:
    if path is not None and Path(path).exists():
        statistics = load_statistics(path, dense.fingerprint, accelerator.device)
        if statistics.data_fingerprint != data_fingerprint(parts.calibration, accelerator):
            raise CheckpointError(f"{path}: these statistics belong to other calibration data. Calibrate again.")
        missing = [name for name in targets.chosen if name not in (*statistics.layers, *statistics.uncalled)]
        if missing:
            raise CheckpointError(f"{path}: these statistics do not cover {missing[0]!r}. Calibrate again.")
        if weight_grads and any(layer.weight_grad is None for layer in statistics.layers.values()):
            raise CheckpointError(
                f"{path}: these statistics have no gradients of weights, which the paper's objectives use. "
                "Calibrate again."
            )
        return statistics
    statistics = collect_statistics(dense.model, targets.chosen, parts.calibration, accelerator, weight_grads)
    if path is not None and accelerator.is_main_process:
        save_statistics(statistics, path, dense.fingerprint)
    return statistics


def _called(targets: Targets, statistics: CalibrationStatistics) -> Targets:
    """Leave layers dense that the data never reach: nothing is known of what they do."""
    uncalled = [name for name in targets.chosen if name not in statistics.layers]
    if not uncalled:
        return targets
    logger.warning(
        "%d layers were never called in a forward pass over the calibration data and stay dense: %s.",
        len(uncalled),
        ", ".join(uncalled),
    )
    chosen = {name: module for name, module in targets.chosen.items() if name in statistics.layers}
    return Targets(chosen, targets.skipped | dict.fromkeys(uncalled, "never called by the calibration data"))


def _heard(config: LosslessLowRankConfig, targets: Targets, statistics: CalibrationStatistics) -> Targets:
    """Leave the layers dense whose ranks would be chosen by a cost that the data say nothing about."""
    if config.objective == "uniform" and config.metric not in ("kronecker", "fisher"):
        return targets  # neither the ranks nor the factors depend on a gradient
    weights = {name: weight_matrices(module) for name, module in targets.chosen.items()}
    silent = silent_layers(weights, statistics.layers)
    if len(silent) == len(weights):
        raise NumericalError(
            f"no layer can be compressed by what the calibration data show: {next(iter(silent))!r}, for one: "
            f"{next(iter(silent.values()))}. Is the model run without gradients, or is its loss 0 on all examples?"
        )
    if silent:
        names = list(silent)
        logger.warning(
            "%d layers stay dense, because the calibration data say nothing about them: %s%s",
            len(names),
            "; ".join(f"{name} ({silent[name]})" for name in names[:5]),
            "; …" * (len(names) > 5),
        )
    chosen = {name: module for name, module in targets.chosen.items() if name not in silent}
    return Targets(chosen, {**targets.skipped, **silent})


def _skipped(dense: Dense, targets: Targets) -> dict[str, SkippedWeight]:
    """Return what is not targeted, and say so where that is most of the model."""
    others, total = other_weights(dense.model, targets), dense.parameters
    skipped = {name: SkippedWeight(reason, size, size / total) for name, (reason, size) in others.items()}
    inside = sum(weight_matrices(module).numel() for module in targets.chosen.values())
    if inside < sum(size for _, size in others.values()):
        shares: Counter[str] = Counter()
        for reason, size in others.values():
            shares[reason] += size
        logger.warning(
            "the targeted layers, which are all that gets smaller, hold %.0f %% of the model's parameters; the rest "
            "is %s. `report.skipped` lists it.",
            100 * inside / total,
            ", ".join(f"{reason} ({100 * size / total:.0f} %)" for reason, size in shares.most_common(3)),
        )
    return skipped


def _factorize(
    config: LosslessLowRankConfig, dense: Dense, targets: Targets, statistics: CalibrationStatistics
) -> Factors:
    skipped = _skipped(dense, targets)
    factorizations, curves = {}, {}
    with_noise = OBJECTIVES[config.objective].needs_noise
    storage = "fastest" if (config.storage, config.size) == ("auto", "latency") else config.storage
    for name, module in logging.tqdm(targets.chosen.items(), desc="Factorizing"):
        weight, stats = weight_matrices(module), statistics.layers[name]
        try:
            factorizations[name] = factorize(weight, stats, str(config.metric), config.damping)
        except NumericalError as error:
            raise NumericalError(f"{name!r}: {error}") from error
        curve = loss_curve(weight, factorizations[name], stats, storage, with_noise)
        rounded = [number_format for number_format in config.formats or () if number_format != FLOAT]
        costs = rounding_costs(weight, factorizations[name], stats, config.damping, rounded) if rounded else {}
        in_float: dict[str, RoundingCost | None] = {FLOAT: None} if FLOAT in (config.formats or ()) else {}
        pivots_inputs = layout_of(module).pivots_narrow_side and curve.in_features < curve.out_features
        multiple = config.rank_multiple or default_multiple(weight.device.type, min(weight.shape[-2:]))
        choices: dict[str, Any] = {"rank_multiple": multiple, "pivots_inputs": pivots_inputs}
        curves[name] = replace(curve, rounding={**in_float, **costs}, **choices)
    return Factors(targets, skipped, factorizations, curves)
