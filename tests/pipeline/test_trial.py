"""A trial: the refit is kept only if it brings the predictions closer to the dense model's."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from support.compressions import COUNT, build, check_same_state
from support.tiny_models import other_inputs, split_batch
from support.tolerances import FLOAT32

from hf_lossless_lr import LosslessLowRankConfig, paired_outcomes
from hf_lossless_lr.data.forward import forward_loss
from hf_lossless_lr.data.splits import split_data
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.pipeline import trial as trials_module
from hf_lossless_lr.pipeline.building import build_layers
from hf_lossless_lr.pipeline.calibration import calibrate
from hf_lossless_lr.pipeline.trial import Trial, run_trial
from hf_lossless_lr.ranks.select import select_budget
from hf_lossless_lr.ranks.sizes import Choice
from hf_lossless_lr.report.records import Difference
from hf_lossless_lr.timing import Clock
from hf_lossless_lr.verdict.certificate import accuracy_difference, loss_difference

pytestmark = pytest.mark.numerical

KEEP_RATIO = 0.3


def make_case(**options):
    """A calibration, choices for a third of the parameters, and the configuration."""
    model, batch = build("bert-sequence-classification")
    config = LosslessLowRankConfig(keep_ratio=KEEP_RATIO, **{"selection_fraction": 0.5} | options)
    parts = split_data(
        model,
        split_batch(batch, 2),
        [other_inputs(batch)],
        batch_size=config.batch_size,
        seed=config.seed,
        selection_fraction=config.selection_fraction,
    )
    calibration = calibrate(model, config, parts, find_targets(model))
    return calibration, select_budget(calibration.factors.curves, KEEP_RATIO), config


@pytest.fixture
def case():
    return make_case()


@pytest.fixture
def few_are_enough(monkeypatch):
    """Let a few examples judge a refit."""
    monkeypatch.setattr(trials_module, "FEWEST_JUDGES", 1)
    monkeypatch.setattr(trials_module, "FEWEST_FITTED", 1)


def states(layers):
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


def plain_and_refitted(calibration, choices, config):
    plain, refitted = (build_layers(calibration, choices, config) for _ in range(2))
    refitted = trials_module._with_heads(calibration, refitted)
    trials_module._refit(calibration, choices, refitted, calibration.parts.calibration, config, Clock())
    return plain, refitted


def outcomes_of(calibration, layers, loader):
    return paired_outcomes(calibration.dense.model, layers, loader, calibration.accelerator)


def force(monkeypatch, *changes):
    """Let the outcomes of a trial, one after the other, be the true ones with some attributes changed."""
    left = list(changes)

    def changed(*arguments, **options):
        return replace(paired_outcomes(*arguments, **options), **left.pop(0))

    monkeypatch.setattr(trials_module, "paired_outcomes", changed)
    return left


def divergence(value):
    return {"divergence": np.full(COUNT // 2, value)}


@pytest.mark.usefixtures("few_are_enough")
class TestRefit:
    @pytest.mark.parametrize("after", [0.5, 0.7, math.nan])
    def test_that_does_not_help_is_undone_bit_for_bit(self, case, after, monkeypatch):
        calibration, choices, config = case
        left = force(monkeypatch, divergence(0.5), divergence(after))
        trial = run_trial(calibration, choices, config, Clock())
        assert not trial.refitted
        assert left == []
        check_same_state(states(trial.layers), states(build_layers(calibration, choices, config)))

    def test_that_helps_is_kept(self, case, monkeypatch):
        calibration, choices, config = case
        force(monkeypatch, divergence(0.5), divergence(0.499))
        trial = run_trial(calibration, choices, config, Clock())
        assert trial.refitted
        plain = trials_module._with_heads(calibration, build_layers(calibration, choices, config))
        plain, kept = states(plain), states(trial.layers)
        assert kept.keys() == plain.keys()
        assert any(not torch.equal(kept[name], plain[name]) for name in plain)

    @pytest.mark.parametrize("options", [{}, {"selection_fraction": 0.0}], ids=["selection split", "calibration data"])
    def test_is_kept_exactly_if_the_root_of_the_divergence_falls(self, options):
        """In the mean over the selection split, or else over the calibration data."""
        calibration, choices, config = make_case(**options)
        plain, refitted = plain_and_refitted(calibration, choices, config)
        loader = calibration.parts.selection if not options else calibration.parts.calibration
        outcomes = [outcomes_of(calibration, layers, loader) for layers in (plain, refitted)]
        before, after = (np.sqrt(np.maximum(found.divergence, 0)).mean() for found in outcomes)
        trial = run_trial(calibration, choices, config, Clock())
        assert before != after
        assert trial.refitted == (after < before)
        check_same_state(states(trial.layers), states(refitted if after < before else plain))

    def test_lowers_the_divergence_on_the_data_it_is_fitted_to(self, case):
        calibration, choices, config = case
        plain, refitted = plain_and_refitted(calibration, choices, config)
        loader = calibration.parts.calibration
        before, after = (outcomes_of(calibration, x, loader).mean_divergence for x in (plain, refitted))
        assert after < before

    @pytest.mark.parametrize("helps", [True, False])
    def test_is_judged_by_the_loss_where_the_head_does_not_classify(self, case, helps, monkeypatch):
        calibration, choices, config = case
        loss = np.array([[0.0] * 3, [0.5] * 3])
        lower = np.array([[0.9] * 3, [0.499 if helps else 0.5] * 3])
        no_answers = {"divergence": None, "right": None, "units": np.array([2] * 3)}
        force(monkeypatch, no_answers | {"loss": loss}, no_answers | {"loss": lower})
        assert run_trial(calibration, choices, config, Clock()).refitted is helps

    def test_is_not_tried_where_it_is_not_asked_for(self, monkeypatch):
        monkeypatch.setattr(trials_module, "_refit", lambda *_: pytest.fail("a refit"))
        calibration, choices, config = make_case(refit=False)
        trial = run_trial(calibration, choices, config, Clock())
        assert not trial.refitted
        check_same_state(states(trial.layers), states(build_layers(calibration, choices, config)))

    def test_of_no_layer_is_not_tried(self, case, monkeypatch):
        monkeypatch.setattr(trials_module, "_refit", lambda *_: pytest.fail("a refit"))
        calibration, choices, config = case
        trial = run_trial(calibration, dict.fromkeys(choices, Choice()), config, Clock())
        assert (trial.layers, trial.refitted) == ({}, False)
        assert (trial.loss.mean, trial.accuracy_drop.mean) == (0.0, 0.0)


class TestRefitOnFewExamples:
    """The selection split of a case has three examples: cross-validation decides."""

    def folds(self, monkeypatch, gains):
        """Let the divergence of each unseen part fall by a gain; return what the refits were fitted to."""
        fitted, seen, left = [], [], itertools.cycle(gains)

        def outcomes(dense, layers, loader, *arguments, **options):
            found = paired_outcomes(dense, layers, loader, *arguments, **options)
            if loader in (calibration.parts.selection, calibration.parts.calibration):
                return found
            seen.append(list(loader.dataset.indices))
            value = 1.0 if len(seen) % 2 else 1.0 - next(left)
            return replace(found, divergence=np.full(len(found.divergence), value))

        plain = trials_module.refit

        def refit(model, targets, groups, loaders, *rest, **options):
            fitted.append(list(getattr(loaders[0].dataset, "indices", [])))
            return plain(model, targets, groups, loaders, *rest, **options)

        calibration, choices, config = make_case(selection_fraction=0.17)
        monkeypatch.setattr(trials_module, "paired_outcomes", outcomes)
        monkeypatch.setattr(trials_module, "refit", refit)
        return run_trial(calibration, choices, config, Clock()), fitted, seen

    def test_is_made_where_unseen_examples_show_that_it_helps(self, monkeypatch):
        trial, fitted, seen = self.folds(monkeypatch, [0.5, 0.51, 0.52])
        assert trial.refitted
        *parts, everything = fitted
        assert seen[::2] == seen[1::2]
        items = sorted(item for unseen in seen[::2] for item in unseen)
        assert items == list(range(len(everything)))
        for part, unseen in zip(parts, seen[::2], strict=True):
            assert sorted([*part, *unseen]) == items

    @pytest.mark.parametrize("gains", [[-0.1, -0.11, -0.12], [3.0, -1.0, -1.9], [0.0, 0.0, 0.0]])
    def test_is_not_made_otherwise(self, gains, monkeypatch, caplog):
        trial, fitted, seen = self.folds(monkeypatch, gains)
        assert not trial.refitted
        assert len(fitted) == len(seen) // 2
        assert "not refitted" in caplog.text

    def test_leaves_the_factors_bit_for_bit_where_it_is_not_made(self, case, monkeypatch):
        calibration, choices, config = case
        monkeypatch.setattr(trials_module, "mean_upper_bound", lambda *_: 0.1)
        trial = run_trial(calibration, choices, config, Clock())
        check_same_state(states(trial.layers), states(build_layers(calibration, choices, config)))

    def test_is_that_of_all_calibration_data_where_it_is_made(self, case, monkeypatch):
        calibration, choices, config = case
        monkeypatch.setattr(trials_module, "mean_upper_bound", lambda *_: -0.1)
        _, refitted = plain_and_refitted(calibration, choices, config)
        trial = run_trial(calibration, choices, config, Clock())
        assert trial.refitted
        check_same_state(states(trial.layers), states(refitted))


@pytest.mark.usefixtures("few_are_enough")
class TestTrial:
    def test_leaves_the_model_dense(self, case):
        calibration, choices, config = case
        modules = dict(calibration.dense.model.named_modules())
        run_trial(calibration, choices, config, Clock())
        after = dict(calibration.dense.model.named_modules())
        assert after.keys() == modules.keys()
        assert all(after[name] is module for name, module in modules.items())

    def test_measures_the_increase_on_the_selection_split(self, case):
        calibration, choices, config = case
        trial = run_trial(calibration, choices, config, Clock())
        parts = list(calibration.parts.selection)
        assert sum(len(part["labels"]) for part in parts) == COUNT // 2
        losses, right = [], []
        model = calibration.dense.model
        with torch.no_grad():
            for _ in range(2):
                logits = torch.cat([model(**part).logits for part in parts]).double()
                labels = torch.cat([part["labels"] for part in parts])
                losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy())
                right.append((logits.argmax(-1) == labels).double().mean().item())
                for name, layer in trial.layers.items():
                    model.set_submodule(name, layer)
        differences = losses[1] - losses[0]
        assert trial.increase == pytest.approx(differences.mean(), abs=10 * FLOAT32)
        assert trial.accuracy_drop.mean == pytest.approx(right[0] - right[1])
        reach = stats.t.ppf(config.confidence, len(differences) - 1) * stats.sem(differences)
        assert trial.loss.upper == pytest.approx(differences.mean() + reach, abs=20 * FLOAT32)
        assert trial.loss.lower == pytest.approx(differences.mean() - reach, abs=20 * FLOAT32)

    @pytest.mark.parametrize("refitted", [True, False])
    def test_measures_the_layers_it_ends_with(self, case, refitted, monkeypatch):
        calibration, choices, config = case
        chosen = plain_and_refitted(calibration, choices, config)[refitted]
        measured = outcomes_of(calibration, chosen, calibration.parts.selection)
        force(monkeypatch, divergence(0.5), divergence(0.4 if refitted else 0.6))
        trial = run_trial(calibration, choices, config, Clock())
        loss = loss_difference(measured.loss_increase, measured.units, config.confidence, bootstrap=False)
        assert trial.loss == loss
        assert trial.accuracy_drop == accuracy_difference(measured, config.confidence, bootstrap=False)

    def test_without_a_selection_split_measures_nothing_and_passes_no_margin(self):
        trial = run_trial(*make_case(selection_fraction=0.0), Clock())
        assert trial.loss is trial.accuracy_drop is None
        assert trial.increase == 0.0
        assert not trial.passes(math.inf, 1.0)

    def test_with_nothing_to_choose_reads_no_data(self, monkeypatch):
        calibration, choices, config = make_case(selection_fraction=0.0, refit=False)
        monkeypatch.setattr(trials_module, "paired_outcomes", lambda *_: pytest.fail("a measurement"))
        trial = run_trial(calibration, choices, config, Clock())
        assert trial.layers
        assert trial.loss is None

    @pytest.mark.parametrize(("fraction", "part"), [(0.5, "selection"), (0.0, "calibration")])
    def test_never_reads_the_evaluation_data(self, fraction, part, monkeypatch):
        calibration, choices, config = make_case(selection_fraction=fraction)
        seen = []

        def watch(dense, compressed, loader, *arguments, **options):
            seen.append(loader)
            return paired_outcomes(dense, compressed, loader, *arguments, **options)

        monkeypatch.setattr(trials_module, "paired_outcomes", watch)
        run_trial(calibration, choices, config, Clock())
        assert seen == [getattr(calibration.parts, part)] * 2

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
        loss, drop = (None if upper is None else Difference(-1.0, -2.0, upper) for upper in (loss, drop))
        assert Trial({}, {}, False, loss, drop).passes(0.01, 0.02) is passes


@pytest.mark.usefixtures("few_are_enough")
class TestTheDenseModel:
    def test_answers_the_selection_split_once_for_all_trials(self, case, monkeypatch):
        calibration, choices, config = case
        first = run_trial(calibration, choices, config, Clock())
        batches, calls = len(calibration.parts.selection), []

        def count(*arguments):
            calls.append(1)
            return forward_loss(*arguments)

        monkeypatch.setattr("hf_lossless_lr.verdict.answers.forward_loss", count)
        second = run_trial(calibration, choices, config, Clock())
        assert (second.loss, second.accuracy_drop) == (first.loss, first.accuracy_drop)
        assert len(calls) == 2 * batches  # the compressed model, before and after the refit


def test_building_layers_draws_no_random_numbers(case):
    state = torch.get_rng_state()
    assert build_layers(*case)
    assert torch.equal(torch.get_rng_state(), state)
