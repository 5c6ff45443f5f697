"""Adapters of PEFT on compressed models: put on, trained, saved, loaded, and merged into the factors."""

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from support.compressions import answers, auto_class, build, check_same_answers, compressed, factorized_layers
from support.tolerances import FLOAT32
from torch import nn

from hf_lossless_lr import lora_targets
from hf_lossless_lr.errors import TargetError
from hf_lossless_lr.layers.rounded import grids_in

BERT = "bert-sequence-classification"
LAYER = "bert.encoder.layer.0.attention.self"
METHODS = {
    "LoRA": {"init_lora_weights": False},
    "DoRA": {"use_dora": True, "init_lora_weights": False},
    "PiSSA": {"init_lora_weights": "pissa"},
}
CASES = {  # where the layers differ for PEFT: model, options of the compression
    "pivoted": (BERT, {"storage": "pivoted"}),
    "two factors": (BERT, {"storage": "two-factor"}),
    "some layers dense": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "transposed": ("gpt2", {}),
    "int8": (BERT, {"formats": ["int8"], "keep_ratio": 0.15}),
}


def trained(model, batch, steps=2):
    """The model after a few steps of its adapter alone."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    return model.eval()


class TestNames:
    def test_are_those_of_factors_that_reach_all_outputs_and_of_dense_layers_themselves(self):
        """Pivots of a square layer are outputs, those of one with more outputs than inputs are inputs."""
        query, value, wide = f"{LAYER}.query", f"{LAYER}.value", "bert.encoder.layer.0.intermediate.dense"
        for storage, expected in (
            ("pivoted", [f"{query}.down", f"{query}.up", value, f"{wide}.up"]),
            ("two-factor", [f"{query}.up", value, f"{wide}.up"]),
        ):
            model, _ = compressed(BERT, storage=storage, target_modules=["query", "intermediate.dense"])
            assert lora_targets(model, [query, value, wide]) == expected

    def test_in_a_dense_model_are_those_that_were_asked_for(self):
        model, _ = build(BERT)
        assert lora_targets(model, [f"{LAYER}.query"]) == [f"{LAYER}.query"]

    def test_by_default_are_those_of_peft_in_the_dense_model(self):
        """PEFT's default for BERT: query and value."""
        dense, _ = build(BERT)
        adapted = get_peft_model(dense, LoraConfig(task_type=TaskType.SEQ_CLS)).base_model.model
        adapters = {name.removesuffix(".lora_A") for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
        model, _ = compressed(BERT)
        assert {name.rpartition(".")[0] for name in lora_targets(model)} == adapters

    def test_leave_out_of_the_default_what_the_model_does_not_have(self, monkeypatch):
        monkeypatch.setitem(DEFAULTS, "bert", ["query", "q_proj"])
        assert lora_targets(build(BERT)[0]) == [f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1)]

    def test_of_all_linear_layers_leave_heads_poolers_and_convolutions(self):
        model, _ = compressed(BERT, target_modules=["query"], storage="two-factor")
        names = lora_targets(model, "all-linear")
        assert len(names) == 2 * 6  # in each block
        assert not [name for name in names if "classifier" in name or "pooler" in name]
        with pytest.raises(TargetError, match="PEFT has no default for models of the type 'resnet'"):
            lora_targets(compressed("resnet")[0])
        with pytest.raises(TargetError, match="ResNetForImageClassification has no linear layer besides heads"):
            lora_targets(compressed("resnet")[0], "all-linear")

    def test_that_do_not_exist_name_what_comes_near(self):
        with pytest.raises(TargetError, match=r"'q_proj' matches no layer; (nearest|layers here): "):
            lora_targets(compressed(BERT)[0], ["q_proj"])
        with pytest.raises(TargetError, match=r"'querry' matches no layer; nearest: 'query'"):
            lora_targets(compressed(BERT)[0], ["querry"])

    def test_of_layers_that_hold_codes_say_how_to_load_them(self, tmp_path):
        model, _ = compressed(BERT, formats=["int8"], keep_ratio=0.15)
        model.save_pretrained(tmp_path)
        config = type(model.config.quantization_config)(compute="stored")
        with pytest.warns(UserWarning, match="quantization_config"):
            model = auto_class(BERT).from_pretrained(tmp_path, quantization_config=config)
        with pytest.raises(TargetError, match=r"holds codes.*Load the checkpoint without `compute=\"stored\"`"):
            lora_targets(model, ["query"])


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """How a model is loaded, its compressed checkpoint, and a batch."""
    name, options = CASES[request.param]
    model, batch = compressed(name, **options)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return auto_class(name).from_pretrained, folder, batch


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_trained_saved_loaded_and_merged_with_the_rank_kept(method, saved, tmp_path):
    load, folder, batch = saved
    base = load(folder).eval()
    before = answers(base, batch)["logits"]
    ranks = {layer: module.rank for layer, module in factorized_layers(base).items()}
    targets = lora_targets(base, "all-linear")
    adapted = trained(get_peft_model(base, LoraConfig(r=2, target_modules=targets, **METHODS[method])), batch)
    assert not torch.equal(answers(adapted, batch)["logits"], before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    check_same_answers(again, adapted, batch, 10 * FLOAT32)  # PiSSA decomposes the weights once more
    merged = adapted.merge_and_unload()
    assert {layer: module.rank for layer, module in factorized_layers(merged).items()} == ranks
    check_same_answers(merged, again, batch, 10 * FLOAT32)
    if not grids_in(merged):  # else its numbers are rounded anew
        merged.save_pretrained(tmp_path / "merged")
        check_same_answers(load(tmp_path / "merged").eval(), merged, batch)


def test_an_adapter_alone_says_which_compressed_checkpoint_it_belongs_to(tmp_path):
    """`AutoPeftModel…` finds the compressed checkpoint by the name that the adapter has of it, with its head."""
    model, batch = compressed(BERT)
    model.save_pretrained(tmp_path / "base")
    base = auto_class(BERT).from_pretrained(tmp_path / "base")
    config = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=lora_targets(base), init_lora_weights=False)
    adapted = trained(get_peft_model(base, config), batch)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    check_same_answers(again, adapted, batch)
    assert isinstance(again.base_model.model.classifier.modules_to_save["default"], nn.Linear)


@pytest.mark.parametrize("storage", ["pivoted", "two-factor"])
def test_convolutions_take_adapters_on_their_factors(storage, tmp_path):
    model, batch = compressed("resnet", storage=storage)
    assert storage == "pivoted" or "spatial" in {layer.form for layer in factorized_layers(model).values()}
    targets = lora_targets(model, ["Conv2d"])
    assert {name.rpartition(".")[2] for name in targets} >= {"up"}
    adapted = trained(get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)), batch)
    expected = answers(adapted, batch)["logits"]
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(answers(merged, batch)["logits"], expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    check_same_answers(auto_class("resnet").from_pretrained(tmp_path).eval(), merged, batch)
