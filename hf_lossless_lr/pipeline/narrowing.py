"""Which of the chosen layers are factorized after all: what the data reach, and say something about."""

from __future__ import annotations

from collections import Counter

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..data import DataSplits, answering_layers, run_batch, subset
from ..errors import NumericalError, TargetError
from ..factors import silent_layers
from ..layers import Targets, evaluating, find_targets, other_weights, weight_matrices, weights_read
from ..report import SkippedWeight
from ..statistics import CalibrationStatistics

logger = logging.get_logger(__name__)


def replaceable(
    model: PreTrainedModel,
    config: LosslessLowRankConfig,
    parts: DataSplits,
    targets: Targets,
    accelerator: Accelerator,
) -> Targets:
    """Leave the layers dense whose weight is read, and, unless asked for, those whose output is the model's answer."""
    heads, read = list[str](), list[str]()
    for batch in accelerator.prepare(subset(parts.calibration, [0])):  # one process has it
        heads = answering_layers(model, targets.chosen, batch)
        with evaluating(model), torch.no_grad(), weights_read(targets.chosen) as found:
            run_batch(model, batch, quick=False)
        read = sorted(found)
    heads, read = (list(dict.fromkeys(gather_object(names))) for names in (heads, read))
    targets = find_targets(model, config.target_modules, config.ignore, heads) if heads else targets
    skipped = {name: "the model reads its weight instead of calling it" for name in targets.chosen if name in read}
    chosen = {name: module for name, module in targets.chosen.items() if name not in skipped}
    if not chosen:
        name, reason = next(iter(skipped.items()))
        raise TargetError(f"no layer of {type(model).__name__} is left to factorize; skipped: {name} ({reason}).")
    return Targets(chosen, targets.skipped | skipped)


def called(targets: Targets, statistics: CalibrationStatistics) -> Targets:
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


def heard(config: LosslessLowRankConfig, targets: Targets, statistics: CalibrationStatistics) -> Targets:
    """Leave the layers dense whose ranks would be chosen by a cost that the data say nothing about."""
    if config.objective in ("uniform", "ranks") and config.metric not in ("kronecker", "fisher"):
        return targets  # neither the ranks nor the factors depend on a gradient
    silent = unheard(targets, statistics)
    chosen = {name: module for name, module in targets.chosen.items() if name not in silent}
    return Targets(chosen, {**targets.skipped, **silent})


def unheard(targets: Targets, statistics: CalibrationStatistics) -> dict[str, str]:
    """Return the layers that the data say nothing about, with the reasons, and say so.

    Raises:
        NumericalError: if these are all.
    """
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
    return silent


def skipped_weights(model: PreTrainedModel, targets: Targets) -> dict[str, SkippedWeight]:
    """Return what is not targeted, and say so where that is most of the model."""
    others, total = other_weights(model, targets), model.num_parameters()
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
