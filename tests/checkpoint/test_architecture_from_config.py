"""A model that is built from the configuration of a compressed checkpoint, rather than loaded."""

import json

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from support.compressions import (
    answers,
    build,
    check_same_answers,
    check_same_model,
    check_same_state,
    compressed,
    factorized_layers,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_lossless_lr import compressed_architecture
from hf_lossless_lr.errors import CheckpointError, TargetError

AUTO = {"llama": AutoModelForCausalLM, "bert-sequence-classification": AutoModelForSequenceClassification}


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.filterwarnings("ignore:Current model requires .* bytes of buffer:UserWarning")
def test_is_loaded_and_dispatched_by_accelerate(name, tmp_path):
    model, batch = compressed(name)
    model.save_pretrained(tmp_path / "model")
    with init_empty_weights():
        empty = AUTO[name].from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    empty = compressed_architecture(empty)
    empty.tie_weights()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    again = load_checkpoint_and_dispatch(
        empty,
        str(tmp_path / "model"),
        device_map="sequential",
        max_memory={"cpu": size, "disk": 10**9},
        no_split_module_classes=list(empty._no_split_modules),
        offload_folder=str(tmp_path / "disk"),
        offload_buffers=True,
    ).eval()
    assert factorized_layers(again).keys() == factorized_layers(model).keys()
    assert "disk" in again.hf_device_map.values()
    inside = tuple(f"{layer}." for layer in factorized_layers(again))
    assert not [place for place in again.hf_device_map if place.startswith(inside)]
    check_same_answers(model, again, batch)


def test_is_dense_before_and_has_new_numbers_after(tmp_path):
    model, batch = compressed("llama")
    model.save_pretrained(tmp_path / "model")
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    assert not factorized_layers(other)
    layers = factorized_layers(compressed_architecture(other.eval()))
    assert {name: layer.rank for name, layer in layers.items()} == {
        name: layer.rank for name, layer in factorized_layers(model).items()
    }
    assert torch.isfinite(answers(other, batch)["logits"]).all()
    other.save_pretrained(tmp_path / "other")
    check_same_model(other, AutoModelForCausalLM.from_pretrained(tmp_path / "other").eval(), batch)
    assert not factorized_layers(other.dequantize())


def test_saved_as_it_is_the_checkpoint_is_refused_with_what_to_do(tmp_path):
    compressed("llama")[0].save_pretrained(tmp_path / "model")
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"the weight of a dense .*from_config .*Take quantization_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["quantization_config"]
    file.write_text(json.dumps(config), encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    check_same_state(again.state_dict(), other.state_dict())


def test_of_a_dense_checkpoint_is_refused():
    with pytest.raises(TargetError, match="not that of a compressed checkpoint: it has no quantization_config"):
        compressed_architecture(build("llama")[0])


def test_with_rounded_weights_is_refused(tmp_path):
    compressed("llama", formats=["int8"])[0].save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(CheckpointError, match="'int8', which only from_pretrained reads"):
        compressed_architecture(dense)
    assert not factorized_layers(dense)
