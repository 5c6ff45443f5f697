"""Calibration: everything about a model and its data that is computed once and serves every compression ratio."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..data import DataSplits, forward_loss, model_inputs, subset
from ..errors import CheckpointError, ConfigurationError, TargetError
from ..factors import Forms, LossCurve
from ..fingerprint import architecture_fingerprint, content_digest, tensors_fingerprint
from ..layers import (
    Targets,
    Unfused,
    checkpoint_bytes,
    evaluating,
    in_place,
    on_device,
    projections,
)
from ..processes import make_accelerator
from ..ranks import OBJECTIVES
from ..report import MemoryPlan, SkippedWeight
from ..statistics import (
    CalibrationStatistics,
    Residual,
    Shelf,
    collect_in_windows,
    collect_statistics,
    data_fingerprint,
    load_statistics,
    save_statistics,
    with_pooled,
)
from ..timing import Clock
from ..verdict import MAX_KEPT_BYTES, KeptAnswers
from ..versions import __version__
from .agreeing import check_same_inputs
from .factoring import factorize_targets
from .heads import layers_behind
from .memory import memory_limit, plan_memory
from .narrowing import called, heard, replaceable, skipped_weights
from .residual_stream import residual_stream
from .value_pairs import ValuePair, value_pairs
from .workspace import Workspace

logger = logging.get_logger(__name__)

PLAN = "plan"  # key of it in a work folder


@dataclass(frozen=True)
class Dense:
    """The dense model, which is dense again between two compressions.

    Attributes:
        model: the model.
        fingerprint: SHA-256 of its state dict.
        parameters: number of its parameters.
        bytes: bytes of its checkpoint.
        answers: its answers to the data that compressions are chosen by, as far as they were asked for and fit.
        unfused: what takes the place of its fused modules while it is calibrated and compressed.
    """

    model: PreTrainedModel
    fingerprint: str
    parameters: int
    bytes: int
    answers: KeptAnswers
    unfused: Mapping[str, Unfused]


@dataclass(frozen=True)
class Factors:
    """What every choice of ranks is made from.

    Attributes:
        targets: which layers are factorized, and why others are not.
        skipped: the same about every other weight, with its size.
        factorizations: nested factors of each target, by form.
        curves: predicted loss of each target.
    """

    targets: Targets
    skipped: dict[str, SkippedWeight]
    factorizations: Mapping[str, Forms]
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
        memory: what was planned to be held in memory, and what on disk.
        residuals: what the outputs of targets are added to, where a refit makes up for its error.
        heads: dense layers behind all targets, which a refit fits, too.
        pairs: of each layer that may have fewer dimensions together with another one.
        workspace: the folder of what is on disk, if anything is.
    """

    dense: Dense
    parts: DataSplits
    statistics: CalibrationStatistics
    factors: Factors
    accelerator: Accelerator
    seconds: Mapping[str, float]
    memory: MemoryPlan
    residuals: Mapping[str, Residual]
    heads: Mapping[str, nn.Module]
    pairs: Mapping[str, ValuePair]
    workspace: Workspace | None = None

    def close(self) -> None:
        """Let go of the folder."""
        if self.workspace is not None:
            self.workspace.close()

    def first_batch(self) -> dict[str, Any]:
        """Return the first calibration batch, on the accelerator's device: what sizes and times are those of."""
        batch = model_inputs(next(iter(self.parts.calibration)))
        return dict(send_to_device(batch, self.accelerator.device))


