"""Layers that the data never reach stay dense, with one warning that names them all."""

import pytest
import torch
from support.tiny_models import as_examples, bert_sequence_classification, other_inputs
from torch import nn

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor

IDLE = ["bert.idle", "bert.unused"]


@pytest.fixture
def said(monkeypatch):
    said = []
    monkeypatch.setattr(
        "hf_lossless_lr.pipeline.narrowing.logger.warning", lambda text, *values: said.append(text % values)
    )
    return said


def model_and_data():
    model, batch = bert_sequence_classification(20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.bert.unused, model.bert.idle = nn.Linear(32, 24), nn.Linear(32, 24)
    return model, as_examples(batch), as_examples(other_inputs(batch))


@pytest.mark.parametrize("size", ["parameters", "flops"])
def test_stay_dense_with_one_warning(size, said):
    model, examples, others = model_and_data()
    before = {name: model.get_submodule(name).weight.clone() for name in IDLE}
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.8, size=size))
    compressor.compress(model, examples, eval_dataset=others)
    assert said == [
        "2 layers were never called in a forward pass over the calibration data and stay dense: bert.unused, "
        "bert.idle."
    ]
    assert all(torch.equal(model.get_submodule(name).weight, before[name]) for name in IDLE)
    skipped = compressor.report.skipped
    assert {name: skipped[name].reason for name in IDLE} == dict.fromkeys(IDLE, "never called by the calibration data")
    assert not set(IDLE) & set(compressor.report.layers)
    assert any(layer.rank for layer in compressor.report.layers.values())


def test_stay_dense_with_statistics_from_a_file(said, tmp_path):
    ranks = []
    for _ in range(2):
        model, examples, others = model_and_data()
        compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
        compressor.calibrate(model, examples, eval_dataset=others, statistics_path=tmp_path / "statistics")
        compressor.compress_to()
        ranks.append({name: layer.rank for name, layer in compressor.report.layers.items()})
    assert ranks[0] == ranks[1]
    assert len(said) == 2
