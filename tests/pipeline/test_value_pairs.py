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


def in_dtype(dtype, model, batch):
    return model.to(dtype), {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_are_found(name, values, output, heads, count, dtype):
    model, batch = in_dtype(dtype, *build(name))
    found = pairs_of(model, batch)
    assert len(found) == count
    for pair in found.values():
        assert pair.values.endswith(values)
        assert pair.output.endswith(output)
        assert heads is None or pair.heads == heads or (name, dtype) == ("t5", torch.bfloat16)  # even means


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


KINDS = ["as they are", "normalized", "gated", "read elsewhere", "read by the next block"]


class Means(nn.Module):
    """Attention that looks at all tokens alike; values may be changed on their way, or kept for others to read."""

    def __init__(self, old, kind, read=None):
        super().__init__()
        self.value, self.kind, self.kept, self.read = old.value, kind, None, read
        self.num_attention_heads = old.num_attention_heads
        gates = 0.02 * torch.rand(old.value.out_features, generator=torch.Generator().manual_seed(0))
        self.register_buffer("gates", 0.5 + gates)  # nearly the same for all

    def forward(self, hidden_states, *args, **kwargs):
        values = self.kept = self.value(hidden_states)
        if self.read is not None:
            values = values + self.read()
        contexts = values.cumsum(1) / len(values[0])
        if self.kind == "normalized":
            contexts = nn.functional.layer_norm(contexts, contexts.shape[-1:])
        return contexts * self.gates if self.kind == "gated" else contexts, None


def changed_values(kind):
    """BERT with such attention in its first block."""
    model, batch = build("bert-sequence-classification")
    block = model.bert.encoder.layer[0]
    means = block.attention.self = Means(block.attention.self, kind)
    if kind == "read by the next block":
        attention = model.bert.encoder.layer[1].attention
        attention.self = Means(attention.self, kind, lambda: means.kept)

    def add(module, args, y):
        return (y[0] + means.kept, *y[1:]) if isinstance(y, tuple) else y + means.kept

    if kind == "read elsewhere":
        block.register_forward_hook(add)
    return model, batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_are_none_where_values_are_changed_or_read_elsewhere(kind, dtype):
    found = pairs_of(*in_dtype(dtype, *changed_values(kind)))
    assert ("bert.encoder.layer.0.attention.output.dense" in found) == (kind == "as they are")


def test_are_none_where_other_examples_may_take_values_from_a_layer_that_was_not_called():
    """LED's encoder has values of their own for tokens that see all others."""
    model, batch = next(row for row in ARCHITECTURES if row.name.startswith("LEDFor")).build(EXAMPLES)
    found = pairs_of(model, batch)
    assert found
    assert all(output.startswith("led.decoder.") for output in found)


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
