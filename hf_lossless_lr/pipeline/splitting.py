"""From a user's data to the parts that a compression works with."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..checkpoint import MEASURED_OBJECTIVES, LosslessLowRankConfig
from ..data import DataSplits, split_data
from .labelling import with_drawn_labels


def split(
    model: PreTrainedModel,
    config: LosslessLowRankConfig,
    calib_dataset: Any,
    eval_dataset: Any,
    refit_dataset: Any,
    options: dict[str, Any],
) -> DataSplits:
    """Split the data as a configuration asks for, with drawn labels where it wants them.

    Args:
        model: the dense model.
        config: shares, seed and sizes.
        calib_dataset: as in `LowRankCompressor.compress`.
        eval_dataset: as there.
        refit_dataset: as there.
        options: `data_collator` and `processing_class`, as there.

    Returns:
        The parts.
    """
    if config.labels == "model":
        calib_dataset, eval_dataset = with_drawn_labels(model, config, calib_dataset, eval_dataset, **options)
    return split_data(
        model,
        calib_dataset,
        eval_dataset,
        refit_dataset=refit_dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        selection_fraction=config.selection_fraction or 0.0,
        selection_needed=config.objective in MEASURED_OBJECTIVES,
        fewest_selected=config.fewest_selected,
        max_examples=config.max_examples,
        **options,
    )
