"""Products of 16-bit numbers in float32: the values and gradients of float32, rounded; what is kept stays narrow."""

import pytest
import torch
from support.processes import accelerator, loader_of
from support.tiny_models import TINY_MODELS, split_batch
from torch import nn
from torch.nn import functional as F

from hf_lossless_lr.data import PaddingMasks, products, run_batch
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.statistics import collect_statistics, paired_streams

NARROW = [torch.bfloat16, torch.float16]
OPERATIONS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(3, 5, 8), (6, 8), (6,)]),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), [(6,), (5, 8), (8, 6)]),
    "matmul": (lambda x, y: x @ y, [(2, 5, 8), (2, 8, 6)]),
    "convolution": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), [(2, 4, 9, 9), (6, 4, 3, 3)]),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5),
        [(2, 3, 7, 4), (2, 3, 7, 4), (2, 3, 7, 4)],
    ),
}


@pytest.fixture
def without_instructions(monkeypatch):
    """As a processor that has none for 16-bit products."""
    monkeypatch.setattr(products, "_is_quick", lambda dtype: dtype not in products.SUPPORT)


def model_of(dtype):
    return nn.Linear(2, 2).to(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_those_of_float32_rounded_once(name, dtype, without_instructions):
    operation, shapes = OPERATIONS[name]
    narrow = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    with products.quick_products(model_of(dtype)):
        found = operation(*narrow)
        grad = torch.randn(found.shape).to(dtype)
        gradients = torch.autograd.grad(found, narrow, grad)
    expected = operation(*wide)
    assert torch.equal(found, expected.to(dtype))
    for one, other in zip(gradients, torch.autograd.grad(expected, wide, grad.float()), strict=True):
        assert torch.equal(one, other.to(dtype))


def test_what_waits_for_the_backward_pass_is_as_narrow_as_the_inputs(without_instructions):
    x, w = torch.randn(4, 8, requires_grad=True).bfloat16(), torch.randn(6, 8).bfloat16()
    kept = []
    with (
        products.quick_products(model_of(torch.bfloat16)),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t),
    ):
        found = F.linear(x, w)
    found.sum().backward()
    assert set(kept) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_numbers_are_left_alone(dtype, without_instructions):
    with products.quick_products(model_of(dtype)):
        assert F.linear(torch.ones(1, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype)).dtype == dtype
    assert not isinstance(products.quick_products(model_of(dtype)), products._InFloat32)


@pytest.mark.parametrize("name", ["bert-sequence-classification", "gpt2", "llama"])
def test_statistics_are_as_near_to_those_in_float32_as_with_the_processors_own(name, monkeypatch):
    def statistics(dtype, quick):
        model, batch = TINY_MODELS[name](8)
        monkeypatch.setattr(products, "_is_quick", lambda _: quick)
        targets = find_targets(model).chosen
        return collect_statistics(model.to(dtype), targets, loader_of(split_batch(batch, 4)), accelerator())

    exact = statistics(torch.float32, True)
    own, found = (statistics(torch.bfloat16, quick) for quick in (True, False))

    def error(one):
        return sum(
            float((one.layers[key].grad_covariance - stats.grad_covariance).norm() / stats.grad_covariance.norm())
            for key, stats in exact.layers.items()
        )

    assert error(found) <= 1.5 * error(own) + 1e-6
    assert found.loss == pytest.approx(own.loss, rel=0.02)


@pytest.mark.parametrize("quick", [True, False])
def test_a_batch_takes_them_unless_the_model_itself_is_what_is_measured(quick, monkeypatch, without_instructions):
    model, batch = TINY_MODELS["llama"](4)
    model, apply, taken = model.bfloat16(), products._Product.apply, []
    monkeypatch.setattr(products._Product, "apply", lambda *given: taken.append(given[0]) or apply(*given))
    run_batch(model, batch, quick=quick)
    assert bool(taken) == quick


def test_streams_that_wait_together_take_them_once(monkeypatch, without_instructions):
    model, batch = TINY_MODELS["llama"](4)
    model, entered = model.bfloat16(), []
    enter = products._InFloat32.__enter__
    monkeypatch.setattr(products._InFloat32, "__enter__", lambda self: entered.append(self) or enter(self))
    with paired_streams(model, split_batch(batch, 1), PaddingMasks(model)) as (dense, compressed):
        for stream in dense + compressed:
            stream.switch()
    assert len(entered) == 1
    assert torch._C._len_torch_function_stack() == 0
