"""Fused experts as linear layers of their own: exactly the same function, and back."""

import pytest
import torch
from support.mixtures import FAMILIES, mixture, words
from support.tolerances import BFLOAT16, FLOAT32
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_lossless_lr.errors import TargetError
from hf_lossless_lr.layers import UnfusedExperts, in_place, projections, replace_modules, routed_rows, unfuse
from hf_lossless_lr.layers.unfusing import why_fused

on_families = pytest.mark.parametrize("family", FAMILIES)


def close(x, y, tolerance):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).abs().max() / y.abs().max()) <= tolerance


def gradient(weight):
    """None where no row came to an expert on its own."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


@on_families
def test_a_model_with_unfused_experts_answers_and_learns_as_before(family):
    model, batch = mixture(family), words()
    experts = {name: module for name, module in unfuse(model).items() if isinstance(module, UnfusedExperts)}
    if not experts:
        pytest.skip("this version of Transformers keeps its experts in another form")
    assert {name.rpartition(".")[2] for name in experts} == {"experts"}
    expected = model(**batch)
    expected.loss.backward()
    fused = {name: model.get_submodule(name) for name in experts}
    gradients = {(name, key): p.grad.clone() for name, m in fused.items() for key, p in m.named_parameters()}
    with in_place(model, experts):
        found = model(**batch)
        found.loss.backward()
        assert close(found.logits, expected.logits, FLOAT32)
    assert all(model.get_submodule(name) is module for name, module in fused.items())
    for name, module in experts.items():
        for layer, parameter in module.names.items():
            grads = torch.stack([gradient(m.weight) for n, m in module.layers() if n.endswith(layer)])
            whole = gradients[name, parameter]
            assert close(grads.mT if module.transposed else grads, whole, 10 * FLOAT32)


@on_families
def test_fusing_gives_the_same_numbers_back(family):
    model = mixture(family)
    for name, module in unfuse(model).items():
        fused = model.get_submodule(name)
        module.own_weights()
        again = module.fused()
        assert type(again) is type(fused)
        assert list(again.state_dict()) == list(fused.state_dict())
        for key, tensor in fused.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor)
            assert again.state_dict()[key].is_contiguous()


def fused_experts(**options):
    torch.manual_seed(0)
    experts = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=3, **options))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def test_experts_one_by_one_round_in_bfloat16_as_fused_ones_do():
    """Of one layer: what is rounded otherwise may send a later row to another expert."""
    fused = fused_experts().to(torch.bfloat16)
    x, index, shares = torch.randn(6, 8).bfloat16(), torch.tensor([[0, 1], [1, 2]] * 3), torch.rand(6, 2).bfloat16()
    assert close(UnfusedExperts(fused)(x, index, shares), fused(x, index, shares), BFLOAT16)


def test_no_weight_is_copied_until_it_has_to_be():
    fused = fused_experts()
    unfused = UnfusedExperts(fused)
    assert unfused.get_submodule("2.in_proj").weight.data_ptr() == fused.gate_up_proj[2].data_ptr()
    unfused.own_weights()
    assert unfused.get_submodule("2.in_proj").weight.data_ptr() != fused.gate_up_proj[2].data_ptr()


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_shared_with_fused_ones_keeps_its_mode(inside):
    model = mixture("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.training = not inside
    experts.act_fn.train(inside)
    replacement = replace_modules(model, unfuse(model))
    found = model.model.layers[0].mlp.experts
    assert found is not experts
    assert (found.training, found.act_fn.training) == (not inside, inside)
    assert all(layer.training is not inside for _, layer in found.layers())
    again = found.fused()
    assert (again.training, again.act_fn.training) == (not inside, inside)
    replacement.undo()
    assert (experts.training, experts.act_fn.training) == (not inside, inside)


def test_a_row_may_be_sent_to_no_expert():
    """As Transformers has it where experts are spread over devices: by a number behind the last."""
    fused, x = fused_experts(), torch.randn(3, 8)
    index, shares = torch.tensor([[0, 1], [3, 3], [2, 3]]), torch.rand(3, 2)
    found = UnfusedExperts(fused)(x, index, shares)
    expected = fused(x[[0, 2]], torch.tensor([[0, 1], [2, 0]]), shares[[0, 2]] * torch.tensor([[1, 1], [1, 0]]))
    torch.testing.assert_close(found[[0, 2]], expected)
    assert not found[1].any()


@on_families
def test_in_training_all_experts_have_gradients(family):
    """Those of fused ones are 0 where an expert got no row; DistributedDataParallel waits for all."""
    model, batch = mixture(family), words()
    batch = {name: value[:1, :3] for name, value in batch.items()}
    experts = {name: module for name, module in unfuse(model).items() if isinstance(module, UnfusedExperts)}
    if not experts:
        pytest.skip("this version of Transformers keeps its experts in another form")
    with in_place(model, experts):
        model.train()(**batch).loss.backward()
    gradients = [layer.weight.grad for module in experts.values() for _, layer in module.layers()]
    assert not any(grad is None for grad in gradients)
    assert any(bool(grad.any()) for grad in gradients)
    assert not all(bool(grad.any()) for grad in gradients)


def test_it_is_known_which_rows_an_expert_got():
    unfused, seen = UnfusedExperts(fused_experts()).eval(), {}
    for name, layer in unfused.layers():
        layer.register_forward_hook(lambda *_, name=name: seen.update({name: routed_rows()}))
    unfused(torch.randn(4, 8), torch.tensor([[0], [2], [0], [0]]), torch.ones(4, 1))
    assert {routed.total for routed in seen.values()} == {4}
    seen = {name: routed.rows.tolist() for name, routed in seen.items()}
    assert seen == {"0.in_proj": [0, 2, 3], "0.out_proj": [0, 2, 3], "2.in_proj": [1], "2.out_proj": [1]}
    assert routed_rows() is None


def test_layers_beside_one_another_are_known():
    assert projections({"experts": UnfusedExperts(fused_experts())}) == [
        ("experts.0.in_proj", "experts.1.in_proj", "experts.2.in_proj"),
        ("experts.0.out_proj", "experts.1.out_proj", "experts.2.out_proj"),
    ]


class Scaled(MixtralExperts):
    """Experts that do something else with what they get."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(2 * hidden_states, top_k_index, top_k_weights)


