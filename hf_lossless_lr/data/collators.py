"""The default collator: that of `Trainer`, which also pads labels of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..fingerprint import as_array
from .labels import IGNORE_INDEX


def default_collator(processing_class: Any, model: PreTrainedModel) -> Any:
    """Return the collator of examples where the user gives none.

    Args:
        processing_class: tokenizer or processor, or None.
        model: the model.

    Returns:
        A collator that pads, where there is a tokenizer to say how.
    """
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return PaddingCollator(processing_class, bool(model.config.is_encoder_decoder))
    return default_data_collator


class PaddingCollator:
    """Pads inputs as the tokenizer does, and labels of tokens with -100.

    Args:
        tokenizer: the tokenizer.
        own_length: whether labels have a length of their own, as in an encoder-decoder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own_length: bool) -> None:
        self.tokenizer, self.own_length = tokenizer, own_length
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Any:
        """Return the batch of some examples."""
        if not isinstance(items[0], Mapping):
            return self.pad(list(items))
        name = next((name for name in ("labels", "label", "label_ids") if name in items[0]), "labels")
        rows = [row for row in (as_array(item.get(name)) for item in items) if row is not None and row.ndim == 1]
        if len(rows) < len(items) or len({len(row) for row in rows}) == 1:
            return self.pad([dict(item) for item in items])
        batch = self.pad([{key: value for key, value in item.items() if key != name} for item in items])
        size = max(len(row) for row in rows)
        if not self.own_length and "input_ids" in batch:
            size = max(size, batch["input_ids"].shape[1])
        left = self.tokenizer.padding_side == "left" and not self.own_length
        numbers = any(row.dtype.kind == "f" for row in rows)
        labels = torch.full((len(rows), size), IGNORE_INDEX, dtype=torch.float32 if numbers else torch.int64)
        for target, row in zip(labels, map(torch.as_tensor, rows), strict=True):
            start = size - len(row) if left else 0
            target[start : start + len(row)] = row
        batch["labels"] = labels
        return batch
