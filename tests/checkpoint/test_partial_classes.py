"""Classes that have a part of what was saved: a decoder, an encoder of pictures. They load it whole, or not at all."""

import functools
import inspect
import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.architectures import ARCHITECTURES
from support.compressions import check_same_state, factorized_layers
from support.tiny_models import TINY_MODELS, split_batch
from support.tolerances import FLOAT32
from torch import nn
from transformers import AutoModel, CLIPVisionModel, EncoderDecoderModel
from transformers.quantizers.auto import get_hf_quantizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.checkpoint import mark_compressed, record_of
from hf_lossless_lr.errors import CheckpointError
from hf_lossless_lr.layers import find_targets, layout_of, replace_modules, weight_matrices

RANK = 3
of_parts = pytest.mark.skipif(
    "get_text_config" not in inspect.getsource(get_hf_quantizer),
    reason="this Transformers reads no configuration of a part where that of the whole model says nothing",
)


def factorized(model):
    """Makes its targets pivots with random numbers, without a calibration."""
    layers = {name: m for name, m in find_targets(model).chosen.items() if min(weight_matrices(m).shape[1:]) > RANK}
    layers = {name: layout_of(layer).factorized(layer, RANK, "pivoted") for name, layer in layers.items()}
    for parameter in (p for layer in layers.values() for p in layer.parameters()):
        nn.init.normal_(parameter, std=0.2)
    paths = replace_modules(model, layers).originals
    records = {path: record_of(model.get_submodule(path)).to_dict() for path in paths}
    mark_compressed(model, LosslessLowRankConfig(modules=records))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives a compressed model, its checkpoint, and that of the dense model that it stands for."""

    @functools.cache
    def make(name):
        (row,) = (row for row in ARCHITECTURES if row.name == name)
        model = factorized(row.build(2)[0])
        folder = tmp_path_factory.mktemp(row.model)
        model.save_pretrained(folder / "compressed")
        deepcopy(model).dequantize().save_pretrained(folder / "dense")
        return SimpleNamespace(model=model, compressed=folder / "compressed", dense=folder / "dense")

    return make


LOADED = {
    "WhisperForConditionalGeneration": ["WhisperForCausalLM", "WhisperForAudioClassification", "AutoModel"],
    "T5ForConditionalGeneration": ["T5EncoderModel", "T5ForSequenceClassification"],
    "BartForConditionalGeneration": ["BartForCausalLM"],
    "BertForSequenceClassification": ["BertForTokenClassification", "BertLMHeadModel"],
    "CLIPModel (by its representations)": [
        *("CLIPVisionModel", "CLIPTextModel"),
        *("CLIPVisionModelWithProjection", "CLIPTextModelWithProjection"),
    ],
    "CLIPForImageClassification": ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"],
    "SiglipForImageClassification": ["SiglipVisionModel"],
    "LlavaForConditionalGeneration": ["AutoModel"],
    "BlipForConditionalGeneration": ["BlipForQuestionAnswering"],
}
REFUSED = {
    "LlavaForConditionalGeneration": ["LlamaModel", "LlamaForCausalLM", "CLIPVisionModel"],
    "BlipForConditionalGeneration": ["BlipVisionModel"],
}


def pairs(table):
    return [(name, model_class) for name, classes in table.items() for model_class in classes]


@pytest.mark.parametrize(("name", "model_class"), pairs(LOADED))
def test_have_the_weights_that_the_dense_checkpoint_gives_them(name, model_class, saved, tmp_path):
    whole, model_class = saved(name), getattr(transformers, model_class)
    dense, expected = model_class.from_pretrained(whole.dense, output_loading_info=True)
    part, info = model_class.from_pretrained(whole.compressed, output_loading_info=True)
    assert factorized_layers(part)
    assert info["missing_keys"] == expected["missing_keys"]  # heads of its own, as stock Transformers says, too
    part.save_pretrained(tmp_path)
    check_same_state(part.state_dict(), type(part).from_pretrained(tmp_path).state_dict())
    again = part.dequantize().state_dict()
    for key, tensor in dense.state_dict().items():
        if key not in info["missing_keys"]:
            torch.testing.assert_close(again[key], tensor, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("part", ["Vision", "Text"])
def test_of_a_part_load_from_where_it_was_saved_alone(part, saved, tmp_path):
    """Transformers takes the prefix off the names of one class, and not off those of the other."""
    whole = saved("CLIPModel (by its representations)")
    larger, smaller = (getattr(transformers, f"CLIP{part}Model{end}") for end in ("WithProjection", ""))
    larger.from_pretrained(whole.compressed).save_pretrained(tmp_path / "larger")
    for model_class in (smaller, AutoModel):
        model = model_class.from_pretrained(tmp_path / "larger")
        assert type(model) is smaller
        assert set(model.config.quantization_config.modules) == set(factorized_layers(model))
        check_same_state(model.state_dict(), smaller.from_pretrained(whole.compressed).state_dict())


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXTS = {**SIZES, "vocab_size": 60, "max_position_embeddings": 20}
PICTURES = {**SIZES, "image_size": 16, "patch_size": 4}
SOUNDS = {"spec_size": 16, "num_mel_bins": 8, "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 2}
SOUNDS |= {"hidden_size": 32, "patch_embeds_hidden_size": 16, "patch_size": 2, "patch_stride": [2, 2]}
NAMED_BY_THEIR_WHOLE = {
    "Clap": ({"text_config": TEXTS, "audio_config": SOUNDS}, "Model", "AudioModelWithProjection"),
    "OwlViT": ({"text_config": TEXTS, "vision_config": PICTURES}, "ForObjectDetection", "VisionModel"),
}


@pytest.mark.parametrize("name", NAMED_BY_THEIR_WHOLE)
def test_that_name_their_part_as_the_whole_does_load_it(name, tmp_path):
    sizes, whole, part = NAMED_BY_THEIR_WHOLE[name]
    model = factorized(getattr(transformers, f"{name}{whole}")(getattr(transformers, f"{name}Config")(**sizes)))
    model.save_pretrained(tmp_path / "whole")
    part = getattr(transformers, f"{name}{part}").from_pretrained(tmp_path / "whole")
    assert factorized_layers(part)
    found = {key.removeprefix("owlvit."): tensor for key, tensor in model.state_dict().items()}
    check_same_state(part.state_dict(), {key: found[key] for key in part.state_dict()})
    part.save_pretrained(tmp_path / "part")
    check_same_state(part.state_dict(), type(part).from_pretrained(tmp_path / "part").state_dict())


@pytest.mark.parametrize(("name", "model_class"), pairs(REFUSED))
def test_that_stock_transformers_does_not_find_in_the_files_are_refused(name, model_class, saved):
    """They would get random numbers: their tensors have other names there."""
    with pytest.raises(CheckpointError, match=r"under other names.* Load the class that was saved, which the config"):
        getattr(transformers, model_class).from_pretrained(saved(name).compressed)


def test_are_taken_from_the_whole_model_and_saved_on_their_own(saved, tmp_path):
    tower = AutoModel.from_pretrained(saved("LlavaForConditionalGeneration").compressed).vision_tower
    tower.save_pretrained(tmp_path)
    again = CLIPVisionModel.from_pretrained(tmp_path)
    assert factorized_layers(again)
    check_same_state(tower.state_dict(), again.state_dict())
    again.save_pretrained(tmp_path / "again")
    assert "part" not in json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]


def test_lists_nothing_once_the_whole_model_is_dense(saved):
    whole = saved("LlavaForConditionalGeneration")
    assert "quantization_config" in json.loads((whole.compressed / "config.json").read_text())["vision_config"]
    assert "quantization_config" not in (whole.dense / "config.json").read_text()


@of_parts
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_model_that_is_made_of_compressed_ones_loads(saved, tmp_path):
    """Its configuration says nothing of them, only those of its parts do."""
    folder = saved("BertForSequenceClassification").compressed
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(folder, folder).eval()
    layers = factorized_layers(model)
    assert {name.partition(".")[0] for name in layers} == {"encoder", "decoder"}
    for again in ("once", "twice"):
        model.save_pretrained(tmp_path / again)
        other, info = EncoderDecoderModel.from_pretrained(tmp_path / again, output_loading_info=True)
        assert not any(info.values())
        assert factorized_layers(other).keys() == layers.keys()
        check_same_state(other.state_dict(), model.state_dict())
        model = other
    written = json.loads((tmp_path / "twice" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert set(written["modules"]) == set(layers)


@of_parts
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(("keep_ratio", "factors"), [(0.15, True), (0.6, False)])
def test_so_does_one_that_is_made_of_rounded_ones(keep_ratio, factors, tmp_path):
    """Its class saves plain numbers, whatever the configurations of its parts say of their format."""
    part, batch = TINY_MODELS["bert-masked-lm"](16)
    options = {"formats": ["int8"], "embeddings": "int8", "keep_ratio": keep_ratio, "size": "bytes", "refit": False}
    LowRankCompressor(LosslessLowRankConfig(**options)).compress(part, split_batch(batch, 4))
    part.save_pretrained(tmp_path / "part")
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "part", tmp_path / "part").eval()
    for again in ("once", "twice"):
        model.save_pretrained(tmp_path / again)
        other, info = EncoderDecoderModel.from_pretrained(tmp_path / again, output_loading_info=True)
        assert not any(info.values())
        assert bool(factorized_layers(other)) is factors
        check_same_state(other.state_dict(), model.state_dict())
        model = other
    written = (tmp_path / "twice" / "config.json").read_text(encoding="utf-8")
    assert ("quantization_config" in written) is factors
    assert '"format":' not in written