class Biased(MixtralExperts):
    """Experts with a parameter that is none of the known ones."""

    def __init__(self, config):
        super().__init__(config)
        self.shift = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Scaled, "computes something else than its layers one by one"), (Biased, "other parameters than fused experts")],
)
def test_experts_of_another_kind_stay_fused_with_the_reason(kind, reason):
    experts = kind(MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=3))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    assert reason in why_fused(experts)
    assert unfuse(nn.ModuleDict({"experts": experts})) == {}


def test_experts_that_are_called_through_a_hook_stay_fused():
    experts = fused_experts()
    experts.forward = experts.forward
    assert "through a hook" in why_fused(experts)


def test_rows_in_blocks_that_are_zero_are_sent_to_no_expert():
    model, seen = mixture("Llama4"), {}
    name, unfused = next(iter(unfuse(model).items()))
    blocks = torch.randn(4, 3, 32) * torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])[..., None]
    for layer, module in unfused.layers():
        module.register_forward_hook(lambda *_, layer=layer: seen.update({layer: routed_rows().rows.tolist()}))
    found = unfused.eval()(blocks.flatten(0, 1))
    torch.testing.assert_close(found, model.get_submodule(name)(blocks.flatten(0, 1)))
    assert {layer: rows for layer, rows in seen.items() if "in" in layer} == {
        "0.in_proj": [0, 2],
        "2.in_proj": [1],
        "3.in_proj": [0, 1, 2],
    }


def test_other_modules_are_no_experts():
    with pytest.raises(TargetError, match="Linear has no fused experts"):
        UnfusedExperts(nn.Linear(2, 2))
