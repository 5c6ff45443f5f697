"""A trial: one choice, built, refitted and measured on the selection split; the model stays dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..checkpoint import FEWEST_JUDGES, LosslessLowRankConfig
from ..data import dataset_size, subset
from ..errors import DataError
from ..factors import (
    RefitTarget,
    RefittedLayers,
    batch_norms,
    refit,
    refit_groups,
    shifted_batch_norms,
)
from ..fingerprint import content_digest
from ..layers import copied, grids_in, restore_grids
from ..ranks import Choice, Choices
from ..report import Difference
from ..statistics import LayerStatistics
from ..timing import Clock
from ..verdict import (
    KeptAnswers,
    PairedOutcomes,
    accuracy_difference,
    loss_difference,
    mean_upper_bound,
    paired_outcomes,
)
from .building import build_layers, narrow_layer
from .calibration import Calibration

logger = logging.get_logger(__name__)

FEWEST_FITTED = 256  # examples that may judge the refit that was fitted to them, where there is no selection split
FOLDS = 4  # of the cross-validation where there are fewer


@dataclass(frozen=True)
class Trial:
    """One point of the path, built and measured.

    Attributes:
        choices: what each target becomes.
        layers: the factorized and the rounded layers, by name.
        refitted: whether their factors were refitted to the shifted inputs.
        loss: loss increase over dense on the selection split, or None without one.
        accuracy_drop: drop of the accuracy on the selection split, or None where there is no accuracy.
    """

    choices: Choices
    layers: dict[str, Any]
    refitted: bool
    loss: Difference | None
    accuracy_drop: Difference | None

    @property
    def increase(self) -> float:
        """Measured loss increase on the selection split, in nats."""
        return self.loss.mean if self.loss is not None else 0.0

    def passes(self, loss_margin: float, accuracy_margin: float) -> bool:
        """Return whether the trial is not inferior: both upper confidence bounds are inside the margins."""
        if self.loss is None or self.loss.upper > loss_margin:
            return False
        return self.accuracy_drop is None or self.accuracy_drop.upper <= accuracy_margin


def run_trial(calibration: Calibration, choices: Choices, config: LosslessLowRankConfig, clock: Clock) -> Trial:
    """Build a choice, refit it, and shift its batch normalizations; keep what brings predictions closer to the dense.

    That is judged on the selection split. Where this has fewer than `FEWEST_JUDGES` examples, a refit is made only if
    cross-validation over the calibration data shows that it helps.

    Args:
        calibration: the calibration of a model, which is dense.
        choices: the choice.
        config: embeddings, refit, damping, confidence.
        clock: the times of the stages are added here.

    Returns:
        The trial.
    """
    with clock.timed("replacement"):
        layers = build_layers(calibration, choices, config)
    measured, refitted = None, False
    if calibration.parts.selection is not None or (config.refit and layers):
        measured = _outcomes(calibration, layers, clock)
    if config.refit and layers and measured is not None:
        fitted = _with_heads(calibration, layers)
        plain = {name: (deepcopy(layer.state_dict()), grids_in(layer)) for name, layer in fitted.items()}
        enough = _enough_to_judge(calibration, measured)
        if enough or _helps_unseen_examples(calibration, choices, fitted, plain, config, clock):
            kept = _kept(calibration, choices, config)
            left = _refit(calibration, choices, fitted, calibration.parts.calibration, config, clock, kept)
            after = _outcomes(calibration, fitted, clock)
            refitted = not enough or _distance(after) < _distance(measured)
            if refitted:
                layers, measured = fitted, after
                _say_which_are_left(left)
            else:
                _load(layers, plain)
        if enough and not refitted and batch_norms(calibration.dense.model):
            norms = _shifted_norms(calibration, layers, clock)
            after = _outcomes(calibration, {**layers, **norms}, clock)
            if _clearly_closer(measured, after, config.confidence):
                layers, measured = {**layers, **norms}, after
    if calibration.parts.selection is None or measured is None:
        return Trial(dict(choices), layers, refitted, None, None)
    loss = loss_difference(measured.loss_increase, measured.units, config.confidence, bootstrap=False)
    drop = accuracy_difference(measured, config.confidence, bootstrap=False)
    return Trial(dict(choices), layers, refitted, loss, drop)


def _with_heads(calibration: Calibration, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a refit fits: the layers, and copies of the poolers and task heads behind them."""
    return {**layers, **{name: copied(head) for name, head in calibration.heads.items()}}


