"""The chosen layers take their places in the model, which from then on saves as a compressed one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

from ..checkpoint import LosslessLowRankConfig, mark_compressed, record_of, unmark_compressed
from ..layers import Replacement, UnfusedExperts, replace_modules
from .calibration import Calibration
from .trial import Trial


def put_in_place(
    calibration: Calibration,
    trial: Trial,
    config: LosslessLowRankConfig,
    unfused: Replacement,
    undo: list[Callable[[], None]],
) -> None:
    """Put the layers of a trial in, and record them in the model's config; experts none of which is chosen are fused.

    Args:
        calibration: the calibration of the model, whose experts are all unfused.
        trial: the trial.
        config: the choices; not changed.
        unfused: how the experts were unfused.
        undo: the ways back are added here.
    """
    model, experts = calibration.dense.model, calibration.dense.experts
    used = {path for path in experts if any(name.startswith(f"{path}.") for name in trial.layers)}
    undo.append(replace_modules(model, {path: unfused.originals[path] for path in experts if path not in used}).undo)
    if not trial.layers:
        return
    dense = {name: model.get_submodule(name) for name in trial.layers}
    records = {id(dense[name]): record for name, layer in trial.layers.items() if (record := record_of(layer))}
    replacement = replace_modules(model, trial.layers)
    undo.append(replacement.undo)
    for path in used:
        experts[path].own_weights()
    config = deepcopy(config)
    config.unfused = [path for path in unfused.originals if isinstance(model.get_submodule(path), UnfusedExperts)]
    config.modules = {
        path: records[id(old)].to_dict() for path, old in replacement.originals.items() if id(old) in records
    }
    undo.append(partial(unmark_compressed, model))
    mark_compressed(model, config)
