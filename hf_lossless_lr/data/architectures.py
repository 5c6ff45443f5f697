"""Architectures that are exceptions, by the names of their classes."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

CTC = set(modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES.values())

TOKENS_FIRST = {
    "XLNetModel",
    "LongformerSelfAttention",
    "LEDEncoderSelfAttention",
    "FSMTEncoder",
    "FSMTDecoder",
}  # (tokens, sequences) inside
