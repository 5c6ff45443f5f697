"""JetMoe's experts, which get their rows in order, as linear layers: exactly the same function, and back."""

import pytest
import torch
from support.mixtures import words
from support.tiny_models import build
from support.tolerances import FLOAT32
from torch import nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

from hf_lossless_lr.layers import in_place, projections, unfuse
from hf_lossless_lr.layers.sorted_experts import UnfusedSortedExperts
from hf_lossless_lr.layers.unfusing import why_fused

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "kv_channels": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}


def experts(kind=JetMoeParallelExperts):
    module = kind(3, 8, 5)
    nn.init.normal_(module.weight)
    return module


def close(x, y):
    return float((x - y).abs().max()) <= FLOAT32 * float(y.abs().max())


def test_a_model_answers_and_learns_as_before():
    model, batch = build("JetMoeForCausalLM", "JetMoeConfig", **SIZES), words()
    found = unfuse(model)
    assert len(found) == 2 * 2 * 2  # two layers, each with experts of attention and of the MLP, of two projections
    expected = model(**batch)
    expected.loss.backward()
    gradients = {name: model.get_submodule(name).weight.grad.clone() for name in found}
    with in_place(model, found):
        unfused = model(**batch)
        unfused.loss.backward()
    assert close(unfused.logits.detach(), expected.logits.detach())
    for name, module in found.items():
        grads = [torch.zeros(()) if m.weight.grad is None else m.weight.grad for _, m in module.layers()]
        assert close(torch.stack(torch.broadcast_tensors(*grads)), gradients[name])


def test_fusing_gives_the_same_numbers_back():
    fused = experts()
    found = UnfusedSortedExperts(fused)
    assert found.get_submodule("1").weight.data_ptr() == fused.weight[1].data_ptr()
    found.own_weights()
    assert found.get_submodule("1").weight.data_ptr() != fused.weight[1].data_ptr()
    again = found.fused()
    assert type(again) is JetMoeParallelExperts
    assert list(again.state_dict()) == ["weight"]
    assert torch.equal(again.weight, fused.weight)
    assert found.state_dict()["weight"].shape == (2, 2, 2)  # no other reader takes it for the weight


@pytest.mark.parametrize("trains", [False, True])
def test_experts_without_rows_run_in_training_alone(trains):
    fused, sizes = experts(), [2, 0, 3]
    found, seen, rows = UnfusedSortedExperts(fused).train(trains), [], torch.randn(5, 8)
    for name, layer in found.layers():
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert torch.equal(found(rows, sizes), fused(rows, sizes))
    assert seen == (["0", "1", "2"] if trains else ["0", "2"])


def test_layers_beside_one_another_are_known():
    assert projections({"mlp": UnfusedSortedExperts(experts())}) == [("mlp.0", "mlp.1", "mlp.2")]


class Scaled(JetMoeParallelExperts):
    def forward(self, inputs, expert_size):
        return super().forward(2 * inputs, expert_size)


class Biased(JetMoeParallelExperts):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.bias = nn.Parameter(torch.ones(3, 5))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Scaled, "computes something else than its layers one by one"), (Biased, "has other parameters than a weight")],
)
def test_experts_of_another_kind_stay_fused_with_the_reason(kind, reason):
    assert reason in why_fused(experts(kind))
    assert unfuse(nn.ModuleDict({"experts": experts(kind)})) == {}
