"""Architectures that are exceptions, by the names of their classes."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

SHIFTED = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) | set(
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
)
SHIFTED -= {  # they compare each position with its own label
    *(f"{name}ForCausalLM" for name in ("Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "CpmAnt", "MBart")),
    *(f"{name}ForCausalLM" for name in ("Marian", "Mvp", "PLBart", "Pegasus", "ProphetNet", "TrOCR", "Whisper")),
    *("XLMWithLMHeadModel", "XLNetLMHeadModel"),
}
CTC = set(modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES.values())

TOKENS_FIRST = {"XLNetModel", "LongformerSelfAttention", "LEDEncoderSelfAttention"}  # (tokens, sequences) inside
