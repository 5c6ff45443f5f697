"""A manifest says what is compressed in a model when it is saved, whatever was done to its modules before."""

import pytest
import torch
from support.compressions import build, check_same_model, compress
from torch import nn

from hf_lossless_lr.layers import grids_in, to_dense

OPTIONS = {"float": {"keep_ratio": 0.6}, "int8": {"formats": ["int8"], "embeddings": "int8", "keep_ratio": 0.2}}
QUERY = "bert.encoder.layer.0.attention.self.query"


def fewer_blocks(model):
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    model.config.num_hidden_layers = 1


def the_last_block_alone(model):
    model.bert.encoder.layer = model.bert.encoder.layer[1:]
    model.config.num_hidden_layers = 1


def another_layer(model):
    old = model.get_submodule(QUERY)
    model.set_submodule(QUERY, nn.Linear(old.in_features, old.out_features))


def a_dense_layer(model):
    model.set_submodule(QUERY, to_dense(model.get_submodule(QUERY)))


def another_table(model):
    model.set_input_embeddings(nn.Embedding(*model.get_input_embeddings().weight.shape))


CHANGES = [fewer_blocks, the_last_block_alone, another_layer, a_dense_layer, another_table]


@pytest.mark.parametrize("form", OPTIONS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("loaded", [False, True], ids=["in memory", "loaded"])
def test_a_changed_model_is_saved_as_it_is(form, change, loaded, tmp_path):
    model, batch = build("bert-sequence-classification")
    model, _ = compress(model, batch, **OPTIONS[form])
    if loaded:
        model.save_pretrained(tmp_path / "before")
        model = type(model).from_pretrained(tmp_path / "before")
    change(model)
    model.eval().save_pretrained(tmp_path / "after")
    other, info = type(model).from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not any(info.values()), info
    check_same_model(model, other.eval(), batch)
    assert grids_in(other).keys() == grids_in(model).keys()
    assert other.config.quantization_config.modules == model.config.quantization_config.modules


def test_a_model_without_compressed_layers_is_saved_as_a_dense_one(tmp_path):
    model, batch = build("bert-sequence-classification")
    model, _ = compress(model, batch, target_modules=["query"], keep_ratio=0.6)
    for name in list(model.config.quantization_config.modules):
        model.set_submodule(name, to_dense(model.get_submodule(name)))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    other = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, model(**batch).logits)
