"""Every weight of a model is a target or is listed, with the reason and its size."""

import warnings

import pytest
import torch
from support.tiny_models import TINY_MODELS, VOCABULARY, build
from torch import nn
from transformers import BertConfig, PreTrainedModel

from hf_lossless_lr.layers.coverage import other_weights
from hf_lossless_lr.layers.targets import find_targets

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


class OwnLinear(nn.Linear):
    """What a subclass computes is its own affair."""

    def forward(self, input):
        return super().forward(input).relu()


class Mixed(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.plain = nn.Linear(8, 8)
        self.own = OwnLinear(8, 6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.window = nn.Conv1d(8, 8, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))  # a vector, whatever its dimensions
        self.table = nn.Parameter(torch.zeros(1, 5, 8))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 6, 8))
        self.post_init()


def weight(model, name):
    modules = dict(model.named_modules())
    return modules[name].weight if name in modules else model.get_parameter(name)


def check_accounts_for_everything(model):
    targets = find_targets(model, ["Conv2d"] if "ResNet" in type(model).__name__ else None)
    others = other_weights(model, targets)
    listed = {id(weight(model, name)): weight(model, name) for name in others}
    assert sum(size for _, size in others.values()) == sum(p.numel() for p in listed.values())
    chosen = {id(module.weight) for module in targets.chosen.values()}
    matrices = {id(p) for p in model.parameters() if sum(size > 1 for size in p.shape) > 1}
    assert matrices - chosen <= set(listed)
    assert not chosen & set(listed)
    assert set(targets.skipped) <= set(others)
    return others


class Adapted(nn.Linear):
    """Computes what its base does for now."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.zeros(sizes))

    def forward(self, input):
        return super().forward(input) + input @ self.gain


def test_a_layer_with_parameters_of_its_own_stays_dense():
    model = Mixed(BertConfig())
    model.adapted = Adapted(8, 6)
    assert "adapted" in find_targets(model).skipped


@pytest.mark.parametrize("name", TINY_MODELS)
def test_targets_and_others_are_all_there_is(name):
    check_accounts_for_everything(TINY_MODELS[name]()[0])


def test_what_a_weight_is_computed_from_is_listed_as_that():
    model = Mixed(BertConfig())
    nn.utils.parametrizations.weight_norm(model.plain)
    others = check_accounts_for_everything(model)
    assert others["plain.parametrizations.weight.original1"] == ("a weight is computed from it", 64)


@pytest.mark.parametrize(
    ("norm", "originals"),
    [(nn.utils.weight_norm, ("weight_g", "weight_v")), (nn.utils.spectral_norm, ("weight_orig",))],
)
def test_what_a_hook_computes_a_weight_from_is_listed_as_that(norm, originals):
    model = Mixed(BertConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer norms are parametrizations
        norm(model.plain)
    others = check_accounts_for_everything(model)
    assert {others[f"plain.{name}"][0] for name in originals if f"plain.{name}" in others} == {
        "a weight is computed from it"
    }


def test_weights_of_other_kinds_are_listed_with_their_kind():
    others = check_accounts_for_everything(Mixed(BertConfig()))
    assert others == {
        "own": ("OwnLinear computes something else than its base type", 48),
        "attention.in_proj_weight": ("not supported: 2-D weight of MultiheadAttention", 192),
        "attention.out_proj": ("MultiheadAttention reads its weight instead of calling it", 64),
        "table": ("not supported: 3-D weight of Mixed", 40),
        "position_embeddings": ("embeddings", 48),
    }


@pytest.mark.parametrize(
    ("model", "config", "options", "name"),
    [
        (
            "MixtralForCausalLM",
            "MixtralConfig",
            {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 3},
            "model.layers.0.mlp.experts.gate_up_proj",
        ),
        (
            "XLNetForSequenceClassification",
            "XLNetConfig",
            {"d_model": 32, "n_head": 4, "n_layer": 1, "d_inner": 48},
            "transformer.layer.0.rel_attn.q",
        ),
    ],
)
def test_weights_of_known_architectures_are_listed(model, config, options, name):
    sizes = {} if "XLNet" in model else _SIZES
    others = check_accounts_for_everything(build(model, config, **(sizes | options)))
    assert others[name][0].startswith("not supported: ")


def test_a_shared_weight_counts_once():
    model = TINY_MODELS["bert-sequence-classification"]()[0]
    model.register_parameter("prototypes", model.bert.encoder.layer[0].output.dense.weight)
    others = check_accounts_for_everything(model)
    assert sorted([others["prototypes"], others["bert.encoder.layer.0.output.dense"]]) == [
        ("not supported: 2-D weight of BertForSequenceClassification", 32 * 48),
        ("tied", 0),
    ]
