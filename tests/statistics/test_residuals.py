"""Residual connections are found by what the modules of a model hand to one another."""

import pytest
import torch
from support.tiny_models import TINY_MODELS, llama, split_batch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.statistics import find_residuals
from hf_lossless_lr.statistics.residuals import first_tensor

POST = "bert.encoder.layer.1."
FOUND = {  # all that are found; one of them, and where its other summand is seen
    "bert-sequence-classification": (4, POST + "output.dense", POST + "intermediate.dense"),
    "llama": (4, "model.layers.1.mlp.down_proj", "model.layers.1.post_attention_layernorm"),
    "gpt2": (4, "transformer.h.1.attn.c_proj", "transformer.h.1.ln_1"),
    "t5": (10, "decoder.block.1.layer.1.EncDecAttention.o", "decoder.block.1.layer.1.layer_norm"),
    "vit": (4, "vit.layers.0.mlp.fc2", "vit.layers.0.layernorm_after"),
    "swin": (6, "swin.encoder.layers.0.blocks.1.mlp.fc2", "swin.encoder.layers.0.blocks.1.layernorm_after"),
}


def found(model, batch, layers=None):
    return find_residuals(model, find_targets(model).chosen if layers is None else layers, split_batch(batch, 1)[0])


@pytest.mark.parametrize("name", FOUND)
def test_are_found_in_every_kind_of_block(name):
    number, layer, module = FOUND[name]
    residuals = found(*TINY_MODELS[name](2))
    assert len(residuals) == number
    assert residuals[layer] == (module, False)


def test_are_found_for_outputs_of_so_many_rows_alone():
    model, batch = TINY_MODELS["t5"](2)
    one = split_batch(batch, 1)[0]
    rows = one["labels"].numel()
    assert rows != one["input_ids"].numel()
    found = find_residuals(model, find_targets(model).chosen, one, rows)
    assert {layer.partition(".")[0] for layer in found} == {"decoder"}


def test_are_found_where_a_model_changes_the_shape_in_between():
    config = OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    config.word_embed_proj_dim = 32
    batch = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    model = OPTForCausalLM(config).eval()
    layers = [f"model.decoder.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.out_proj", "fc2")]
    assert set(find_residuals(model, find_targets(model).chosen, batch)) == set(layers)


@pytest.mark.parametrize("name", ["albert", "resnet"])
def test_of_layers_that_are_called_several_times_or_normalized_first_are_none(name):
    assert found(*TINY_MODELS[name](2)) == {}


class Block(nn.Module):
    """Stands for a layer of Llama; what it adds to its input, and how, is to be found out."""

    def __init__(self, size, how):
        super().__init__()
        self.project, self.norm, self.how = nn.Linear(size, size), nn.LayerNorm(size), how
        self.nothing = nn.Threshold(1e9, 0.0)  # zeros, which can be added to anything

    def forward(self, hidden_states, **_):
        self.nothing(hidden_states)
        return self.how(self.project(self.norm(hidden_states)), hidden_states)


def in_place(y, r):
    y += r
    return y


HOW = {
    "sum": (lambda y, r: r + y, True),
    "in place": (in_place, True),
    "scaled": (lambda y, r: r + 0.5 * y, False),
    "alone": (lambda y, r: y, False),
    "zeros": (lambda y, r: y + 0 * r, False),
    "summand scaled": (lambda y, r: y + 2 * r, False),
}


@pytest.mark.parametrize("how", HOW)
def test_are_plain_sums_also_in_place(how):
    model, batch = llama(2)
    compute, expected = HOW[how]
    block = Block(model.config.hidden_size, compute)
    model.model.layers[0] = block
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = {"model.layers.0.project": block.project}
    assert found(model, batch, layers) == (
        {"model.layers.0.project": ("model.layers.0.norm", False)} if expected else {}
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_first_tensor_of_what_is_handed_over():
    x, ids = torch.ones(2), torch.ones(2, dtype=torch.int64)
    assert first_tensor((None, (ids, x), torch.zeros(1))) is x
    assert first_tensor(x) is x
    assert first_tensor((ids, {"x": x})) is None
