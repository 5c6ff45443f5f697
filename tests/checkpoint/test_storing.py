"""A compressed model changes the storage of its factors and stays the same map."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.compressions import (
    answers,
    auto_class,
    build,
    check_same_answers,
    check_same_model,
    compressed,
    factorized_layers,
)
from support.tolerances import FLOAT32

from hf_lossless_lr import change_storage, lora_targets
from hf_lossless_lr.errors import ConfigurationError, TargetError
from hf_lossless_lr.layers.rounded import grids_in

BERT = "bert-sequence-classification"
OTHER = {"pivoted": "two-factor", "two-factor": "pivoted"}


@pytest.mark.parametrize("storage", OTHER)
@pytest.mark.parametrize("name", [BERT, "albert", "gpt2", "resnet"])  # linear, shared, transposed, convolutions
def test_the_map_stays_and_is_saved_in_the_new_storage(name, storage, tmp_path):
    model, batch = compressed(name, storage=storage)
    before, layers = answers(model, batch), factorized_layers(model)
    assert change_storage(model, OTHER[storage]) is model
    changed = factorized_layers(model)
    assert [layer.rank for layer in changed.values()] == [layer.rank for layer in layers.values()]
    assert {layer.storage for layer in changed.values() if layer.form == "channel"} == {OTHER[storage]}
    for key, value in answers(model, batch).items():
        torch.testing.assert_close(value, before[key], atol=100 * FLOAT32, rtol=0)
    model.save_pretrained(tmp_path)
    check_same_model(model, auto_class(name).from_pretrained(tmp_path).eval(), batch)


def test_two_factors_are_balanced():
    model = change_storage(compressed(BERT, storage="pivoted")[0], "two-factor")
    for layer in factorized_layers(model).values():
        up, down = layer.up.weight, layer.down.weight
        torch.testing.assert_close(up.T @ up, down @ down.T, atol=1e-3, rtol=1e-3)


def test_a_step_of_adam_moves_balanced_factors_less_than_pivots():
    """By the change of each matrix, relative to its size."""
    moved = {}
    for storage in OTHER:
        model, batch = compressed(BERT, storage="pivoted")
        layers = factorized_layers(change_storage(model, storage))
        before = {name: layer.dense_weight() for name, layer in layers.items()}
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        model(**batch).loss.backward()
        optimizer.step()
        changes = [
            (layer.dense_weight() - before[name]).norm() / before[name].norm() for name, layer in layers.items()
        ]
        moved[storage] = torch.stack(changes).mean()
    assert moved["two-factor"] < moved["pivoted"]


def test_a_model_without_its_head_keeps_its_manifest_true(tmp_path):
    model, _ = compressed(BERT, storage="pivoted")
    model.save_pretrained(tmp_path / "whole")
    base = change_storage(type(model.base_model).from_pretrained(tmp_path / "whole"), "two-factor")
    base.save_pretrained(tmp_path / "base")
    again = type(base).from_pretrained(tmp_path / "base")
    assert {layer.storage for layer in factorized_layers(again).values()} == {"two-factor"}


def test_rounded_numbers_stay_where_they_are():
    model, batch = compressed(BERT, formats=["int8"], keep_ratio=0.15)
    before, grids = answers(model, batch), len(grids_in(model))
    change_storage(model, "pivoted")
    assert len(grids_in(model)) == grids
    check_same_answers(model, compressed(BERT, formats=["int8"], keep_ratio=0.15)[0], batch)
    assert before.keys() == answers(model, batch).keys()


def test_frozen_layers_stay_frozen():
    model, _ = compressed(BERT, storage="pivoted")
    change_storage(model.requires_grad_(False), "two-factor")
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_what_cannot_change_says_why_and_is_unchanged():
    with pytest.raises(ConfigurationError, match="storage: 'auto' is unknown; choose one of pivoted, two-factor"):
        change_storage(compressed(BERT)[0], "auto")
    with pytest.raises(TargetError, match="has no factorized layers, whose storage could change"):
        change_storage(build(BERT)[0], "pivoted")
    model, _ = compressed(BERT, storage="pivoted")
    adapted = get_peft_model(model, LoraConfig(target_modules=lora_targets(model, ["query"])))
    with pytest.raises(TargetError, match=r"has an adapter on it; merge it first, with `merge_and_unload\(\)`"):
        change_storage(adapted.base_model.model, "two-factor")
    assert {layer.storage for layer in factorized_layers(model).values()} == {"pivoted"}
    change_storage(adapted.merge_and_unload(), "two-factor")
    with pytest.raises(TargetError, match="is offloaded; load the model into memory first"):
        change_storage(model.to("meta"), "pivoted")
