"""ImageNet, and any other folder of pictures sorted by class: top-1 and top-5 accuracy.

Source: O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 115, 2015.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, default_data_collator

from .classification import align_labels, answer_examples, check_labels, share
from .pipelines import TASKS
from .scores import Scores
from .sources import check_pictures, choose_columns
from .task import EvaluationTask, ScoringOptions

_IMAGES = TASKS["image-classification"]
_TOP = 5


def _prepare(dataset: Dataset, processor: Any, max_length: int) -> Dataset:
    """Process each picture when it is asked for: those of ImageNet's validation set together take 30 GB."""
    image, label = choose_columns(_IMAGES, dataset.column_names)
    check_labels(dataset, label)
    check_pictures(dataset, image)

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = processor([picture.convert("RGB") for picture in batch[image]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch[label]}

    return dataset.select_columns([image, label]).with_transform(process)


def _score(model: PreTrainedModel, dataset: Dataset, processor: Any, options: ScoringOptions) -> Scores:
    examples = _prepare(_align(dataset, model), processor, options.max_length)
    return top_k_scores(*answer_examples(model, examples, default_data_collator, options, _best))


def _best(logits: torch.Tensor) -> torch.Tensor:
    """Return the best classes of each picture, best first; equal ones in their order."""
    return logits.argsort(dim=-1, descending=True, stable=True)[:, :_TOP]


def top_k_scores(predictions: np.ndarray, labels: np.ndarray) -> Scores:
    """Score the best classes of each example by top-1 and top-5 accuracy (top-k, where there are only k < 5).

    Args:
        predictions: classes, best first.  # shape: (examples, k)
        labels: the right class of each example.  # shape: (examples,)

    Returns:
        The scores; the counts are 1, whether the first class is right, and whether one of the first five is.
    """
    right = predictions[:, :_TOP] == labels[:, None]
    metrics = (share("top-1 accuracy", 1), share(f"top-{right.shape[1]} accuracy", 2))
    return Scores(np.stack([np.ones(len(right)), right[:, 0], right.any(1)], 1), metrics)


def _align(dataset: Dataset, model: PreTrainedModel) -> Dataset:
    return align_labels(dataset, model, choose_columns(_IMAGES, dataset.column_names)[1])


IMAGE_CLASSIFICATION = EvaluationTask(
    auto_model=_IMAGES.auto_model,
    processor=_IMAGES.processor,
    dataset=("ILSVRC/imagenet-1k", None, "train", "validation"),
    max_length=0,  # pictures have no tokens
    prepare=_prepare,
    collator=_IMAGES.collator,
    score=_score,
    align=_align,
)
"""Classification of pictures by top-1 and top-5 accuracy (or top-k, for a model of k < 5 classes)."""
