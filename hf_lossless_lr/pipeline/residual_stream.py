"""Where a refit makes up for the error that has gathered in the residual stream."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..data import DataSplits, PaddingMasks, subset
from ..layers import Targets
from ..statistics import CalibrationStatistics, Residual, find_residuals

LABELLED_SHARE = 0.5  # of the tokens of a layer, at least


def residual_stream(
    model: PreTrainedModel,
    targets: Targets,
    statistics: CalibrationStatistics,
    parts: DataSplits,
    accelerator: Accelerator,
) -> dict[str, Residual]:
    """Return the residual connections at which a refit makes up for the error of the stream.

    They are those of layers with a place for a label at each token, most of which have one. Where one answer counts
    for a whole sequence, most of the error is in tokens that hardly matter to it, and to make up for it does harm.

    Args:
        model: the dense model, on the accelerator's device.
        targets: the layers.
        statistics: their statistics.
        parts: the data.
        accelerator: the processes and the device.

    Returns:
        What the outputs of layers are added to, by their names; the same on each process.
    """
    in_encoder = PaddingMasks(model).in_encoder  # its tokens have no labels
    layers = {name: module for name, module in targets.chosen.items() if id(module) not in in_encoder}
    found: dict[str, Residual] = {}
    for batch in accelerator.prepare(subset(parts.calibration, [0])):  # one process has it
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            found = find_residuals(model, layers, batch, labels.numel())
    found = dict(gather_object(list(found.items())))
    if not found:
        return found
    counts = statistics.layers[next(iter(found))]  # all have the same tokens
    return found if counts.units >= LABELLED_SHARE * counts.tokens else {}
