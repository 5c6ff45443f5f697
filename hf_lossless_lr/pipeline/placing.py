"""The chosen layers take their places in the model, which from then on saves as a compressed one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

from ..checkpoint import (
    LosslessLowRankConfig,
    current_unfused,
    mark_compressed,
    narrow_records,
    record_of,
    unmark_compressed,
)
from ..layers import NarrowLinear, Replacement, replace_modules, without_wrappers
from .calibration import Calibration
from .trial import Trial


def put_in_place(
    calibration: Calibration,
    trial: Trial,
    config: LosslessLowRankConfig,
    replaced: Replacement,
    undo: list[Callable[[], None]],
) -> None:
    """Put the layers of a trial in, and record them in the model's config; modules without any of them are fused.

    Args:
        calibration: the calibration of the model, whose modules are all unfused.
        trial: the trial.
        config: the choices; not changed.
        replaced: how they were unfused.
        undo: the ways back are added here.
    """
    model, unfused = calibration.dense.model, calibration.dense.unfused
    used = {path for path in unfused if any(name.startswith(f"{path}.") for name in trial.layers)}
    undo.append(replace_modules(model, {path: replaced.originals[path] for path in unfused if path not in used}).undo)
    if not trial.layers:
        return
    dense = {name: model.get_submodule(name) for name in trial.layers}
    narrow = {name: layer for name, layer in trial.layers.items() if isinstance(layer, NarrowLinear)}
    plain = {name: layer for name, layer in trial.layers.items() if name not in narrow}
    records = {id(dense[name]): record for name, layer in plain.items() if (record := record_of(layer))}
    replacement = replace_modules(model, trial.layers)
    undo.append(replacement.undo)
    for path in used:
        unfused[path].own_weights()
    config = deepcopy(config)
    found = {path: records[id(old)] for path, old in replacement.originals.items() if id(old) in records}
    inner = {f"{name}.inner": record_of(layer.inner) for name, layer in narrow.items()}
    found |= {name: record for name, record in inner.items() if record is not None}
    config.modules = {without_wrappers(name): record.to_dict() for name, record in found.items()}
    config.narrowed, config.unfused = narrow_records(model), current_unfused(model)
    undo.append(partial(unmark_compressed, model))
    mark_compressed(model, config)
