"""Tiny models whose layers see padding in other shapes than that of the batch's attention mask."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from support.tiny_models import (
    EXAMPLES,
    FIRST_WORD,
    IGNORED,
    VOCABULARY,
    Batch,
    build,
    class_labels,
    generator,
    lengths,
    text_inputs,
)

_LAYERS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
_WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, **_LAYERS}
_SPEECH = {
    **_LAYERS,
    "conv_dim": [16, 16],
    "conv_kernel": [5, 3],
    "conv_stride": [3, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "feat_extract_activation": "gelu",
    "conv_bias": True,
    "num_labels": 3,
    "classifier_proj_size": 16,
    "apply_spec_augment": False,
    "hidden_dropout": 0.0,
}


def sounds(count: int, longest: int, seed: int = 0) -> Batch:
    """Noise, padded with silence."""
    mask = (torch.arange(longest) < 6 * lengths(count, longest // 6, seed)[:, None] + 1).long()
    return {
        "input_values": torch.randn(count, longest, generator=generator(seed)) * mask,
        "attention_mask": mask,
    }


def _speech(name: str, count: int, seed: int, **options: object) -> tuple[PreTrainedModel, Batch]:
    model = build(f"{name}ForSequenceClassification", f"{name}Config", **_SPEECH, **options)
    return model, sounds(count, 80, seed) | class_labels(count, 3, seed)


def wav2vec2(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Six samples are one frame, of which the attention mask of the batch knows nothing."""
    return _speech("Wav2Vec2", count, seed)


def wavlm(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    return _speech("WavLM", count, seed)


def speech_to_words(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Connectionist temporal classification: the labels are fewer than the frames."""
    model = build("HubertForCTC", "HubertConfig", **_SPEECH, ctc_loss_reduction="mean", vocab_size=7, pad_token_id=0)
    batch = sounds(count, 80, seed)
    labels = torch.randint(1, 7, (count, 4), generator=generator(seed + 2000))
    labels[1::2, 2:] = IGNORED
    labels[:, 1] = (labels[:, 0] % 6) + 1  # a letter twice in a row takes more frames than the shortest sound has
    batch["attention_mask"][:, :43] = 1
    return model, batch | {"labels": labels}


def vilt(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Words and patches of a picture in a row."""
    model = build(
        "ViltForQuestionAnswering",
        "ViltConfig",
        **_WORDS,
        image_size=12,
        patch_size=4,
        num_labels=3,
        max_image_length=-1,
    )
    batch = text_inputs(count, seed=seed)
    batch["pixel_values"] = torch.randn(count, 3, 12, 12, generator=generator(seed + 1))
    labels = torch.nn.functional.one_hot(class_labels(count, 3, seed)["labels"], 3).float()
    return model, batch | {"labels": labels}


def longformer(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Filled up to whole windows of attention."""
    options = {"attention_window": 4, "pad_token_id": 0, "num_labels": 3}
    model = build("LongformerForSequenceClassification", "LongformerConfig", **_WORDS, **options)
    batch = text_inputs(count, seed=seed)
    short = torch.arange(batch["input_ids"].shape[1]) < 4 * (1 + torch.arange(count)[:, None] % 2)
    batch = {
        "input_ids": torch.where(short, batch["input_ids"].clamp_min(FIRST_WORD), 0),
        "attention_mask": short.long(),
    }
    return model, batch | class_labels(count, 3, seed)


def deberta(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Relative positions are projected once for a batch, as far as its longest example reaches."""
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "num_labels": 3, "pooler_hidden_size": 32}
    model = build("DebertaForSequenceClassification", "DebertaConfig", **_WORDS, **options)
    return model, text_inputs(count, seed=seed) | class_labels(count, 3, seed)


def deberta_v2(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Relative positions go through the projections of queries and keys."""
    options = {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "num_labels": 3,
        "pooler_hidden_size": 32,
    }
    model = build("DebertaV2ForSequenceClassification", "DebertaV2Config", **_WORDS, **options)
    return model, text_inputs(count, seed=seed) | class_labels(count, 3, seed)


def conformer(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Speech with relative positions."""
    options = {"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3}
    return _speech("Wav2Vec2Conformer", count, seed, **options)


PADDED_MODELS: dict[str, Callable[..., tuple[PreTrainedModel, Batch]]] = {
    "wav2vec2": wav2vec2,
    "wavlm": wavlm,
    "speech-to-words": speech_to_words,
    "vilt": vilt,
    "longformer": longformer,
    "deberta": deberta,
    "deberta-v2": deberta_v2,
    "conformer": conformer,
}
