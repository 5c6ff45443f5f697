"""More data for the refit: without labels, and apart from what judges the model."""

import pytest
import torch
from support.tiny_models import bert_sequence_classification, split_batch, vit

import hf_lossless_lr.pipeline.trial as trials_module
from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, verify
from hf_lossless_lr.errors import CertificateError, DataError, NumericalError
from hf_lossless_lr.fingerprint import tensors_fingerprint

CALIBRATED, HELD_OUT = 40, 12


@pytest.fixture(scope="module")
def data():
    batch = bert_sequence_classification(CALIBRATED + HELD_OUT + 24)[1]
    return split_batch(batch, 1)


def compressed(calibration, held_out, more=None, **options):
    model, _ = bert_sequence_classification()
    config = LosslessLowRankConfig(keep_ratio=0.4, batch_size=4, selection_fraction=0.5, **options)
    compressor = LowRankCompressor(config)
    compressor.compress(model, calibration, eval_dataset=held_out, refit_dataset=more)
    return model, compressor.report


def unlabelled(batches):
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


@pytest.fixture
def parts(data):
    return data[:CALIBRATED], data[CALIBRATED : CALIBRATED + HELD_OUT], data[CALIBRATED + HELD_OUT :]


def test_the_refit_sees_calibration_data_and_more_which_need_no_labels(parts, monkeypatch):
    seen, plain = [], trials_module.refit

    def refit(model, targets, groups, loaders, *rest, **options):
        seen.append([batch for loader in loaders for batch in loader])
        return plain(model, targets, groups, loaders, *rest, **options)

    monkeypatch.setattr(trials_module, "refit", refit)
    calibration, held_out, more = parts
    _, report = compressed(calibration, held_out, unlabelled(more))
    assert len(seen) == 1
    assert len(seen[0]) == CALIBRATED // 2 + len(more)
    assert all("labels" not in batch for batch in seen[0][-len(more) :])
    assert set(report.fingerprints) == {"calib_dataset", "calibration", "selection", "held_out", "refit"}


def test_it_changes_the_factors_and_nothing_that_came_before_them(parts):
    calibration, held_out, more = parts
    (one, without), (other, with_more) = compressed(calibration, held_out), compressed(calibration, held_out, more)
    assert without.calibration == with_more.calibration
    assert {n: layer.rank for n, layer in without.layers.items()} == {n: w.rank for n, w in with_more.layers.items()}
    if with_more.refitted:
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_judges_the_model_is_left_out_of_it(parts, caplog):
    calibration, held_out, more = parts
    expected, _ = compressed(calibration, held_out, more)
    found, _ = compressed(calibration, held_out, [*more, *held_out[:3], *calibration])
    assert f"{3 + CALIBRATED} of {len(more) + 3 + CALIBRATED} items of refit_dataset are in" in caplog.text
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def test_nothing_else_is_an_error(parts):
    calibration, held_out, _ = parts
    with pytest.raises(DataError, match="refit_dataset: all of its items"):
        compressed(calibration, held_out, held_out)
    with pytest.raises(DataError, match="refit_dataset: is empty"):
        compressed(calibration, held_out, [])


def test_what_is_not_finite_in_it_is_named_and_leaves_the_model():
    model, batch = vit(CALIBRATED + HELD_OUT + 8)
    pictures, before = split_batch(batch, 1), tensors_fingerprint(model.state_dict())
    more = unlabelled(pictures[-8:])
    more[3]["pixel_values"] = torch.full_like(more[3]["pixel_values"], torch.nan)
    compressor = LowRankCompressor(LosslessLowRankConfig(batch_size=4, selection_fraction=0.5))
    with pytest.raises(NumericalError, match=r"the refit met .* not finite .* refit_dataset"):
        compressor.compress(model, pictures[:-8], refit_dataset=more)
    assert tensors_fingerprint(model.state_dict()) == before


def test_a_model_cannot_be_certified_on_it(parts):
    calibration, held_out, more = parts
    dense, _ = bert_sequence_classification()
    model, report = compressed(calibration, held_out, more)
    with pytest.raises(CertificateError, match="made from"):
        verify(dense, model, more, used=report.fingerprints.values())
