"""The architectures that the conformance suite runs: a table, and what builds a tiny random model from one row.

A row names a model class, the few values of its configuration that general small sizes do not serve, and its inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from support import architecture_inputs as inputs
from support import own_architecture
from support.tiny_models import VOCABULARY, Batch, initialized

SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "dim", "pooler_hidden_size", "projection_dim"), 32),
    **dict.fromkeys(("embedding_size", "classifier_proj_size", "conv_pos_dim", "word_embed_proj_dim"), 16),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "ffn_dim", "ffn_hidden_size", "d_inner", "n_inner", "hidden_dim"), 48
    ),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_key_value_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("d_kv", "d_head", "head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions", "max_target_positions"), 40),
    **dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), 0.2),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "layerdrop"), 0.0),
    **{"vocab_size": VOCABULARY, "image_size": 12, "patch_size": 4, "num_mel_bins": 8, "use_cache": False},
}
"""Sizes by the names that configurations have for them; each configuration takes those that it knows."""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """One row: a model class of Transformers in some configuration.

    Attributes:
        model: name of the class.
        family: what kind of model it is.
        inputs: makes a labelled batch.
        options: values of its configuration, where `SMALL` does not serve; those of parts in dictionaries.
        variant: what tells it from other rows of the same class.
        quick: whether it is among the few that every run of the tests takes.
        refused: the sentence with which the library refuses it, before the work; None where it is compressed.
        ignore: layers that are left dense, as patterns.
        labels: where labels come from; `model` for a class without a head.
        cannot: name of a check to what the dense model, as stock Transformers has it, already fails with there.
    """

    model: str
    family: str
    inputs: inputs.Inputs
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    quick: bool = False
    refused: str | None = None
    ignore: list[str] | None = None
    labels: str = "data"
    cannot: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The class, and what is special about it."""
        return f"{self.model} ({self.variant})" if self.variant else self.model

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.model, None) or getattr(own_architecture, self.model)

    def config(self) -> PreTrainedConfig:
        """Return a small configuration."""
        labels = 2 if self.inputs is inputs.text_and_span else 3
        return small(self.model_class.config_class, **{"num_labels": labels, **self.options})

    def build(self, count: int, seed: int = 0) -> tuple[PreTrainedModel, Batch]:
        """Return a tiny random model in evaluation mode, and a labelled batch."""
        model = initialized(lambda: self.model_class(self.config()))
        return model, self.inputs(model, count, seed)


def small(config_class: type[PreTrainedConfig], **options: Any) -> PreTrainedConfig:
    """Return a configuration with small sizes, also in its parts.

    Args:
        config_class: its class.
        options: values that take precedence; of a part, in a dictionary that has its name.
    """
    default = config_class()
    known = vars(default).keys() | default.attribute_map.keys()
    sizes = {name: value for name, value in SMALL.items() if name in known}
    own = {name: value for name, value in sizes.items() if isinstance(getattr(default, name, None), (int, float))}
    own |= TOKENS | ({"decoder_start_token_id": 0} if default.is_encoder_decoder else {})
    for name, part in config_class.sub_configs.items():
        given = options.pop(name, {})
        if part is transformers.AutoConfig:
            part = CONFIG_MAPPING[given["model_type"]] if "model_type" in given else type(getattr(default, name))
        if issubclass(part, PreTrainedConfig):
            own[name] = small(part, **given).to_dict()
    return config_class(**{**own, **options})


QUICK = {"quick": True}
SPECIAL = ("variant", "quick", "refused", "ignore", "labels", "cannot")


def _rows(family: str, *rows: tuple[Any, ...]) -> list[Architecture]:
    """Make rows of a family from tuples: a class, its inputs, and dictionaries of options or of what is special."""
    table = []
    for model, make, *others in rows:
        given = {key: value for part in others for key, value in part.items()}
        special = {key: given.pop(key) for key in SPECIAL if key in given}
        table.append(Architecture(model, family, make, given, **special))
    return table


