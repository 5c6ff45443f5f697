"""Ranks that the user gives."""

import pytest
from support.compressions import BATCH_SIZE, build, factorized_layers
from support.tiny_models import other_inputs, split_batch

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.errors import ConfigurationError, TargetError


def compressed(ranks, **options):
    model, batch = build("bert-sequence-classification")
    compressor = LowRankCompressor(LosslessLowRankConfig(ranks=ranks, **options))
    compressor.compress(model, split_batch(batch, BATCH_SIZE), eval_dataset=[other_inputs(batch)])
    return model, compressor.report


def test_are_those_of_the_layers_and_the_most_specific_pattern_counts():
    ranks = {"query": 3, "re:.*attention.output.dense": 5, "layer.1.attention.self.query": 4}
    model, report = compressed(ranks)
    found = {name: layer.rank for name, layer in factorized_layers(model).items()}
    layers = "bert.encoder.layer"
    assert found == {
        f"{layers}.0.attention.self.query": 3,
        f"{layers}.1.attention.self.query": 4,
        f"{layers}.0.attention.output.dense": 5,
        f"{layers}.1.attention.output.dense": 5,
    }
    assert {name: layer.rank for name, layer in report.layers.items() if layer.rank is not None} == found
    assert report.config["objective"] == "ranks"


@pytest.mark.parametrize(("ranks", "options"), [({"query": 3}, {}), ([], {"formats": ["int8"]})])
def test_are_on_the_card_of_a_model_that_is_saved_and_loads(ranks, options, tmp_path):
    model, _ = compressed(ranks, **options)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("ranks=['query=3']" in card) is bool(ranks)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: layer.rank for name, layer in factorized_layers(loaded).items()} == {
        name: layer.rank for name, layer in factorized_layers(model).items()
    }


def test_with_a_number_format_all_other_layers_are_rounded():
    model, report = compressed({"query": 3}, formats=["int8"])
    assert {layer.format for layer in report.layers.values()} == {"int8"}
    assert len(factorized_layers(model)) == 2


def test_that_compress_nothing_or_match_nothing_are_an_error():
    with pytest.raises(ConfigurationError, match=r"query' \(32 x 32\) is smaller than dense up to rank \d+, got 32"):
        compressed({"query": 32})
    with pytest.raises(TargetError, match="ranks: 'quary' matches no layer; nearest: 'query'"):
        compressed({"quary": 3})
    reasons = {"in `ignore`": {"ranks": {"key": 3, "query": 3}, "ignore": ["query"]}}
    reasons["task head"] = {"ranks": {"key": 3, "classifier": 1}}
    for reason, options in reasons.items():
        with pytest.raises(TargetError, match=rf"(query|classifier)' matches '.*', which stays dense: {reason}"):
            compressed(**options)


def test_another_size_is_chosen_by_the_budget():
    model, batch = build("bert-sequence-classification")
    compressor = LowRankCompressor(LosslessLowRankConfig(ranks={"query": 3}))
    compressor.calibrate(model, split_batch(batch, BATCH_SIZE), eval_dataset=[other_inputs(batch)])
    compressor.compress_to(0.6)
    assert compressor.report.config["objective"] == "budget"
    compressor.compress_to()
    assert len(factorized_layers(model)) == 2
