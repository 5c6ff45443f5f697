"""Data for a model whose own answers are the labels."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..checkpoint import LosslessLowRankConfig
from ..data import draw_labels
from ..processes import make_accelerator


def with_drawn_labels(
    model: PreTrainedModel,
    config: LosslessLowRankConfig,
    calib_dataset: Any,
    eval_dataset: Any,
    data_collator: Any,
    processing_class: Any,
) -> tuple[Any, Any]:
    """Return calibration and held-out data with labels that the dense model draws; held-out ones keep their own.

    Args:
        model: the dense model.
        config: batch size, seed and most examples.
        calib_dataset: as for `LowRankCompressor.compress`.
        eval_dataset: as there.
        data_collator: as there.
        processing_class: as there.

    Returns:
        Both; None stays None.
    """
    device, most = make_accelerator().device, config.max_examples
    options = {"batch_size": config.batch_size, "data_collator": data_collator, "processing_class": processing_class}
    calib_dataset = draw_labels(calib_dataset, model, device, config.seed, most, **options)
    if eval_dataset is not None:
        options["name"] = "eval_dataset"
        eval_dataset = draw_labels(eval_dataset, model, device, config.seed + 1, most, keep=True, **options)
    return calib_dataset, eval_dataset
