"""ImageNet, and any other folder of pictures sorted by class: top-1 and top-5 accuracy.

Source: O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 115, 2015.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, default_data_collator

from ..data import TASKS, choose_columns
from .classification import align_labels, check_labels, count_answers, model_labels, share
from .scores import Scores
from .task import EvaluationTask, ScoringOptions

_IMAGES = TASKS["image-classification"]
_TOP = 5


def _prepare(dataset: Dataset, processor: Any, max_length: int) -> Dataset:
    """Process each picture when it is asked for: those of ImageNet's validation set together take 30 GB."""
    image, label = choose_columns(_IMAGES, dataset.column_names)
    check_labels(dataset, label)

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = processor([picture.convert("RGB") for picture in batch[image]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch[label]}

    return dataset.select_columns([image, label]).with_transform(process)


def _score(model: PreTrainedModel, dataset: Dataset, processor: Any, options: ScoringOptions) -> Scores:
    examples = _prepare(_align(dataset, model), processor, options.max_length)
    top = min(_TOP, len(model_labels(model)))

    def count(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own, places = logits.gather(-1, labels[:, None]), torch.arange(logits.shape[-1], device=logits.device)
        ahead = (logits > own) | ((logits == own) & (places < labels[:, None]))
        rank = ahead.sum(-1)
        return torch.stack([torch.ones_like(rank), rank < 1, rank < top], -1)

    counts = count_answers(model, examples, default_data_collator, options, count)
    return Scores(counts, (share("top-1 accuracy", 1), share(f"top-{top} accuracy", 2)))


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