def calibrate(
    model: PreTrainedModel,
    config: LosslessLowRankConfig,
    parts: DataSplits,
    targets: Targets,
    statistics_path: str | os.PathLike[str] | None = None,
    max_memory: int | str | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    unfused: Mapping[str, Unfused] = MappingProxyType({}),
) -> Calibration:
    """Collect statistics and factorize every target.

    Args:
        model: the dense model; left as it was.
        config: the choices.
        parts: the loaders.
        targets: the layers to factorize.
        statistics_path: file of statistics: read if it exists, else written.
        max_memory: bytes that a process may have; None for what is free, less a margin.
        work_dir: folder that keeps finished stages and layers, to go on after an interruption; None for none.
        unfused: what takes the place of fused modules meanwhile, by name.

    Returns:
        The calibration.

    Raises:
        CheckpointError: if the statistics file belongs to another model or to other data.
        ConfigurationError: if a layer does not fit into the memory, the folder cannot be used, or processes differ.
        NumericalError: if a loss, a gradient or a decomposition is not finite.
    """
    if statistics_path is not None and not Path(statistics_path).absolute().parent.is_dir():
        raise ConfigurationError(f"statistics_path: there is no folder {Path(statistics_path).parent}.")
    accelerator = make_accelerator()
    check_same_inputs({"data": parts.fingerprints, "configuration": config.to_dict()})
    limit, clock = memory_limit(max_memory, accelerator.device), Clock()
    fingerprint = tensors_fingerprint(model.state_dict())
    parameters, stored = model.num_parameters(), checkpoint_bytes(model)
    with in_place(model, unfused), on_device(model, accelerator.device), ExitStack() as undo:
        _try_first(model, [parts.held_out, parts.selection], accelerator)
        targets = replaceable(model, config, parts, targets, accelerator)
        kept = work_dir is not None
        memory, windows = plan_memory(
            model, targets.chosen, parts, accelerator, limit, bool(config.refit), kept, statistics_path is not None
        )
        on_cpu = accelerator.device.type == "cpu"  # where the dense model's answers are kept, too
        room = max(0, memory.limit - memory.expected) if on_cpu else MAX_KEPT_BYTES
        dense = Dense(model, fingerprint, parameters, stored, KeptAnswers(min(MAX_KEPT_BYTES, room)), unfused)
        workspace = None
        if memory.disk or not memory.fits:
            (logger.info if memory.fits or not accelerator.is_main_process else logger.warning)(memory.sentence)
        if memory.disk:
            _check_on_disk(config, kept, statistics_path)
            inputs = _inputs(dense, config, parts, targets, accelerator)
            workspace = Workspace(None if work_dir is None else Path(work_dir), accelerator, inputs)
            undo.callback(workspace.close)
            memory = _as_planned_before(memory, workspace.shelf, accelerator, [config.refit, parts.fingerprints])
        shelf = None if workspace is None else workspace.shelf
        with clock.timed("statistics"):
            if shelf is not None:
                loader = parts.calibration
                statistics = collect_in_windows(
                    model, targets.chosen, loader, accelerator, windows, shelf, memory.recomputes
                )
            else:
                with_gradients = OBJECTIVES[config.objective].needs_noise
                statistics = _statistics(dense, targets, parts, accelerator, statistics_path, with_gradients)
        statistics = with_pooled(statistics, projections(unfused))
        targets = called(targets, statistics)
        with clock.timed("factorization"):
            targets = heard(config, targets, statistics)
            skipped = skipped_weights(model, targets)
            pairs = value_pairs(model, config, targets, statistics, parts, accelerator)
            found = factorize_targets(config, targets, statistics, accelerator, shelf, pairs)
            factors = Factors(targets, skipped, *found)
        residuals = residual_stream(model, targets, statistics, parts, accelerator) if config.refit else {}
        heads = layers_behind(model, targets, parts, accelerator) if config.refit else {}
        undo.pop_all()
    return Calibration(
        dense, parts, statistics, factors, accelerator, clock.seconds, memory, residuals, heads, pairs, workspace
    )


def _as_planned_before(memory: MemoryPlan, shelf: Shelf, accelerator: Accelerator, refit: Any) -> MemoryPlan:
    """Return the plan, with the batches that such a refit took in an earlier run in the folder: the same results."""
    plan = f"{PLAN} {content_digest(refit)}"
    if plan in shelf:
        taken = shelf.get(plan)[1]["refit_batches"]
        return replace(memory, refit_batches=None if taken is None else (taken[0], taken[1]))
    if accelerator.is_main_process:
        shelf.put(plan, {}, {"refit_batches": memory.refit_batches})
    return memory


def _check_on_disk(config: LosslessLowRankConfig, kept: bool, statistics_path: Any) -> None:
    """Refuse what needs all statistics in memory, or the gradients of the weights."""
    why = "work_dir keeps them on disk" if kept else "max_memory is too little to hold them in memory"
    if OBJECTIVES[config.objective].needs_noise:
        raise ConfigurationError(f"objective={config.objective!r} needs all statistics in memory, and {why}.")
    if statistics_path is not None:
        raise ConfigurationError(f"statistics_path: one file of all statistics cannot be written or read, for {why}.")


def _inputs(
    dense: Dense, config: LosslessLowRankConfig, parts: DataSplits, targets: Targets, accelerator: Accelerator
) -> dict[str, Any]:
    """Return what statistics and factors depend on."""
    options = ("metric", "damping", "storage", "size", "formats", "rank_multiple", "objective", "forms")
    return {
        "package": __version__,
        "model": dense.fingerprint,
        "configuration of the model": architecture_fingerprint(dense.model),
        "data": data_fingerprint(parts.calibration, accelerator),
        "layers": sorted(targets.chosen),
        **{name: getattr(config, name) for name in options},
    }


def check_unchanged(calibration: Calibration) -> None:
    """Refuse a model that is no longer the one that was calibrated.

    Args:
        calibration: its calibration.

    Raises:
        TargetError: if a layer or a weight is another one.
    """
    model = calibration.dense.model
    with in_place(model, calibration.dense.unfused):
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


def _try_first(model: PreTrainedModel, loaders: Iterable[DataLoader | None], accelerator: Accelerator) -> None:
    """Run the first item of each loader, so that what is wrong shows now; it need not be labelled."""
    with evaluating(model), torch.no_grad():
        for loader in loaders:
            for batch in accelerator.prepare(subset(loader, [0])) if loader is not None else ():
                forward_loss(model, batch, 0)


def _statistics(
    dense: Dense,
    targets: Targets,
    parts: DataSplits,
    accelerator: Accelerator,
    path: str | os.PathLike[str] | None,
    weight_grads: bool,
) -> CalibrationStatistics:
    whole = content_digest([dense.fingerprint, architecture_fingerprint(dense.model)])
    there = broadcast_object_list([path is not None and Path(path).exists()])  # for the main process writes it
    if path is not None and there[0]:
        statistics = load_statistics(path, whole, accelerator.device)
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
        save_statistics(statistics, path, whole)
    accelerator.wait_for_everyone()
    return statistics
