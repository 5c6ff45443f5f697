"""An adapter of the dense model merged into the compressed one: the sum of both, in factors where that is smaller."""

import copy
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from support.compressions import build, check_same_model, check_same_state, compress, factorized_layers
from support.tolerances import ROUNDING
from torch import nn
from transformers import RegNetConfig, RegNetForImageClassification

from hf_lossless_lr import merge_dense_adapter
from hf_lossless_lr.checkpoint.merging import _like
from hf_lossless_lr.errors import TargetError
from hf_lossless_lr.layers.layout import to_dense

BERT = "bert-sequence-classification"
QUERY = "bert.encoder.layer.0.attention.self.query"
CASES = {  # where layers differ: model, options of the compression, of the adapter
    "pivots": (BERT, {"storage": "pivoted"}, {"target_modules": "all-linear", "use_rslora": True}),
    "two factors": (
        *(BERT, {"storage": "two-factor"}),
        {"target_modules": ["query", "dense"], "rank_pattern": {"query": 1}, "alpha_pattern": {"query": 7}},
    ),
    "shared": ("albert", {}, {"target_modules": ["query", "ffn"]}),
    "transposed": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "some layers dense": (
        *("llama", {"target_modules": ["q_proj", "down_proj"]}),
        {"target_modules": ["q_proj", "k_proj", "down_proj"], "layers_to_transform": [1]},
    ),
    "a table": (BERT, {}, {"target_modules": ["query", "word_embeddings"]}),
    "convolutions": ("resnet", {"forms": ["channel"]}, {"target_modules": ["convolution"]}),
    "spatial convolutions": ("resnet", {"forms": ["channel", "spatial"]}, {"target_modules": ["convolution"]}),
}


def adapter_of(model, folder, **options):
    """Saves a random adapter of a model, and returns its changes of weights, by the name of the layer."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": False} | options))
    adapted.save_pretrained(folder)
    inner = adapted.base_model.model
    layers = {name: m for name, m in inner.named_modules() if hasattr(m, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def dense(layer):
    return to_dense(layer) if hasattr(layer, "rank") else layer


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """A compressed model in float64, its batch, and the changes of an adapter of the dense one, in its folder."""
    name, options, adapter = CASES[request.param]
    whole, batch = build(name)
    changes = adapter_of(copy.deepcopy(whole).double(), tmp_path / "adapter", **adapter)
    model, _ = compress(whole, batch, keep_ratio=0.6, rank_multiple=1, **options)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}, changes


def test_adds_the_change_of_each_layer_and_is_saved_as_it_is(case, tmp_path):
    model, batch, changes = case
    before = copy.deepcopy(model)
    assert merge_dense_adapter(model, tmp_path / "adapter") is model
    assert changes
    for name, old in before.named_modules():
        if name in changes:
            expected = dense(old).weight + changes[name]
            torch.testing.assert_close(dense(model.get_submodule(name)).weight, expected, rtol=ROUNDING, atol=ROUNDING)
    grown = {n: layer for n, layer in factorized_layers(model).items() if n in changes}
    for name, layer in grown.items():
        assert layer.rank > before.get_submodule(name).rank
        assert sum(p.numel() for p in (layer.up.weight, layer.down.weight)) < layer.out_features * layer.in_features
    assert set(model.config.quantization_config.modules) >= set(factorized_layers(model))
    model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    check_same_state(model.state_dict(), again.state_dict())
    check_same_model(model.eval(), again, batch)


def compressed_bert(**options):
    return compress(*build(BERT), rank_multiple=1, **{"keep_ratio": 0.5} | options)[0]


class TestABert:
    def test_keeps_its_factors_in_those_of_the_larger_rank(self, tmp_path):
        model = compressed_bert(storage="two-factor")
        adapter_of(build(BERT)[0], tmp_path, target_modules=["query"])
        old = factorized_layers(model)[QUERY]
        new = merge_dense_adapter(model, tmp_path).get_submodule(QUERY)
        assert torch.equal(new.up.weight[:, : old.rank], old.up.weight)
        assert torch.equal(new.down.weight[: old.rank], old.down.weight)

    def test_with_fewer_dimensions_is_refused_where_the_adapter_changes_values(self, tmp_path):
        model = compressed_bert(forms=["channel", "dimensions"], keep_ratio=0.4)
        state = copy.deepcopy(model.state_dict())
        adapter_of(build(BERT)[0], tmp_path / "value", target_modules=["value"])
        with pytest.raises(TargetError, match=r"self\.value' has fewer outputs than the adapter was trained on"):
            merge_dense_adapter(model, tmp_path / "value")
        check_same_state(state, model.state_dict())
        adapter_of(build(BERT)[0], tmp_path / "query", target_modules=["query"])
        merge_dense_adapter(model, tmp_path / "query")

    def test_becomes_dense_where_factors_would_be_no_smaller(self, tmp_path):
        model = compressed_bert()
        adapter_of(build(BERT)[0], tmp_path / "adapter", target_modules=["query"], r=40)
        merge_dense_adapter(model, tmp_path / "adapter")
        assert type(model.get_submodule(QUERY)) is nn.Linear
        assert QUERY not in model.config.quantization_config.modules
        assert factorized_layers(model)

    def test_is_an_ordinary_model_once_no_layer_is_factorized(self, tmp_path):
        model = compressed_bert(target_modules=[QUERY])
        adapter_of(build(BERT)[0], tmp_path / "adapter", target_modules=[QUERY], r=40)
        merge_dense_adapter(model, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
        assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()

    def test_takes_over_a_head_that_was_trained_beside_the_adapter(self, tmp_path):
        model, whole = compressed_bert(), build(BERT)[0]
        nn.init.normal_(whole.classifier.weight)
        adapter_of(whole, tmp_path, target_modules=["query"], modules_to_save=["classifier"])
        merge_dense_adapter(model, tmp_path)
        assert torch.equal(model.classifier.weight, whole.classifier.modules_to_save["default"].weight)


class Scaled(nn.Embedding):
    """As Gemma's: its scale is in no file."""

    def __init__(self, scale):
        super().__init__(5, 3)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)


