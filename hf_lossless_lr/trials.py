"""A trial: one choice of ranks, built, refitted and measured on the selection split; the model stays dense."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from .calibration import Calibration
from .config import LosslessLowRankConfig
from .curves import choose_storage
from .layouts import layout_of
from .rank_selection import Ranks
from .refit import RefitTarget, refit, refit_groups
from .replacement import in_place
from .timing import timed
from .verification import PairedDifference, evaluate, mean_divergence, paired_differences


@dataclass(frozen=True)
class Trial:
    """One point of the path, built and measured.

    Attributes:
        ranks: rank of each target.
        layers: the factorized layers, by name.
        refitted: whether their factors were refitted to the shifted inputs.
        loss: loss increase over dense on the selection split, or None without one.
        accuracy_drop: drop of the accuracy on the selection split, or None where there is no accuracy.
    """

    ranks: Ranks
    layers: dict[str, Any]
    refitted: bool
    loss: PairedDifference | None
    accuracy_drop: PairedDifference | None

    @property
    def increase(self) -> float:
        """Measured loss increase on the selection split, in nats."""
        return self.loss.mean if self.loss is not None else 0.0

    def passes(self, loss_margin: float, metric_margin: float) -> bool:
        """Return whether the trial is not inferior: both upper confidence bounds are inside the margins."""
        if self.loss is None or self.loss.upper > loss_margin:
            return False
        return self.accuracy_drop is None or self.accuracy_drop.upper <= metric_margin


def build_layers(calibration: Calibration, ranks: Mapping[str, int | None], storage: str) -> dict[str, Any]:
    """Return factorized layers with the factors of the given ranks; layers without a rank are left out."""
    layers: dict[str, Any] = {}
    for name, rank in ranks.items():
        if rank is None:
            continue
        module: Any = calibration.targets[name]
        curve = calibration.curves[name]
        stored = choose_storage(curve.out_features, curve.in_features, rank, storage)
        layer = layout_of(module).factorized(module, rank, stored)
        factors = calibration.factorizations[name].truncate(rank, stored, layer.pivots_inputs)
        layer.load_factors(*factors, module.bias)
        layers[name] = layer
    return layers


def run_trial(calibration: Calibration, ranks: Ranks, config: LosslessLowRankConfig) -> Trial:
    """Build a choice of ranks, refit it, and keep the refit only if it brings predictions closer to the dense model's.

    Args:
        calibration: the calibration of a model, which is dense.
        ranks: the choice.
        config: storage, refit, damping, confidence.

    Returns:
        The trial.
    """
    model, data, seconds = calibration.model, calibration.data, calibration.seconds
    with timed(seconds, "replacement"):
        layers = build_layers(calibration, ranks, config.storage)
    refitted = False
    if config.refit and layers:
        states = {name: deepcopy(layer.state_dict()) for name, layer in layers.items()}
        plain = _distance(calibration, layers)
        _refit(calibration, layers, config.damping)
        refitted = _distance(calibration, layers) < plain
        if not refitted:
            for name, state in states.items():
                layers[name].load_state_dict(state)
    if data.selection is None or calibration.dense_selection is None:
        return Trial(dict(ranks), layers, refitted, None, None)
    with timed(seconds, "selection"), in_place(model, layers):
        measured = evaluate(model, data.selection, calibration.accelerator, None)
    loss, drop = paired_differences(calibration.dense_selection, measured, config.confidence)
    return Trial(dict(ranks), layers, refitted, loss, drop)


def _refit(calibration: Calibration, layers: Mapping[str, Any], damping: float) -> None:
    covariances = {name: calibration.statistics.layers[name].grad_covariance for name in layers}
    targets = {
        name: RefitTarget(calibration.targets[name], layer, covariances[name]) for name, layer in layers.items()
    }
    groups = refit_groups(calibration.statistics, targets)
    with timed(calibration.seconds, "refit"):
        data, accelerator = calibration.data.calibration, calibration.accelerator
        refit(calibration.model, targets, groups, data, accelerator, damping)


def _distance(calibration: Calibration, layers: Mapping[str, nn.Module]) -> float:
    """Return how far predictions on the selection split (or else the calibration data) are from the dense model's.

    The KL divergence where the head classifies, else the loss.
    """
    model, accelerator = calibration.model, calibration.accelerator
    loader = calibration.data.selection or calibration.data.calibration
    with timed(calibration.seconds, "selection"):
        divergence = mean_divergence(model, layers, loader, accelerator)
        if divergence is not None:
            return divergence
        with in_place(model, layers):
            return evaluate(model, loader, accelerator, None).loss
