"""From an objective to a trial: ranks and number formats by arithmetic, or by measuring points of the path."""

from __future__ import annotations

from collections.abc import Callable

from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..layers import matching
from ..ranks import (
    OBJECTIVES,
    Budget,
    Choice,
    Choices,
    Limits,
    Search,
    compression_path,
    find_epsilon,
    second_order_cost,
)
from ..report import TrialRecord
from ..timing import Clock
from .calibration import Calibration
from .narrowing import unheard
from .summary import visited_point
from .trial import Trial, run_trial

logger = logging.get_logger(__name__)


def choose(
    calibration: Calibration, config: LosslessLowRankConfig, budget: Budget, clock: Clock, given: bool = False
) -> tuple[Trial, list[TrialRecord], dict[str, float] | None]:
    """Choose what each target becomes, and build it.

    Args:
        calibration: the calibration of a model, which is dense.
        config: the objective and its limits.
        budget: what the size counts.
        clock: the times of the stages are added here.
        given: whether the model was calibrated for ranks that are given, which may be of any layer.

    Returns:
        The chosen trial, a record of every point visited, and the noise bounds of the paper's objectives.

    Raises:
        ConfigurationError: if the size cannot be reached.
    """
    visited: list[TrialRecord] = []

    def visit(choices: Choices) -> Trial:
        trial = run_trial(calibration, choices, config, clock)
        visited.append(visited_point(curves, trial, config))
        return trial

    curves, objective = calibration.factors.curves, OBJECTIVES[config.objective]
    if objective.search is not None:
        return _search(calibration, config, objective.search, budget, visit), visited, None
    epsilon = _epsilon(calibration, config) if objective.needs_noise else None
    ranks = matching(config.given_ranks, calibration.factors.targets.chosen)  # others stay dense, which was said
    limits = Limits(float(config.keep_ratio or 1), config.rank_multiple or 1, budget, epsilon or {}, ranks)
    silent = unheard(calibration.factors.targets, calibration.statistics) if given and objective.sized else {}
    heard = {name: curve for name, curve in curves.items() if name not in silent}
    choices = objective.select(heard, limits) if objective.select is not None else {}
    choices |= dict.fromkeys(silent, Choice())
    if all(choice == Choice() for choice in choices.values()):
        logger.warning("no rank meets objective=%r in any layer; the targeted layers stay dense.", config.objective)
    return visit(choices), visited, epsilon


def _search(
    calibration: Calibration,
    config: LosslessLowRankConfig,
    search: Search,
    budget: Budget,
    visit: Callable[[Choices], Trial],
) -> Trial:
    """Walk the path and measure; a margin that no point meets leaves the model dense."""
    path = compression_path(calibration.factors.curves, second_order_cost, config.rank_multiple or 1, *budget)
    points = range(len(path) + 1)
    dense = all(choice == Choice() for choice in path.start.values())
    before = 0 if dense else 1  # the dense model, which a path without float does not start from
    found = search(
        [0.0] * before + [path.predicted_cost_after(count) for count in points],
        [max(1.0, path.kept_after(0))] * before + [path.kept_after(count) for count in points],
        lambda point: visit(path.choices_after(point - before)),
        lambda trial: trial.passes(config.loss_margin, config.accuracy_margin),
        config.loss_margin,
    )
    if dense and not path.steps:
        logger.warning("no rank meets objective=%r in any layer; the targeted layers stay dense.", config.objective)
    elif found is None:
        logger.warning(
            "no compressed model met loss_margin=%s and accuracy_margin=%s on the selection split; the targeted "
            "layers stay dense. Raise the margins, or give more calibration data.",
            config.loss_margin,
            config.accuracy_margin,
        )
    if found is None:
        return Trial(dict.fromkeys(path.start, Choice()), {}, False, None, None)
    return found[1]


def _epsilon(calibration: Calibration, config: LosslessLowRankConfig) -> dict[str, float]:
    """Return the noise bound of each layer for the paper's objectives."""
    if config.epsilon is not None:
        return dict.fromkeys(calibration.factors.targets.chosen, config.epsilon)
    return find_epsilon(
        calibration.dense.model,
        calibration.factors.targets.chosen,
        calibration.factors.factorizations,
        calibration.parts.calibration,
        calibration.accelerator,
        config.epsilon_tolerance,
    )
