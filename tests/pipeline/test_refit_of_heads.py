"""Poolers and task heads stay dense, and are fitted to what they get behind factorized layers."""

from copy import deepcopy
from itertools import count

import numpy as np
import pytest
import torch
from support.compressions import check_same_model
from support.refit_oracle import fitted, get_matrix, layer_inputs, plain_examples
from support.statistics_oracle import double_rows
from support.tiny_models import TINY_MODELS, other_inputs, split_batch
from support.tolerances import AMPLIFIED

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.factors.refit import LARGEST_RIDGE, RIDGE
from hf_lossless_lr.pipeline import trial

NAME = "bert-sequence-classification"
POOLER, HEAD = "bert.pooler.dense", "classifier"


def calibrated(name=NAME, change=lambda model: None, examples=96, **options):
    model, batch = TINY_MODELS[name](examples)
    change(model)
    compressor = LowRankCompressor(LosslessLowRankConfig(**options))
    compressor.calibrate(model, split_batch(batch, 8), eval_dataset=[other_inputs(batch)])
    return compressor, model


@pytest.fixture
def refit_is_kept(monkeypatch):
    """Whether or not it helps on a handful of random examples."""
    distances = count()
    monkeypatch.setattr(trial, "_distance", lambda outcomes: next(distances))  # first that behind it is taken


def freeze_the_pooler(model):
    model.bert.pooler.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        (NAME, [POOLER, HEAD]),
        ("bert-token-classification", [HEAD]),
        ("bert-question-answering", ["qa_outputs"]),
        ("bert-masked-lm", ["cls.predictions.transform.dense"]),  # what is behind it is tied
        ("llama", []),
        ("resnet", ["classifier.1"]),
    ],
)
def test_layers_behind_all_targets_are_fitted(name, heads):
    assert list(calibrated(name, examples=16)[0]._calibration.heads) == heads


@pytest.mark.parametrize(
    ("left", "options"),
    [
        ([HEAD], {"ignore": [POOLER]}),
        ([HEAD], {"change": freeze_the_pooler}),
        ([], {"refit": False}),
        ([], {"target_modules": ["query", HEAD]}),
    ],
)
def test_what_is_ignored_frozen_or_before_a_target_is_not(left, options):
    assert list(calibrated(examples=16, **options)[0]._calibration.heads) == left


@pytest.mark.parametrize("seed", [0, 1])
def test_they_reproduce_the_dense_outputs_from_the_shifted_inputs(seed, refit_is_kept, monkeypatch):
    """By least squares on the rows themselves, each behind those before it."""
    monkeypatch.setattr("hf_lossless_lr.statistics.streams.real_rows", double_rows)
    compressor, model = calibrated(change=lambda model: model.double(), selection_fraction=0.25, seed=seed)
    dense, data = deepcopy(model), compressor._calibration.parts.calibration
    compressor.compress_to(0.5)
    assert compressor.report.refitted
    examples = [example for batch in data for example in plain_examples(dense, batch)]
    inputs, shifted = (layer_inputs(each, [POOLER, HEAD], examples) for each in (dense, model))
    for name in (POOLER, HEAD):
        X, Y = (np.concatenate(list(rows[name].values())) for rows in (inputs, shifted))
        assert np.abs(X - Y).max() > 1e-3
        old, new = (get_matrix(each.get_submodule(name)) for each in (dense, model))
        expected = fitted(old, X, Y, min(RIDGE * Y.shape[1] / len(Y), LARGEST_RIDGE))
        assert np.abs(expected - old).max() > 1e-3
        assert np.abs(new - expected).max() <= AMPLIFIED * np.abs(expected).max()
        assert torch.equal(dense.get_submodule(name).bias, model.get_submodule(name).bias)


def test_they_are_reported_saved_and_put_back(tmp_path, refit_is_kept):
    compressor, model = calibrated(selection_fraction=0.25)
    dense, before = {name: model.get_submodule(name) for name in (POOLER, HEAD)}, deepcopy(model.state_dict())
    compressor.compress_to(0.5)
    reasons = {name: compressor.report.skipped[name].reason for name in dense}
    assert reasons == {POOLER: "pooler, refitted", HEAD: "task head, refitted"}
    assert not torch.equal(model.classifier.weight, before[f"{HEAD}.weight"])
    model.save_pretrained(tmp_path)
    check_same_model(model, type(model).from_pretrained(tmp_path), TINY_MODELS[NAME](4)[1])
    compressor.restore()
    assert all(model.get_submodule(name) is module for name, module in dense.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_refit_that_is_not_kept_leaves_them_as_they_were(monkeypatch):
    monkeypatch.setattr(trial, "_distance", lambda outcomes: 0.0)
    compressor, model = calibrated(selection_fraction=0.25)
    dense, before = {name: model.get_submodule(name) for name in (POOLER, HEAD)}, deepcopy(model.state_dict())
    compressor.compress_to(0.5)
    assert not compressor.report.refitted
    assert all(model.get_submodule(name) is module for name, module in dense.items())
    assert all(torch.equal(module.weight, before[f"{name}.weight"]) for name, module in dense.items())
