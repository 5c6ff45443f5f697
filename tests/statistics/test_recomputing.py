"""Blocks that run again in the backward pass: the same statistics, beside fewer activations."""

import pytest
import torch
from support.processes import accelerator, loader_of
from support.tiny_models import TINY_MODELS, split_batch

from hf_lossless_lr.data import products
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.pipeline.activations import Results
from hf_lossless_lr.statistics import can_recompute, collect_statistics
from hf_lossless_lr.statistics.recomputing import recomputing

NAMES = ["llama", "gpt2", "t5", "bert-sequence-classification", "vit", "swin"]


def statistics_of(name, recompute, dtype=torch.float32):
    model, batch = TINY_MODELS[name](8)
    model.to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    calls = []
    targets = find_targets(model).chosen
    for layer in targets.values():
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    loader = loader_of(split_batch(batch, 4))
    return collect_statistics(model, targets, loader, accelerator(), recompute=recompute), len(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_the_same(name, dtype, monkeypatch):
    """Also on a processor without instructions for 16-bit products, whose products are others."""
    monkeypatch.setattr(products, "_is_quick", lambda dtype: dtype == torch.float32)
    kept, calls = statistics_of(name, recompute=False, dtype=dtype)
    found, more = statistics_of(name, recompute=True, dtype=dtype)
    assert more > 1.5 * calls  # nearly all layers ran twice
    assert (found.loss, found.examples, found.units, found.groups) == (
        kept.loss,
        kept.examples,
        kept.units,
        kept.groups,
    )
    for layer, statistics in kept.layers.items():
        assert found.layers[layer].tokens == statistics.tokens
        assert torch.equal(found.layers[layer].input_covariance, statistics.input_covariance), layer
        assert torch.equal(found.layers[layer].grad_covariance, statistics.grad_covariance), layer


def test_a_model_without_blocks_cannot():
    assert not can_recompute(TINY_MODELS["resnet"](1)[0])


def test_blocks_are_called_as_before_whatever_happens():
    model, _ = TINY_MODELS["llama"](1)
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), recomputing(model):
        raise KeyboardInterrupt
    assert [dict(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("name", ["llama", "bert-sequence-classification"])
def test_a_forward_pass_keeps_less(name):
    held = []
    for wanted in (False, True):
        model, batch = TINY_MODELS[name](8)
        with recomputing(model, wanted), Results(model) as results:
            loss = model(**batch).loss
            held.append(results.held())
            loss.backward()
    assert held[1] < 0.6 * held[0]
