"""Tiny mixtures of experts of many families, as Transformers has them: experts fused into 3-D parameters."""

from typing import Any

import torch
from transformers import PreTrainedModel

from support.tiny_models import EXAMPLES, FIRST_WORD, VOCABULARY, Batch, build, generator

LENGTH = 12
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TWO_OF_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
_TWO_OF_FOUR_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TWO_OF_FOUR_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": _TWO_OF_FOUR_LOCAL,
    "Qwen2Moe": _TWO_OF_FOUR | {"shared_expert_intermediate_size": 24},
    "Qwen3Moe": _TWO_OF_FOUR | {"head_dim": 8},
    "Olmoe": _TWO_OF_FOUR,
    "FlexOlmo": _TWO_OF_FOUR,
    "GptOss": _TWO_OF_FOUR_LOCAL | {"head_dim": 8},
    "DeepseekV3": _TWO_OF_FOUR_ROUTED | _LATENT | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "Glm4Moe": _TWO_OF_FOUR_ROUTED | {"first_k_dense_replace": 0, "head_dim": 8},
    "GraniteMoe": _TWO_OF_FOUR_LOCAL,
    "Phimoe": _TWO_OF_FOUR_LOCAL,
    "MiniMax": _TWO_OF_FOUR_LOCAL | {"head_dim": 8},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "NemotronH": _TWO_OF_FOUR_ROUTED
    | {"layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 24, "head_dim": 8},
    "Llama4": _TWO_OF_FOUR_LOCAL | {"head_dim": 8, "intermediate_size_mlp": 48, "intermediate_size": 24},
    "AriaText": {"moe_num_experts": 4, "moe_topk": 2},
}
"""Name of a family to its options."""


def mixture(family: str, **options: Any) -> PreTrainedModel:
    config = "Llama4TextConfig" if family == "Llama4" else f"{family}Config"
    return build(f"{family}ForCausalLM", config, **_SIZES | FAMILIES[family] | options)


def words(count: int = EXAMPLES, seed: int = 0) -> Batch:
    """Random words without padding, which are their own labels."""
    ids = torch.randint(FIRST_WORD, VOCABULARY, (count, LENGTH), generator=generator(seed))
    return {"input_ids": ids, "labels": ids}
