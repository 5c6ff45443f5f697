"""Classes that have a part of what was saved: a decoder, an encoder of pictures. They load it whole, or not at all."""

import functools
import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.architectures import ARCHITECTURES
from support.compressions import check_same_state, factorized_layers
from support.tiny_models import split_batch
from support.tolerances import FLOAT32
from transformers import AutoModel, CLIPVisionModel

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives a compressed model, its checkpoint, and that of the dense model that it stands for."""

    @functools.cache
    def make(name):
        (row,) = (row for row in ARCHITECTURES if row.name == name)
        model, batch = row.build(8)
        config = LosslessLowRankConfig(keep_ratio=0.6, rank_multiple=1, refit=False)
        LowRankCompressor(config).compress(model, split_batch(batch, 4), eval_dataset=[row.build(8, seed=7)[1]])
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
