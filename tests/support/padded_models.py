"""Tiny models whose layers see padding in other shapes than that of the batch's attention mask."""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_lossless_lr.layers import replace_modules, unfuse
from support.mixtures import mixture
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
    pixels,
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


def funnel(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Every second token is pooled away, and so is the mask, where nothing shows it."""
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1], "initializer_range": 0.2}
    model = build("FunnelForSequenceClassification", "FunnelConfig", vocab_size=VOCABULARY, num_labels=3, **sizes)
    return model, text_inputs(count, seed=seed) | class_labels(count, 3, seed)


def experts(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Each expert gets the tokens that a router sends it, padding among them."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    routing = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 99}
    model = build(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        vocab_size=VOCABULARY,
        num_decoder_layers=2,
        router_z_loss_coef=0.0,
        router_aux_loss_coef=0.0,
        **sizes,
        **routing,
    )
    batch = text_inputs(count, seed=seed)
    targets = text_inputs(count, 7, seed=seed + 500)
    return model, batch | {"labels": torch.where(targets["attention_mask"].bool(), targets["input_ids"], IGNORED)}


def unfused_experts(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Fused experts, made one layer each: it is known which tokens they get."""
    model, batch = mixture("Mixtral"), text_inputs(count, seed=seed)
    replace_modules(model, unfuse(model))
    return model, batch | {"labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)}


def sorted_experts(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Experts of attention and of the MLP get their rows in an order of their own."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "kv_channels": 8}
    routing = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = build(
        "JetMoeForCausalLM", "JetMoeConfig", vocab_size=VOCABULARY, initializer_range=0.2, **sizes, **routing
    )
    replace_modules(model, unfuse(model))
    batch = text_inputs(count, seed=seed)
    return model, batch | {"labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)}


def unfused_heads(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Projections with an axis of heads, made a layer each."""
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "initializer_range": 0.2}
    model = build("XLNetForTokenClassification", "XLNetConfig", vocab_size=VOCABULARY, num_labels=3, **sizes)
    replace_modules(model, unfuse(model))
    batch = text_inputs(count, seed=seed)
    return model, batch | {"labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 3, IGNORED)}


def perceiver(count: int = EXAMPLES, seed: int = 0, latents: int = 4) -> tuple[PreTrainedModel, Batch]:
    """As many latents for a short text as for a long one."""
    sizes = {"num_latents": latents, "d_latents": 32, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1}
    model = build(
        "PerceiverForSequenceClassification",
        "PerceiverConfig",
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        num_labels=3,
        initializer_range=0.2,
        **sizes,
    )
    return model, text_inputs(count, seed=seed) | class_labels(count, 3, seed)


PADDED_MODELS: dict[str, Callable[..., tuple[PreTrainedModel, Batch]]] = {
    "wav2vec2": wav2vec2,
    "wavlm": wavlm,
    "speech-to-words": speech_to_words,
    "vilt": vilt,
    "longformer": longformer,
    "deberta": deberta,
    "deberta-v2": deberta_v2,
    "conformer": conformer,
    "funnel": funnel,
    "experts": experts,
    "unfused-experts": unfused_experts,
    "sorted-experts": sorted_experts,
    "unfused-heads": unfused_heads,
    "perceiver": perceiver,
    "perceiver-of-as-many-latents": partial(perceiver, latents=9),
}


def captions(count: int = EXAMPLES, longest: int = 9, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Pictures of nine patches, and one row more, with texts of several lengths."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**sizes, "vocab_size": VOCABULARY, "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2}
    vision = {**sizes, "image_size": 12, "patch_size": 4}
    model = build("BlipForConditionalGeneration", "BlipConfig", text_config=text, vision_config=vision)
    batch = text_inputs(count, longest, seed=seed)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)
    return model, batch | pixels(count, 3, 12, seed)


def whisper(count: int = EXAMPLES, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
    """Sounds that are all equally long, with texts that are not."""
    model = build(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    targets = text_inputs(count, seed=seed)
    labels = torch.where(targets["attention_mask"].bool(), targets["input_ids"], IGNORED)
    return model, {"input_features": torch.randn(count, 8, 16, generator=generator(seed)), "labels": labels}
