"""Layers between which attention takes means of values, found by what a model does and not by names."""

import pytest
import torch
from support.architecture_page import EXAMPLES, halves
from support.architectures import ARCHITECTURES
from support.compressions import BATCH_SIZE, build
from support.tiny_models import split_batch
from torch import nn

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor


def pairs_of(model, batch):
    compressor = LowRankCompressor(LosslessLowRankConfig(forms=["channel", "dimensions"], refit=False))
    compressor.calibrate(model, split_batch(batch, BATCH_SIZE))
    found = compressor._calibration.pairs
    compressor.release()
    assert all(found[pair.values] is found[pair.output] for pair in found.values())
    return {pair.output: pair for pair in found.values()}


@pytest.mark.parametrize(
    ("name", "values", "output", "heads", "count"),
    [
        ("bert-sequence-classification", "self.value", "output.dense", (4, 4), 2),
        ("distilbert", "v_lin", "out_lin", (4, 4), 2),
        ("llama", "v_proj", "o_proj", (4, 2), 2),
        ("t5", "Attention.v", "Attention.o", (4, 4), 6),  # the decoder's, and between it and the encoder
        ("vit", "v_proj", "o_proj", (4, 4), 2),
        ("swin", "v_proj", "o_proj", None, 4),  # windows; more heads in the second stage
    ],
)
def test_are_found(name, values, output, heads, count):
    model, batch = build(name)
    found = pairs_of(model, batch)
    assert len(found) == count
    for pair in found.values():
        assert pair.values.endswith(values)
        assert pair.output.endswith(output)
        assert heads is None or pair.heads == heads


@pytest.mark.parametrize("name", ["gpt2", "albert", "resnet"])  # one layer for q, k, v; one for all blocks; none
def test_are_none_where_there_is_no_layer_of_values(name):
    assert not pairs_of(*build(name))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("SwitchTransformersForConditionalGeneration", 6),  # what is tried sends other rows to the experts
        ("BertModel", 2),  # it has representations alone
    ],
)
def test_are_found_in_models_of_experts_and_without_heads(name, count):
    row = next(row for row in ARCHITECTURES if row.name.startswith(name))
    model, batch = row.build(EXAMPLES)
    compressor = LowRankCompressor(
        LosslessLowRankConfig(forms=["channel", "dimensions"], refit=False, labels=row.labels)
    )
    compressor.calibrate(model, halves(batch))
    found = set(compressor._calibration.pairs.values())
    compressor.release()
    assert len(found) == count


def changed_values(kind):
    """BERT whose values are changed on their way, or read elsewhere, too."""
    model, batch = build("bert-sequence-classification")
    attention = model.bert.encoder.layer[0].attention

    def normalize(module, args, y):
        return nn.functional.layer_norm(y, y.shape[-1:])

    def leak(module, args, y):
        model.leaked = y

    def add(module, args, y):
        return (y[0] + model.leaked.mean(), *y[1:]) if isinstance(y, tuple) else y + model.leaked.mean()

    if kind == "normalized":
        attention.self.value.register_forward_hook(normalize)
    else:
        attention.self.value.register_forward_hook(leak)
        model.bert.encoder.layer[0].register_forward_hook(add)
    return model, batch


@pytest.mark.parametrize("kind", ["normalized", "read elsewhere"])
def test_are_none_where_values_are_changed_or_read_elsewhere(kind):
    found = pairs_of(*changed_values(kind))
    assert "bert.encoder.layer.0.attention.output.dense" not in found


def test_finding_them_leaves_the_model_and_the_random_state():
    model, batch = build("llama")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    pairs_of(model, batch)
    assert torch.equal(torch.rand(1), first)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
