"""A trial: the refit is kept only if it brings the predictions closer to the dense model's."""

import math

import pytest
import torch
from compressions import COUNT, build, check_same_state
from tiny_models import split_batch

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr import trials as trials_module
from hf_lossless_lr.rank_selection import select_budget
from hf_lossless_lr.trials import Trial, build_layers, run_trial
from hf_lossless_lr.verification import PairedDifference, mean_divergence


@pytest.fixture
def case():
    """A calibration, ranks for a third of the parameters, and the configuration."""
    model, batch = build("bert-sequence-classification")
    config = LosslessLowRankConfig(keep_ratio=0.3, selection_fraction=0.5)
    compressor = LowRankCompressor(config)
    compressor.calibrate(model, split_batch(batch, 2), eval_dataset=[batch])
    calibration = compressor._calibration
    return calibration, select_budget(calibration.curves, 0.3), config


def states(layers):
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


def force(monkeypatch, before, after):
    values = iter((before, after))
    monkeypatch.setattr(trials_module, "mean_divergence", lambda *_: next(values))


class TestRefit:
    @pytest.mark.parametrize("after", [0.5, 0.7, math.nan])
    def test_that_does_not_help_is_undone_bit_for_bit(self, case, after, monkeypatch):
        calibration, ranks, config = case
        force(monkeypatch, 0.5, after)
        trial = run_trial(calibration, ranks, config)
        assert not trial.refitted
        check_same_state(states(trial.layers), states(build_layers(calibration, ranks, config.storage)))

    def test_that_helps_is_kept(self, case, monkeypatch):
        calibration, ranks, config = case
        force(monkeypatch, 0.5, 0.499)
        trial = run_trial(calibration, ranks, config)
        assert trial.refitted
        plain, kept = states(build_layers(calibration, ranks, config.storage)), states(trial.layers)
        assert kept.keys() == plain.keys()
        assert any(not torch.equal(kept[name], plain[name]) for name in plain)

    def test_is_kept_exactly_if_the_divergence_on_the_selection_split_falls(self, case):
        calibration, ranks, config = case
        plain = build_layers(calibration, ranks, config.storage)
        refitted = build_layers(calibration, ranks, config.storage)
        trials_module._refit(calibration, refitted, config.damping)
        loader, accelerator = calibration.data.selection, calibration.accelerator
        before, after = (mean_divergence(calibration.model, x, loader, accelerator) for x in (plain, refitted))
        trial = run_trial(calibration, ranks, config)
        assert before != after
        assert trial.refitted == (after < before)
        check_same_state(states(trial.layers), states(refitted if after < before else plain))

    def test_lowers_the_divergence_on_the_data_it_is_fitted_to(self, case):
        calibration, ranks, config = case
        plain = build_layers(calibration, ranks, config.storage)
        refitted = build_layers(calibration, ranks, config.storage)
        trials_module._refit(calibration, refitted, config.damping)
        loader, accelerator = calibration.data.calibration, calibration.accelerator
        before, after = (mean_divergence(calibration.model, x, loader, accelerator) for x in (plain, refitted))
        assert after < before

    def test_compares_losses_where_the_head_does_not_classify(self, case, monkeypatch):
        calibration, ranks, config = case
        monkeypatch.setattr(trials_module, "mean_divergence", lambda *_: None)
        plain = build_layers(calibration, ranks, config.storage)
        trial = run_trial(calibration, ranks, config)
        losses = [trials_module._distance(calibration, layers) for layers in (plain, trial.layers)]
        assert trial.refitted == (losses[1] < losses[0])
        assert trial.refitted or losses[1] == losses[0]


class TestTrial:
    def test_leaves_the_model_dense(self, case):
        calibration, ranks, config = case
        modules = dict(calibration.model.named_modules())
        run_trial(calibration, ranks, config)
        after = dict(calibration.model.named_modules())
        assert after.keys() == modules.keys()
        assert all(after[name] is module for name, module in modules.items())

    def test_measures_the_increase_on_the_selection_split(self, case):
        calibration, ranks, config = case
        trial = run_trial(calibration, ranks, config)
        parts = list(calibration.data.selection)
        assert sum(len(part["labels"]) for part in parts) == COUNT // 2
        model = calibration.model
        losses = []
        with torch.no_grad():
            losses.append(sum(model(**part).loss.item() for part in parts) / len(parts))
            for name, layer in trial.layers.items():
                model.set_submodule(name, layer)
            losses.append(sum(model(**part).loss.item() for part in parts) / len(parts))
        assert trial.increase == pytest.approx(losses[1] - losses[0], abs=1e-6)
        assert trial.loss.upper > trial.loss.mean

    @pytest.mark.parametrize(
        ("loss", "drop", "passes"),
        [
            (0.01, 0.02, True),
            (0.0101, 0.0, False),
            (0.0, 0.0201, False),
            (0.01, None, True),
            (math.inf, 0.0, False),
            (None, None, False),
        ],
    )
    def test_passes_if_both_upper_bounds_are_inside_the_margins(self, loss, drop, passes):
        loss, drop = (None if upper is None else PairedDifference(-1.0, upper) for upper in (loss, drop))
        assert Trial({}, {}, False, loss, drop).passes(0.01, 0.02) is passes