_READ_ON_DISK = {"cannot": {"what has room": "meta"}}  # a table or a weight that is read without a call is on disk
_POSITIONS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_ENCODERS = _rows(
    "encoder",
    ("BertForSequenceClassification", inputs.text_and_class, QUICK),
    ("BertForTokenClassification", inputs.text_and_tags),
    ("BertForQuestionAnswering", inputs.text_and_span),
    ("BertForMultipleChoice", inputs.text_and_choice),
    ("BertForMaskedLM", inputs.text_and_itself),
    ("BertForPreTraining", inputs.text_and_pretraining),
    ("BertForNextSentencePrediction", inputs.text_and_following),
    ("BertLMHeadModel", inputs.text_and_itself, {"is_decoder": True}),
    ("RobertaForSequenceClassification", inputs.text_and_class),
    ("RobertaForMaskedLM", inputs.text_and_itself),
    ("XLMRobertaForTokenClassification", inputs.text_and_tags),
    ("DistilBertForQuestionAnswering", inputs.text_and_span),
    ("AlbertForSequenceClassification", inputs.text_and_class, QUICK),
    ("AlbertForPreTraining", inputs.text_and_pretraining, {"num_labels": 2}),
    ("DebertaForSequenceClassification", inputs.text_and_class, _POSITIONS, _READ_ON_DISK),
    (
        *("DebertaV2ForTokenClassification", inputs.text_and_tags, _READ_ON_DISK),
        {**_POSITIONS, "share_att_key": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
    ),
    ("ElectraForPreTraining", inputs.text_and_replaced),
    ("ElectraForSequenceClassification", inputs.text_and_class),
    ("ModernBertForMaskedLM", inputs.text_and_itself),
    ("XLNetForSequenceClassification", inputs.text_and_class),
    ("FunnelForSequenceClassification", inputs.text_and_class, {"block_sizes": [1, 1]}, _READ_ON_DISK),
    ("FNetForSequenceClassification", inputs.text_and_class),
    ("MPNetForMaskedLM", inputs.text_and_itself),
    ("LongformerForSequenceClassification", inputs.text_and_class, {"attention_window": 4}),
    ("BigBirdForQuestionAnswering", inputs.text_and_span),
    ("SqueezeBertForSequenceClassification", inputs.text_and_class, {"embedding_size": 32}),
    (
        "MobileBertForSequenceClassification",
        inputs.text_and_class,
        {"intra_bottleneck_size": 16, "embedding_size": 32},
    ),
    ("ConvBertForSequenceClassification", inputs.text_and_class),
    ("RoFormerForSequenceClassification", inputs.text_and_class),
    ("CanineForSequenceClassification", inputs.text_and_class, {"num_hash_buckets": 64, "num_hash_functions": 4}),
    ("LukeForSequenceClassification", inputs.text_and_class, {"entity_vocab_size": 61, "entity_emb_size": 16}),
    ("NomicBertForSequenceClassification", inputs.text_and_class, QUICK),
    (
        *("IBertForSequenceClassification", inputs.text_and_class),
        {"refused": r"no layer of IBertForSequenceClassification is left to factorize; skipped: classifier\.dense"},
    ),
)

_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_CAUSAL = (
    *("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM"),
    *("Gemma3ForCausalLM", "PhiForCausalLM", "GPTNeoXForCausalLM", "BloomForCausalLM", "OPTForCausalLM"),
    *("FalconForCausalLM", "CohereForCausalLM", "StableLmForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM"),
    *("MptForCausalLM", "GPTBigCodeForCausalLM", "Starcoder2ForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM"),
    *("OpenAIGPTLMHeadModel", "XGLMForCausalLM", "BioGptForCausalLM", "GlmForCausalLM", "PersimmonForCausalLM"),
    "ProphetNetForCausalLM",
)
_DECODERS = _rows(
    "decoder",
    ("LlamaForCausalLM", inputs.text_and_itself, QUICK, {"variant": "grouped queries, untied"}),
    (
        *("LlamaForCausalLM", inputs.text_and_itself),
        {"variant": "one key head, tied", "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    ("LlamaForSequenceClassification", inputs.text_and_class),
    ("MistralForCausalLM", inputs.text_and_itself, {"variant": "sliding window", "sliding_window": 4}),
    ("Phi3ForCausalLM", inputs.text_and_itself, QUICK),
    ("GPT2LMHeadModel", inputs.text_and_itself, QUICK),
    ("GPT2ForSequenceClassification", inputs.text_and_class),
    ("Qwen3ForTokenClassification", inputs.text_and_tags),
    ("GPTNeoForCausalLM", inputs.text_and_itself, {"attention_types": [[["global", "local"], 1]]}),
    ("GPTJForCausalLM", inputs.text_and_itself, {"rotary_dim": 4}),
    ("CodeGenForCausalLM", inputs.text_and_itself, {"rotary_dim": 4}),
    ("CTRLLMHeadModel", inputs.text_and_itself, {"dff": 48}),
    (
        *("DeepseekV3ForCausalLM", inputs.text_and_itself, _LATENT, _DEEPSEEK),
        {"qk_head_dim": 16, "moe_intermediate_size": 24, "num_key_value_heads": 4},
    ),
    *((model, inputs.text_and_itself) for model in _CAUSAL),
)

_DECODER_SIZES = {"num_encoder_layers": 2, "num_decoder_layers": 2, "ngram": 2}
_SEQ2SEQ = (
    *("MT5ForConditionalGeneration", "UMT5ForConditionalGeneration", "MBartForConditionalGeneration"),
    *("PegasusForConditionalGeneration", "M2M100ForConditionalGeneration", "MarianMTModel"),
    *("BlenderbotForConditionalGeneration", "LongT5ForConditionalGeneration", "T5GemmaForConditionalGeneration"),
    "BigBirdPegasusForConditionalGeneration",
)
_ENCODER_DECODERS = _rows(
    "encoder–decoder",
    ("T5ForConditionalGeneration", inputs.text_and_text, QUICK),
    ("T5ForTokenClassification", inputs.text_and_tags),
    ("BartForConditionalGeneration", inputs.text_and_text),
    ("BartForSequenceClassification", inputs.text_with_end_and_class),
    (
        *("LEDForConditionalGeneration", inputs.text_and_text, {"attention_window": 4}),
        {"max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 40},
    ),
    ("ProphetNetForConditionalGeneration", inputs.text_and_text, _DECODER_SIZES),
    *((model, inputs.text_and_text) for model in _SEQ2SEQ),
)

_FRONT = {"conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [3, 2], "apply_spec_augment": False}
_SOUND = {**_FRONT, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_LETTERS = {**_SOUND, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
_SPEECH = _rows(
    "speech",
    ("WhisperForConditionalGeneration", inputs.spectrogram_and_text, QUICK, {"max_source_positions": 8}),
    ("WhisperForAudioClassification", inputs.spectrogram_and_class, {"max_source_positions": 8}),
    (
        "Speech2TextForConditionalGeneration",
        inputs.frames_and_text,
        {"input_feat_per_channel": 8, "conv_channels": 16},
    ),
    ("Wav2Vec2ForCTC", inputs.sound_and_letters, _LETTERS),
    ("Wav2Vec2ForSequenceClassification", inputs.sound_and_class, _SOUND),
    ("Wav2Vec2ForAudioFrameClassification", inputs.sound_and_frames, _SOUND),
    ("HubertForCTC", inputs.sound_and_letters, _LETTERS),
    (
        *("WavLMForSequenceClassification", inputs.sound_and_class, _SOUND),
        {"cannot": {"a block on disk": "meta", "what has room": "meta"}},  # its attention reads all of its weights
    ),
    ("SEWForSequenceClassification", inputs.sound_and_class, _SOUND),
    ("UniSpeechSatForSequenceClassification", inputs.sound_and_class, _SOUND),
    ("Data2VecAudioForSequenceClassification", inputs.sound_and_class, _SOUND),
    ("Wav2Vec2ConformerForSequenceClassification", inputs.sound_and_class, _SOUND),
    ("ASTForAudioClassification", inputs.frames_and_class, {"max_length": 16}),
)

_STAGES = {"depths": [1, 1], "hidden_sizes": [16, 24], "image_size": 16}
_WINDOWS = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
_PYRAMID = {**_STAGES, "num_encoder_blocks": 2, "num_attention_heads": [2, 2], "mlp_ratios": [2, 2]}
_SEGFORMER = {**_PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "decoder_hidden_size": 16}
_FOUR = {"depths": [1, 1, 1, 1], "image_size": 32}
_BACKBONE = {"model_type": "resnet", "embedding_size": 8, **_STAGES, "out_features": ["stage2"]}
_MASKS = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 16, 24],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "decoder_config": {
        **{"model_type": "detr", "d_model": 32, "num_queries": 4},
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    },
}
_SEGMENTER = {
    **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 64),
    **{"encoder_layers": 1, "decoder_layers": 2, "num_queries": 4, "train_num_points": 16},
}
_DETR = {"backbone_config": _BACKBONE, "num_queries": 5, "image_size": 32}
_VISION = _rows(
    "vision",
    ("ViTForImageClassification", inputs.picture_and_class, QUICK),
    *((f"{name}ForImageClassification", inputs.picture_and_class) for name in ("DeiT", "Beit", "Dinov2", "IJepa")),
    ("SwinForImageClassification", inputs.picture_and_class, _WINDOWS),
    ("Swinv2ForImageClassification", inputs.picture_and_class, _WINDOWS),
    ("ConvNextForImageClassification", inputs.picture_and_class, _STAGES, {"num_stages": 2}),
    ("ConvNextV2ForImageClassification", inputs.picture_and_class, _STAGES, {"num_stages": 2}),
    ("ResNetForImageClassification", inputs.picture_and_class, QUICK, _STAGES, {"embedding_size": 8}),
    ("RegNetForImageClassification", inputs.picture_and_class, _STAGES, {"embedding_size": 8, "groups_width": 8}),
    (
        *("MobileViTForImageClassification", inputs.picture_and_class, {"image_size": 32, "patch_size": 2}),
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
    ),
    ("MobileNetV2ForImageClassification", inputs.picture_and_class, {"depth_multiplier": 0.25, "image_size": 32}),
    ("SegformerForImageClassification", inputs.picture_and_class, _SEGFORMER),
    ("SegformerForSemanticSegmentation", inputs.picture_and_segments, _SEGFORMER),
    (
        *("PvtForImageClassification", inputs.picture_and_class, _PYRAMID, {"image_size": 32}),
        {"sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2]},
    ),
    (
        *("PoolFormerForImageClassification", inputs.picture_and_class, _FOUR),
        {"hidden_sizes": [8, 16, 24, 32], "layer_scale_init_value": 0.5},
    ),
    (
        *("HieraForImageClassification", inputs.picture_and_class, {"image_size": [32, 32], "embed_dim": 16}),
        {"depths": [1, 1, 1], "num_heads": [1, 2, 4], "masked_unit_size": [4, 4], "num_query_pool": 1},
        {"patch_size": [4, 4], "patch_stride": [4, 4], "patch_padding": [0, 0]},
    ),
    (
        *("FocalNetForImageClassification", inputs.picture_and_class, {"image_size": 16, "patch_size": 2}),
        {"embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "hidden_sizes": [16, 32]},
    ),
    (
        *("GLPNForDepthEstimation", inputs.picture_and_depth, _FOUR, {"hidden_sizes": [8, 16, 16, 24]}),
        {"num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 8},
    ),
    (
        *("VideoMAEForVideoClassification", inputs.video_and_class, {"image_size": 16, "patch_size": 8}),
        {"num_frames": 4, "num_channels": 3},
    ),
    (
        *("MaskFormerForInstanceSegmentation", inputs.picture_and_masks, _MASKS),
        {"fpn_feature_size": 32, "mask_feature_size": 32, **_READ_ON_DISK},
    ),
    (
        *("Mask2FormerForUniversalSegmentation", inputs.picture_and_masks, _SEGMENTER, _READ_ON_DISK),
        {"backbone_config": _MASKS["backbone_config"], "encoder_feedforward_dim": 32, "dim_feedforward": 32},
    ),
    ("YolosForObjectDetection", inputs.picture_and_boxes, {"image_size": [16, 16], "num_detection_tokens": 4}),
    (
        *("DetrForObjectDetection", inputs.picture_and_boxes, _DETR),
        {"refused": "'model.backbone.* is frozen .requires_grad=False., so it gets no gradient. Call `model.requires"},
    ),
    (
        *("DetrForObjectDetection", inputs.picture_and_boxes, _DETR),
        {"variant": "without its backbone", "ignore": ["model.backbone.*"]},
    ),
    (
        *("BitForImageClassification", inputs.picture_and_class, _STAGES, {"embedding_size": 16, "num_groups": 4}),
        {"refused": "no layer of Bit.* is left .*WeightStandardizedConv2d computes something else than its base type"},
    ),
    (
        *("ViTMAEForPreTraining", inputs.picture, {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1}),
        {
            "decoder_intermediate_size": 32,
            "decoder_num_attention_heads": 4,
            "refused": "takes no labels, and a model is judged by its loss on",
        },
    ),
)

_UNLABELLED = {"refused": "takes no labels, and a model is judged by its loss on"}
_HEADLESS = {"variant": "by its representations", "labels": "model"}
_IMAGE_WORD = {"image_token_index": inputs.IMAGE_WORD}
_IMAGE_TEXT = _rows(
    "image–text",
    ("CLIPModel", inputs.picture_and_its_text, _UNLABELLED),
    ("CLIPModel", inputs.picture_and_its_text, _HEADLESS),
    ("SiglipModel", inputs.picture_and_its_text, _HEADLESS),
    ("BertModel", inputs.text, _HEADLESS),
    ("CLIPForImageClassification", inputs.picture_and_class, QUICK),
    ("SiglipForImageClassification", inputs.picture_and_class, _READ_ON_DISK),
    ("BlipForConditionalGeneration", inputs.picture_and_caption),
    ("GitForCausalLM", inputs.picture_and_caption),
    ("ViltForQuestionAnswering", inputs.picture_and_answer),
    ("VisualBertForQuestionAnswering", inputs.picture_and_answer),
    (
        *("LlavaForConditionalGeneration", inputs.patches_and_text),
        {**_IMAGE_WORD, "vision_feature_select_strategy": "default"},
    ),
    (
        *("PaliGemmaForConditionalGeneration", inputs.patches_and_text, _READ_ON_DISK),
        {**_IMAGE_WORD, "projection_dim": 32},
    ),
)

_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SWITCH = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 99}
_JETMOE = {
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2},
    "cannot": {"a block on disk": "meta", "what has room": "meta"},  # a bias of a module that is not called is there
}
_EXPERTS = _rows(
    "experts",
    ("MixtralForCausalLM", inputs.text_and_itself, QUICK),
    ("Qwen2MoeForCausalLM", inputs.text_and_itself, _ROUTED),
    ("Qwen3MoeForCausalLM", inputs.text_and_itself, _ROUTED),
    ("GptOssForCausalLM", inputs.text_and_itself, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("OlmoeForCausalLM", inputs.text_and_itself, {"num_experts": 4, "num_experts_per_tok": 2}),
    ("GraniteMoeForCausalLM", inputs.text_and_itself),
    ("JetMoeForCausalLM", inputs.text_and_itself, _JETMOE),
    ("SwitchTransformersForConditionalGeneration", inputs.text_and_text, _SWITCH),
)

_STATE_SPACE = _rows(
    "state space",
    ("MambaForCausalLM", inputs.text_and_itself, QUICK),
    ("Mamba2ForCausalLM", inputs.text_and_itself, {"head_dim": 16, "n_groups": 2, "chunk_size": 8}),
    *((f"{name}ForCausalLM", inputs.text_and_itself) for name in ("FalconMamba", "Jamba", "Rwkv", "RecurrentGemma")),
)

_PATCHES = {
    "num_input_channels": 3,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "prediction_length": 8,
}
_DATED = {"context_length": 12, "prediction_length": 6, "lags_sequence": [1, 2], "num_time_features": 2}
_DATED |= {"scaling": "std", "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
_TIME_SERIES = _rows(
    "time series",
    ("PatchTSTForPrediction", inputs.series_and_future, _PATCHES, QUICK),
    ("PatchTSTForClassification", inputs.series_and_class, _PATCHES, {"num_targets": 3}),
    ("PatchTSTModel", inputs.series, _PATCHES, _HEADLESS),
    ("PatchTSMixerForPrediction", inputs.series_and_future, _PATCHES),
    ("TimeSeriesTransformerForPrediction", inputs.dated_series_and_future, _DATED),
    ("InformerForPrediction", inputs.dated_series_and_future, _DATED),
)

_OWN = _rows("your own class", ("OwnArchitectureForClassification", inputs.values_and_class, QUICK))

ARCHITECTURES = [
    *(_ENCODERS + _DECODERS + _ENCODER_DECODERS + _SPEECH + _VISION + _IMAGE_TEXT),
    *(_EXPERTS + _STATE_SPACE + _TIME_SERIES + _OWN),
]
"""All rows, by family; no two have the same name."""
