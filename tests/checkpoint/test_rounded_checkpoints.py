"""Rounded checkpoints of models that are not quite as usual: tables that scale, heads of their own, parts alone."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compressions import auto_class, build, check_same_answers, check_same_state, compress, folder_content
from support.tiny_models import VOCABULARY, generator, llama, text_inputs
from support.tiny_models import build as build_by_names

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.layers import grids_in, stored_in

INT8 = {"formats": ["int8"], "embeddings": "int8", "keep_ratio": 0.2}
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1}
SMALL = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SEVERAL = {**SIZES, **SMALL, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "eos_token_id": 2}
TABLES = {  # classes of Transformers whose tables are no plain embeddings: sizes, those that are saved
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        {
            **SIZES,
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 2, "sliding_window": 16},
        },
        {"model.embed_tokens"},
    ),
    "BartForConditionalGeneration": (
        "BartConfig",
        {**SEVERAL, "scale_embedding": True},
        {"model.shared", "model.encoder.embed_positions", "model.decoder.embed_positions"},
    ),
    "MarianMTModel": (
        "MarianConfig",
        {**SEVERAL, "decoder_start_token_id": 0},
        {"model.shared"},
    ),  # sines are not saved
    "OPTForCausalLM": (
        "OPTConfig",
        {**SIZES, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"model.decoder.embed_tokens", "model.decoder.embed_positions"},
    ),
}


def text():
    return {**text_inputs(), "labels": text_inputs()["input_ids"]}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", TABLES)
def test_tables_that_scale_or_shift_are_rounded_and_load_as_they_were(name, tmp_path):
    config, sizes, tables = TABLES[name]
    model = build_by_names(name, config, **sizes)
    model, report = compress(model, llama(12)[1], embeddings="int8", keep_ratio=0.8)
    model.eval()
    assert tables <= set(grids_in(model))
    assert {table for table in tables if report.skipped[table].format == "int8"} == tables
    assert report.compressed.bytes < 0.85 * report.dense.bytes
    model.save_pretrained(tmp_path / "first")
    loaded, info = type(model).from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values())
    check_same_state(model.state_dict(), loaded.state_dict())
    check_same_answers(model, loaded.eval(), text())
    loaded.save_pretrained(tmp_path / "second")
    assert folder_content(tmp_path / "first") == folder_content(tmp_path / "second")
    stored = (
        type(model)
        .from_pretrained(tmp_path / "first", quantization_config=LosslessLowRankConfig(compute="stored"))
        .eval()
    )
    assert name != "OPTForCausalLM" or stored_in(stored)
    check_same_answers(model, stored, text(), 1e-4)


@pytest.mark.parametrize("options", [{"embeddings": "int8"}, {"formats": ["int8"], "keep_ratio": 0.25}, INT8, {}])
def test_an_output_layer_that_the_file_has_apart_stays_apart(options, tmp_path):
    """T5's configuration ties it; checkpoints of later T5s have one of its own, beside the table."""
    model, batch = build("t5")
    model.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    own = torch.randn(tensors["shared.weight"].shape, generator=generator(0))
    save_file({**tensors, "lm_head.weight": own}, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    model = type(model).from_pretrained(tmp_path / "dense").eval()
    compress(model, batch, **options)
    assert model.lm_head.weight is not model.shared.weight
    model.eval().save_pretrained(tmp_path / "compressed")
    loaded = type(model).from_pretrained(tmp_path / "compressed").eval()
    check_same_state(model.state_dict(), loaded.state_dict())
    check_same_answers(model, loaded, batch)


@pytest.mark.parametrize(
    ("name", "part"), [("bert-sequence-classification", "bert"), ("llama", "model"), ("gpt2", "transformer")]
)
def test_a_part_is_saved_on_its_own_and_loads_as_it_was(name, part, tmp_path):
    model, batch = build(name)
    compress(model, batch, **INT8)
    inner = getattr(model, part)
    inner.save_pretrained(tmp_path / "part")
    loaded = type(inner).from_pretrained(tmp_path / "part")
    check_same_state(inner.state_dict(), loaded.state_dict())
    model.save_pretrained(tmp_path / "whole")  # and the whole as before
    check_same_state(model.state_dict(), auto_class(name).from_pretrained(tmp_path / "whole").state_dict())
    model.dequantize()
    inner.save_pretrained(tmp_path / "dense")
    assert "codes" not in " ".join(load_file(tmp_path / "dense" / "model.safetensors"))
