"""Large layers are summed and decomposed in float32: with every layer taken for large, the result is the same."""

import pytest
from support.tiny_models import bert_sequence_classification, gpt2, llama, split_batch

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor

LOSS = 2e-4  # nats: three orders of magnitude below what the compressions here change


def compressed(make, **options):
    model, batch = make(64)
    data = split_batch(batch, 1)
    compressor = LowRankCompressor(LosslessLowRankConfig(selection_fraction=0.4, **options))
    compressor.compress(model, data[:48], eval_dataset=data[48:])
    return compressor.report


@pytest.mark.parametrize("make", [bert_sequence_classification, gpt2, llama], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "options",
    [{"keep_ratio": 0.5}, {"keep_ratio": 0.35, "storage": "pivoted", "metric": "activation"}],
    ids=["kronecker", "activation"],
)
def test_in_float32_the_ranks_and_the_loss_are_those_of_float64(make, options, monkeypatch):
    exact = compressed(make, **options)
    monkeypatch.setattr("hf_lossless_lr.statistics.rows.LARGE", 1)
    monkeypatch.setattr("hf_lossless_lr.factors.decomposition.LARGE", 1)
    found = compressed(make, **options)
    assert {n: layer.rank for n, layer in found.layers.items()} == {n: w.rank for n, w in exact.layers.items()}
    assert found.compressed.loss == pytest.approx(exact.compressed.loss, abs=LOSS)
    assert abs(exact.compressed.loss - exact.dense.loss) > 50 * LOSS
    for name, layer in found.layers.items():
        assert layer.second_order == pytest.approx(exact.layers[name].second_order, rel=1e-3, abs=1e-7)


def test_numbers_are_rounded_in_float32(monkeypatch):
    exact = compressed(llama, keep_ratio=0.2, formats=["int8", "int4"])
    monkeypatch.setattr("hf_lossless_lr.statistics.rows.LARGE", 1)
    monkeypatch.setattr("hf_lossless_lr.factors.decomposition.LARGE", 1)
    found = compressed(llama, keep_ratio=0.2, formats=["int8", "int4"])
    assert {n: (w.rank, w.format) for n, w in found.layers.items()} == {
        n: (w.rank, w.format) for n, w in exact.layers.items()
    }
    assert found.compressed.loss == pytest.approx(exact.compressed.loss, abs=1e-3)
