"""Which rows of a layer's input are real tokens rather than padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import TOKENS_FIRST


class PaddingMasks:
    """The masks of the current batch.

    The attention mask applies to all layers of a single-stack model. In an encoder-decoder it applies to the encoder,
    and to what the decoder reads from the encoder's output; the decoder's own mask (by default, where labels are not
    -100) applies elsewhere.

    Args:
        model: the model whose batches these are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.encoder = model.get_encoder() if model.config.is_encoder_decoder else None
        self.in_encoder = set(map(id, self.encoder.modules())) if self.encoder is not None else set()
        tokens_first = (module for module in model.modules() if type(module).__name__ in TOKENS_FIRST)
        self.in_tokens_first = {id(inner) for module in tokens_first for inner in module.modules()}
        self.encoder_output: torch.Tensor | None = None
        self.main: torch.Tensor | None = None
        self.decoder: torch.Tensor | None = None

    def start(self, batch: Mapping[str, Any]) -> None:
        """Take the masks of a batch, before its forward pass."""
        attention_mask = batch.get("attention_mask")
        self.main, self.encoder_output = _boolean_mask(attention_mask), None
        if self.encoder is not None:
            labels = batch.get("labels")
            default = labels != -100 if isinstance(labels, torch.Tensor) and labels.ndim == 2 else attention_mask
            self.decoder = _boolean_mask(batch.get("decoder_attention_mask", default))

    def record_encoder_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note the encoder's output: a forward hook for the encoder."""
        self.encoder_output = output[0]

    def of(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Return the mask of the flattened rows of a module's input, or None where all rows count."""
        mask = self.main
        if self.encoder is not None and id(module) not in self.in_encoder and x is not self.encoder_output:
            mask = self.decoder
        if mask is None:
            return None
        if id(module) in self.in_tokens_first:
            mask = mask.T
        if x.shape[:-1] in (mask.shape, mask.flatten().shape):
            return mask.flatten()
        return mask.T.flatten() if x.shape[:-1] == mask.T.shape else None  # other models with the tokens first


def _boolean_mask(mask: Any) -> torch.Tensor | None:
    """Return a mask of shape (sequences, tokens), or None where nothing is padding (or the mask is a 4-d one)."""
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 3):
        return None
    return None if bool(mask.all()) else mask.bool().flatten(0, -2)  # the choices of an example are sequences
