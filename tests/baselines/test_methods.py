"""Methods that have layers of their own, compared with those that options make up."""

from pathlib import Path

import pytest
import torch
from support.tiny_models import TINY_MODELS, split_batch

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.baselines import METHODS, compare, method_config
from hf_lossless_lr.baselines.methods import BASELINES
from hf_lossless_lr.checkpoint.presets import COMPARED_ONLY, PRESETS
from hf_lossless_lr.errors import ConfigurationError, TargetError
from hf_lossless_lr.fingerprint import tensors_fingerprint
from hf_lossless_lr.layers import find_targets, replace_modules
from hf_lossless_lr.pipeline import LowRankCompressor, verify

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def network():
    model, batch = TINY_MODELS["resnet"](120)
    return model, split_batch(batch, 30)


def test_every_method_has_one_name():
    assert list(METHODS) == [*PRESETS, *BASELINES]
    assert list(BASELINES) == list(COMPARED_ONLY)


def test_a_method_is_judged_as_the_copy_that_it_makes_would_be(network):
    model, data = network
    before, modules = tensors_fingerprint(model.state_dict()), dict(model.named_modules())
    (found,) = compare(model, data[:2], methods=["separable"], keep_ratios=[0.5], eval_dataset=data[2:])
    assert tensors_fingerprint(model.state_dict()) == before
    assert dict(model.named_modules()) == modules
    copy, _ = TINY_MODELS["resnet"](120)
    targets = find_targets(copy).chosen
    layers = BASELINES["separable"].layers(targets, 0.5)
    replace_modules(copy, layers)
    certificate = verify(model, copy, data[2:])
    assert found.loss_increase == pytest.approx(certificate.loss[1] - certificate.loss[0])
    assert found.accuracy_change == pytest.approx(certificate.accuracy[1] - certificate.accuracy[0])
    assert found.divergence == pytest.approx(certificate.divergence)
    assert found.status == certificate.status
    numbers = [sum(tensor.numel() for tensor in m.state_dict().values()) for m in (model, copy)]
    assert found.bytes == pytest.approx(numbers[1] / numbers[0], abs=0.01)  # which has some integers, too
    weights = [
        sum(p.numel() for layer in each.values() for name, p in layer.named_parameters() if "bias" not in name)
        for each in (targets, layers)
    ]
    assert found.parameters == pytest.approx(weights[1] / weights[0])
    assert 0.4 < found.parameters <= 0.5


def test_a_method_and_options_share_the_sequence_of_verdicts(network):
    model, data = network
    compressor = LowRankCompressor(
        LosslessLowRankConfig(loss_margin=9.0, accuracy_margin=1.0, **PRESETS["svd"].options)
    )
    compressor.calibrate(model, data[:2], eval_dataset=data[2:])
    make = BASELINES["separable"].layers
    assert compressor.judge(lambda layers: {}).certificate is None  # the dense model, which is no part of it
    first = compressor.judge(lambda layers: make(layers, 0.6))
    assert first.certificate.status in ("lossless", "inconclusive")
    assert compressor.judge(lambda layers: make(layers, 0.7)).certificate is None  # out of order
    compressor.compress_to(0.45)
    assert "a model that keeps more was not certified" in " ".join(compressor.report.certificate.reasons)
    compressor.restore()


def test_a_method_that_fails_leaves_the_model_and_the_next_one_goes_on(network, caplog):
    model, data = network
    before = tensors_fingerprint(model.state_dict())
    options = {"methods": ["separable", "svd"], "eval_dataset": data[2:], "rank_multiple": 1}
    with caplog.at_level("WARNING"):
        found = list(compare(model, data[:2], keep_ratios=[0.5, 0.001], **options))
    assert [(result.method, result.keep_ratio) for result in found] == [("separable", 0.5), ("svd", 0.5)]
    assert (
        sum("is left out at 0.001: keep_ratio=0.001 cannot be reached in" in r.getMessage() for r in caplog.records)
        == 2
    )
    assert tensors_fingerprint(model.state_dict()) == before


def test_a_changed_model_is_not_judged(network):
    model, data = TINY_MODELS["resnet"](120)[0], network[1]
    compressor = LowRankCompressor(method_config("separable"))
    with pytest.raises(ConfigurationError, match=r"judge\(\) needs a calibration"):
        compressor.judge(dict)
    with pytest.raises(ConfigurationError, match=r"^calibration_data needs a calibration"):
        _ = compressor.calibration_data
    compressor.calibrate(model, data[:2], eval_dataset=data[2:])
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(TargetError, match="changed since it was calibrated"):
        compressor.judge(dict)


def test_the_documents_list_every_method_with_its_source_and_difference():
    text = (DOCS / "comparing.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells[2:-1] for line in text.splitlines() if len(cells := line.split("|")) == 6}
    assert [name for name in rows if name in BASELINES] == list(BASELINES)
    for name, method in BASELINES.items():
        assert [cell.strip() for cell in rows[name][1:]] == [method.source, method.differs]