def test_a_module_from_an_adapter_has_the_buffers_that_no_file_has():
    old, new = Scaled(5.0), Scaled(0.0)
    expected = new.weight.clone()
    found = _like(old, new)
    assert found.scale == 5.0
    assert torch.equal(found.weight, expected)


def quantized(tmp_path):
    adapter_of(build(BERT)[0], tmp_path, target_modules=["query"])
    return compressed_bert(formats=["int8"], keep_ratio=0.15), "has numbers of 8 bits or fewer, .* Merge the adapter"


def of_another_model(tmp_path):
    adapter_of(build("llama")[0], tmp_path, target_modules=["q_proj"])
    return compressed_bert(), "does not fit BertForSequenceClassification: "


def of_other_sizes(tmp_path):
    adapter_of(build(BERT)[0], tmp_path, target_modules=["query"])
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: torch.ones(2, 2) for key in load_file(file)}, file)
    return compressed_bert(), r"does not fit BertForSequenceClassification: [\s\S]*size mismatch"


def incomplete(tmp_path):
    adapter_of(build(BERT)[0], tmp_path, target_modules=["query", "value"])
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "value" not in key}, file)
    return compressed_bert(), "does not fit .*: it has no numbers for .*value.lora_A"


def with_tensors_of_something_else(tmp_path):
    adapter_of(build(BERT)[0], tmp_path, target_modules=["query"])
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.bert.other.lora_A.weight": torch.ones(2)}, file)
    return compressed_bert(), "there is no place for ..bert.other"


def pickled(tmp_path):
    adapter_of(build(BERT)[0], tmp_path, target_modules=["query"])
    shutil.move(tmp_path / "adapter_model.safetensors", tmp_path / "adapter_model.bin")
    return compressed_bert(), "has no adapter_model.safetensors; adapters are read from safetensors only"


def of_kind(reason, **options):
    def make(tmp_path):
        adapter_of(build(BERT)[0], tmp_path, target_modules=["query"], **options)
        return compressed_bert(), reason

    return make


def adapted_already(tmp_path):
    model = compressed_bert(target_modules=["value"])
    adapter_of(build(BERT)[0], tmp_path, target_modules=["query"])
    inject_adapter_in_model(LoraConfig(target_modules=["query"]), model)
    return model, "query' has an adapter on it; merge it first"


def tied(tmp_path):
    model, _ = compress(*build("gpt2"), rank_multiple=1, keep_ratio=0.5)
    assert model.config.tie_word_embeddings
    adapter_of(build("gpt2")[0], tmp_path, target_modules=["wte"])
    return model, "wte' has weights that are tied to others"


def scaling(tmp_path):
    get_peft_model(build(BERT)[0], IA3Config(target_modules=["query"], feedforward_modules=[])).save_pretrained(
        tmp_path
    )
    return compressed_bert(), "is of the type IA3, not LORA; .* Merge the adapter into the dense model"


def in_groups(tmp_path):
    config = RegNetConfig(embedding_size=8, groups_width=8, hidden_sizes=[16, 24], depths=[1, 1], num_labels=3)
    whole = RegNetForImageClassification(config)
    layer = "regnet.encoder.stages.0.layers.0.layer.1.convolution"
    assert whole.get_submodule(layer).groups > 1
    get_peft_model(copy.deepcopy(whole), LoraConfig(r=2, target_modules=[layer])).save_pretrained(tmp_path)
    pictures = {"pixel_values": torch.randn(12, 3, 20, 20), "labels": torch.arange(12) % 3}
    return compress(whole, pictures, keep_ratio=0.5)[0], "mixes groups of channels, so no weight there can hold it"


REFUSED = {
    "groups": in_groups,
    "rounded numbers": quantized,
    "another model": of_another_model,
    "other sizes": of_other_sizes,
    "incomplete": incomplete,
    "unknown tensors": with_tensors_of_something_else,
    "pickle": pickled,
    "an adapter there": adapted_already,
    "tied": tied,
    "IA3": scaling,
    "DoRA": of_kind("is DoRA, .* Merge the adapter into the dense model", use_dora=True),
    "PiSSA": of_kind("was trained on weights that its initialization changed .pissa.", init_lora_weights="pissa"),
    "biases": of_kind("changes biases, too", bias="all"),
    "tokens": of_kind("changes single tokens", trainable_token_indices={"word_embeddings": [1]}),
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_and_changes_nothing(kind, tmp_path):
    model, reason = REFUSED[kind](tmp_path)
    before, modules = copy.deepcopy(model.state_dict()), dict(model.config.quantization_config.modules)
    with pytest.raises(TargetError, match=reason):
        merge_dense_adapter(model, tmp_path)
    check_same_state(before, model.state_dict())
    assert model.config.quantization_config.modules == modules


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(TargetError, match="is not compressed; merge the adapter with PEFT itself"):
        merge_dense_adapter(build(BERT)[0], tmp_path)
