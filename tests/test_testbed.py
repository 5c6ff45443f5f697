"""A real model on real data: the order of the methods, and an exact reload."""

import json

import pytest
import torch
from support.compressions import check_same_model, factorized_layers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor

pytestmark = [pytest.mark.testbed, pytest.mark.slow]

CALIBRATION, VALIDATION = 128, 200
METHODS = {
    "kronecker budget": LosslessLowRankConfig(keep_ratio=0.5),
    "activation uniform": LosslessLowRankConfig(keep_ratio=0.5, objective="uniform", metric="activation"),
}


@pytest.fixture(scope="module")
def tokenizer(testbed):
    return AutoTokenizer.from_pretrained(testbed / "minilm-sst2")


def examples_of(file, tokenizer, count):
    """The first lines of a file, the shorter ones first, so that batches have little padding."""
    rows = [json.loads(line) for line in file.read_text().splitlines()[:count]]
    examples = [{**tokenizer(row["sentence"], truncation=True), "labels": row["label"]} for row in rows]
    return sorted(examples, key=lambda example: len(example["input_ids"]))


@pytest.fixture(scope="module")
def runs(testbed, tokenizer):
    """Each method's compressed model and report."""
    calibration = examples_of(testbed / "data" / "sst2" / "calibration.jsonl", tokenizer, CALIBRATION)
    validation = examples_of(testbed / "data" / "sst2" / "validation.jsonl", tokenizer, VALIDATION)
    results = {}
    for name, config in METHODS.items():
        model = AutoModelForSequenceClassification.from_pretrained(testbed / "minilm-sst2", dtype=torch.float32)
        compressor = LowRankCompressor(config)
        compressor.compress(model, calibration, eval_dataset=validation, processing_class=tokenizer)
        results[name] = (model, compressor.report)
    return results


def increase(report):
    return report.compressed.loss - report.dense.loss


def test_the_dense_model_is_as_good_as_the_testbed_says(runs):
    for _, report in runs.values():
        assert 0.2 < report.dense.loss < 0.35
        assert 0.86 < report.dense.accuracy < 0.93
        assert report.held_out["examples"] == VALIDATION


def test_both_methods_keep_at_most_half(runs):
    for model, report in runs.values():
        assert 0.48 < report.keep_ratio <= 0.5
        assert report.compressed.parameters == model.num_parameters()


def test_kronecker_budget_costs_less_than_activation_uniform_which_costs_more_than_nothing(runs):
    kronecker, activation = (increase(report) for _, report in runs.values())
    assert kronecker < 0.6 * activation
    assert activation > 0.02
    assert kronecker < 0.05


def test_a_reload_is_exact_bit_for_bit(runs, tokenizer, tmp_path):
    model, _ = runs["kronecker budget"]
    model.save_pretrained(tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert factorized_layers(again).keys() == factorized_layers(model).keys()
    batch = tokenizer(["a gripping film .", "dull , and far too long"], padding=True, return_tensors="pt")
    check_same_model(model, again, batch)
