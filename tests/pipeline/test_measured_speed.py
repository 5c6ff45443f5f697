"""A compression says how long both models take, and warns where the compressed one is slower."""

from dataclasses import replace
from functools import partial

import pytest
from support.tiny_models import bert_sequence_classification, other_inputs, split_batch

from hf_lossless_lr import CompressionReport, LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.checkpoint.cards import card_of
from hf_lossless_lr.pipeline import budget as budgets
from hf_lossless_lr.pipeline import speed as speed_module
from hf_lossless_lr.ranks.latency import latency_sizes, speed_in_turns
from hf_lossless_lr.report.tables import report_rows


def compressed(**options):
    model, batch = bert_sequence_classification(12)
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=False, **options))
    compressor.compress(model, split_batch(batch, 4), eval_dataset=split_batch(other_inputs(batch), 4))
    return compressor.report


def test_both_models_are_measured_on_a_calibration_batch():
    report = compressed()
    speed = report.speed
    assert speed.shape == (4, 9)
    assert len(speed.seconds) == len(speed.quartiles) == 2
    assert speed.ratio > 0
    assert report_rows(report)["batch of 4 (ms)"] == tuple(1000 * seconds for seconds in speed.seconds)
    assert f"(× {speed.ratio:.2f})" in card_of(report)
    assert CompressionReport.from_json(report.to_json()) == report


def test_the_second_one_is_compressed_while_it_runs(monkeypatch):
    seen = []

    def turns(runs, *arguments, **options):
        for in_place, run in runs:
            with in_place():
                seen.append(run().logits)
        return speed_in_turns(runs, *arguments, **options)

    monkeypatch.setattr(speed_module, "speed_in_turns", turns)
    compressed(keep_ratio=0.3)
    assert len(seen) == 2
    assert not seen[0].allclose(seen[1])


@pytest.fixture
def takes(monkeypatch):
    """Say how much of the time of the dense model the compressed one takes."""

    def measured(ratio):
        def turns(*arguments, **options):
            return replace(speed_in_turns(*arguments, **options), ratio=ratio, ratio_quartiles=(ratio, ratio))

        monkeypatch.setattr(speed_module, "speed_in_turns", turns)

    return measured


@pytest.mark.parametrize(("ratio", "warned"), [(1.2, True), (0.8, False)])
def test_a_slower_model_is_a_warning_that_says_what_to_do(ratio, warned, takes, caplog):
    takes(ratio)
    compressed()
    assert ("takes 1.20 times as long" in caplog.text) == warned
    assert ("size='latency'" in caplog.text) == warned


FOR_TIME = {"size": "latency", "scope": "model", "keep_ratio": 0.95}


@pytest.mark.parametrize(
    ("ratio", "options", "said"),
    [
        (1.2, FOR_TIME, "By themselves its layers are faster"),
        (0.999, FOR_TIME, "takes 1.00 of the time of the dense one for a batch of 4 × 9"),
        (0.96, FOR_TIME, None),
        (0.999, FOR_TIME | {"scope": "targeted"}, None),  # what the whole model was to take is not known
    ],
)
def test_a_latency_budget_that_is_not_kept_is_a_warning(ratio, options, said, takes, monkeypatch, caplog):
    monkeypatch.setattr(budgets, "latency_sizes", partial(latency_sizes, timer=seconds))
    monkeypatch.setattr(budgets, "forward_seconds", lambda *_: 1e-6 * PARAMETERS)
    takes(ratio)
    compressed(**options)
    assert "use size='latency'" not in caplog.text
    assert said in caplog.text if said else "of the time" not in caplog.text


PARAMETERS = 40_000  # more than the targeted layers have


def seconds(layer, x, calls):
    """As much as the layer has parameters."""
    return 1e-6 * sum(parameter.numel() for parameter in layer.parameters())


def test_nothing_is_measured_where_nothing_is_compressed():
    assert compressed(keep_ratio=1.0).speed is None