def _load(layers: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        state, grids = states[name]
        layer.load_state_dict(state)
        restore_grids(layer, grids)


def _enough_to_judge(calibration: Calibration, measured: PairedOutcomes) -> bool:
    """Return whether a refit is judged on enough data: the selection split or, without one, what it is fitted to."""
    return measured.examples >= (FEWEST_FITTED if calibration.parts.selection is None else FEWEST_JUDGES)


def _helps_unseen_examples(
    calibration: Calibration,
    choices: Choices,
    layers: Mapping[str, Any],
    plain: Mapping[str, Any],
    config: LosslessLowRankConfig,
    clock: Clock,
) -> bool:
    """Return whether refits on parts of the calibration data bring predictions on the rest closer to the dense ones.

    Each example is judged once, by a refit that did not see it; the mean gain must be above 0 with the configured
    confidence. The layers, whose states are `plain`, are left as they were.
    """
    loader, dense, accelerator = calibration.parts.calibration, calibration.dense.model, calibration.accelerator
    size = dataset_size(loader)
    folds = min(FOLDS, size)
    if folds < 2:
        logger.warning("the factors are not refitted: one item of calibration data cannot show whether that helps.")
        return False
    worse, units = [], []
    for fold in range(folds):
        unseen, answers = subset(loader, range(fold, size, folds)), KeptAnswers()
        seen = subset(loader, [item for item in range(size) if item % folds != fold])
        try:
            before = paired_outcomes(dense, layers, unseen, accelerator, dense_answers=answers)
        except DataError:  # nothing in it is labelled
            continue
        _refit(calibration, choices, layers, seen, config, clock)
        after = paired_outcomes(dense, layers, unseen, accelerator, dense_answers=answers)
        _load(layers, plain)
        worse.append(_distances(after) - _distances(before))
        units.append(before.units)
    bound = 0.0
    if sum(map(len, units)) > 1:
        bound = mean_upper_bound(np.concatenate(worse), np.concatenate(units), config.confidence)
    if bound >= 0:
        logger.warning(
            "the factors are not refitted: %d examples of calibration data do not show that it helps. More would.",
            calibration.statistics.examples,
        )
    return bound < 0


def _refit(
    calibration: Calibration,
    choices: Choices,
    layers: Mapping[str, Any],
    data: DataLoader,
    config: LosslessLowRankConfig,
    clock: Clock,
    kept: RefittedLayers | None = None,
) -> list[str]:
    """Refit the layers, and return which were left as they are."""
    targets = {
        name: _refit_target(calibration, name, layer, choices[name], config)
        for name, layer in layers.items()
        if name in choices
    }
    heads = {name: head for name, head in calibration.heads.items() if name in layers}
    others = {name: layer for name, layer in layers.items() if name not in {**choices, **heads}}
    groups = refit_groups(calibration.statistics, targets) + [(name,) for name in heads]
    targets |= {name: RefitTarget(head, layers[name], lambda: None) for name, head in heads.items()}
    loaders, accelerator = _fitted_to(calibration, data), calibration.accelerator
    most, _ = calibration.memory.refit_batches or (None, None)
    with clock.timed("refit"):
        return refit(
            calibration.dense.model,
            targets,
            groups,
            loaders,
            accelerator,
            config.damping,
            clock,
            others=others,
            kept=kept,
            most=most,
            residuals=calibration.residuals,
        )


def _refit_target(
    calibration: Calibration, name: str, layer: Any, choice: Choice, config: LosslessLowRankConfig
) -> RefitTarget:
    dense, statistics = calibration.factors.targets.chosen[name], calibration.statistics
    narrow = narrow_layer(calibration, name, choice, config.damping)
    if narrow is None:
        return RefitTarget(dense, layer, partial(_moments, statistics.layers, name, config), choice.format)
    moments = partial(_moments, {name: narrow.statistics}, name, config)
    return RefitTarget(dense, layer, moments, choice.format, narrow)


def _say_which_are_left(left: Sequence[str]) -> None:
    if left:
        logger.warning_once(
            f"{len(left)} of the layers keep their closed-form factors, because they are called several times in a "
            "forward pass or do not get the same rows in the compressed model (an expert: enough of them): "
            f"{', '.join(left[:5])}{', …' * (len(left) > 5)}"
        )


def _kept(calibration: Calibration, choices: Choices, config: LosslessLowRankConfig) -> RefittedLayers | None:
    """Return where the layers of the refit of a choice are kept, if there is a folder that stays."""
    workspace = calibration.workspace
    if workspace is None or not workspace.stays:
        return None
    chosen = {name: list(choice) for name, choice in choices.items()}
    data = calibration.parts.fingerprints.get("refit"), calibration.memory.refit_batches
    digest = content_digest([chosen, config.embeddings, *data])
    calibration.accelerator.wait_for_everyone()  # to see the same on each process
    return RefittedLayers(workspace.shelf, digest, [*choices, *calibration.heads])


def _fitted_to(calibration: Calibration, data: DataLoader) -> list[DataLoader]:
    """Return the data that a compressed model is fitted to: the given ones, and those for the refit alone."""
    return [data] if calibration.parts.refit is None else [data, calibration.parts.refit]


def _shifted_norms(calibration: Calibration, layers: Mapping[str, Any], clock: Clock) -> dict[str, nn.Module]:
    loaders = _fitted_to(calibration, calibration.parts.calibration)
    with clock.timed("batch_norms"):
        most, _ = calibration.memory.refit_batches or (None, None)
        return shifted_batch_norms(calibration.dense.model, layers, loaders, calibration.accelerator, most)


def _moments(layers: Mapping[str, LayerStatistics], name: str, config: LosslessLowRankConfig) -> torch.Tensor | None:
    """Return B of a layer; None where the metric has none."""
    return layers[name].grad_covariance if config.metric == "kronecker" else None


def _outcomes(calibration: Calibration, layers: Mapping[str, nn.Module], clock: Clock) -> PairedOutcomes:
    """Compare with the dense model on the selection split, or else on the calibration data."""
    dense, loader = calibration.dense, calibration.parts.selection or calibration.parts.calibration
    with clock.timed("selection"):
        return paired_outcomes(dense.model, layers, loader, calibration.accelerator, dense_answers=dense.answers)


def _distances(outcomes: PairedOutcomes) -> np.ndarray:
    """Return the summed distance of each cluster from the dense model's predictions.

    It is the root of the KL divergence, or the loss where there is none. The divergence is much less noisy than a
    difference of losses, for the labels play no part; of its root, a few outliers do not make up the most.
    """
    if outcomes.divergence is None or outcomes.cluster_of_unit is None:
        return np.asarray(outcomes.loss[1])
    roots = np.sqrt(np.maximum(outcomes.divergence, 0.0))
    return np.bincount(outcomes.cluster_of_unit, roots, minlength=outcomes.clusters)


def _clearly_closer(before: PairedOutcomes, after: PairedOutcomes, confidence: float) -> bool:
    """Return whether predictions are closer beyond doubt, and the loss is no higher: a shift may make them bolder."""
    bound = mean_upper_bound(_distances(after) - _distances(before), before.units, confidence)
    return bound < 0 and after.mean_loss[1] <= before.mean_loss[1]


def _distance(outcomes: PairedOutcomes) -> float:
    """Return how far the predictions are from the dense model's, in the mean over units."""
    return float(_distances(outcomes).sum() / outcomes.units.sum())
