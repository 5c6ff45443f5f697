"""The study of wrong verdicts: that it counts what it says, and that the rules are as seldom wrong as stated."""

import importlib.util
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from hf_lossless_lr import PairedOutcomes, certify
from hf_lossless_lr.verdict import certificate as certificate_module
from hf_lossless_lr.verdict.bounds import bootstrap_upper_bound, mean_upper_bound, proportion_p_value
from hf_lossless_lr.verdict.outcomes import TEMPERATURES
from hf_lossless_lr.verdict.temperatures import at_fitted_temperatures

STUDIES = Path(__file__).resolve().parents[2] / "studies"
LOGS = np.log(TEMPERATURES)
COUNT = 120


@pytest.fixture(scope="module")
def study():
    """The script that counts wrong verdicts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(STUDIES), *sys.path])
        yield importlib.import_module("verdict_error_rates")


@pytest.fixture
def quick(monkeypatch):
    """A bootstrap of fewer resamples, where the bounds may be any."""
    monkeypatch.setattr(certificate_module, "bootstrap_upper_bound", partial(bootstrap_upper_bound, resamples=299))


def outcomes(loss, tempered=None, lost=0, gained=0):
    """One answer an example, nine of ten right; the losses at temperatures are parabolas with vertex at 1."""
    count, dense = len(loss), np.random.default_rng(9).uniform(0.2, 0.4, len(loss))
    curve = dense + LOGS[:, None] ** 2
    answers = np.zeros((2, count), dtype=bool)
    answers[:, : round(0.9 * count)] = True
    answers[1, :lost] = False
    answers[1, count - gained :] = True
    return PairedOutcomes(
        loss=np.stack([dense, dense + loss]),
        units=np.ones(count, dtype=int),
        examples=count,
        by_example=True,
        right=answers,
        confidence=np.random.default_rng(8).uniform(0.5, 1, (2, count)),
        changed=answers[0] != answers[1],
        labels=np.arange(count) % 2,
        cluster_of_unit=np.arange(count),
        divergence=np.full(count, 0.25),
        tempered=np.stack([curve, curve + (loss if tempered is None else tempered)]),
    )


def losses_only(loss):
    """A head that does not classify, whose loss is known by batch only."""
    dense = np.full(len(loss), 0.3)
    return PairedOutcomes(np.stack([dense, dense + loss]), np.ones(len(loss), dtype=int), len(loss), False)


def tokens(units=5, examples=40):
    """A head with several answers an example."""
    generator = np.random.default_rng(0)
    right = generator.uniform(size=(2, examples, units)) < 0.8
    right[1] = np.where(generator.uniform(size=(examples, 1)) < 0.2, right[1], right[0])
    loss = np.full((2, examples), 0.3 * units)
    loss[1] += generator.normal(0.02, 0.1, (examples, units)).sum(1)
    return PairedOutcomes(
        loss=loss,
        units=np.full(examples, units),
        examples=examples,
        by_example=True,
        right=right.reshape(2, -1),
        labels=np.arange(examples * units) % 4,
        cluster_of_unit=np.repeat(np.arange(examples), units),
        tempered=loss[:, None] + units * LOGS[:, None] ** 2,
    )


def noise(count=COUNT):
    """Differences with a mean of 0."""
    values = np.random.default_rng(0).normal(0, 0.1, count)
    return values - values.mean()


def skewed(count=3000, seed=0):
    """Loss increases with a heavy tail to the right: skewness 1.4."""
    return np.random.default_rng(seed).gamma(2.0, 0.05, count)


@pytest.mark.usefixtures("quick")
class TestCounting:
    REPLICATIONS = 1500
    EXAMPLES = 400
    ALLOWED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPLICATIONS)

    def rates(self, study, bound):
        """Shares certified at true differences of 0, ½, 1 and 1½ margins."""
        increase, generator = skewed(), np.random.default_rng(1)
        options = (increase, np.ones(len(increase)), self.EXAMPLES, self.REPLICATIONS, {"rule": bound}, generator)
        bounds = study.draw_bounds(*options)["rule"]
        return {str(share): study.share_and_count(bounds, share)[0] for share in study.SHARES}

    def rule(self, study, differences, units):
        bca = study.bca_bound(differences, units, np.random.default_rng(2), 199)
        return np.maximum(study.t_bound(differences, units), bca)

    def test_wrong_verdicts_at_the_margin_are_as_rare_as_stated(self, study):
        rates = self.rates(study, lambda *sample: self.rule(study, *sample))
        assert 0.02 < rates["1.0"] <= self.ALLOWED
        assert rates["0.0"] > rates["0.5"] > rates["1.0"] > rates["1.5"]
        assert rates["1.5"] < 0.02

    def test_wrong_rules_are_found_out(self, study):
        def mean(differences, units):
            return differences.sum(1) / units.sum(1)

        def two_sided(differences, units):  # a bound at 90 % in place of 95 %
            middle = mean(differences, units)
            return middle + (study.t_bound(differences, units) - middle) * 1.2816 / 1.6449

        for rule in (mean, two_sided):
            assert self.rates(study, rule)["1.0"] > self.ALLOWED

    def test_the_wider_bound_is_counted_alike_where_few_bootstraps_decide(self, study, monkeypatch):
        monkeypatch.setattr(study, "RESAMPLES", 99)
        monkeypatch.setattr(study, "REPLICATIONS", 1500)
        monkeypatch.setattr(study, "BOOTSTRAPS", {50: 1500})
        records = study.loss_rates(skewed(), np.ones(3000), [50], np.random.default_rng(0))
        rates = {record["rule"]: record["certified"]["1.0"] for record in records}
        assert rates["wider of t and BCa"] <= min(rates["t"], rates["BCa"]) + 3 * math.sqrt(2 * 0.07 / 1500)
        assert rates["t, worst twice"] < rates["wider of t and BCa"] < rates["t"]
        assert all(record["replications"]["1.0"] == 1500 for record in records)

    def test_report_is_written_from_small_numbers(self, study, monkeypatch, tmp_path):
        small = {"SIZES": (40, 300), "BOOTSTRAPS": {40: 5, 300: 5}, "VERDICTS": {300: 5}, "CURVE": (50, 3000)}
        for name, value in {**small, "RESAMPLES": 99, "REPLICATIONS": 50, "CURVE_REPLICATIONS": 20}.items():
            monkeypatch.setattr(study, name, value)
        pairs = {"one": outcomes(skewed(500), lost=9, gained=5), "several": tokens()}
        results = {name: study.simulate(name, answers) for name, answers in pairs.items()}
        text = study.markdown(results)
        assert "| one | accuracy | 300 |" in text
        assert "| several | nothing lost | 300 | " in text
        study.write_records(tmp_path / "records.jsonl", study.to_records(results))
        assert study.from_records(study.read_records(tmp_path / "records.jsonl")) == results
        if importlib.util.find_spec("matplotlib"):
            study.plot(results, tmp_path / "plot.png")
            assert (tmp_path / "plot.png").stat().st_size > 10_000

    def test_wrong_verdicts_on_the_accuracy_are_as_rare_as_stated(self, study):
        sizes = (300, 1000)
        records = study.accuracy_rates(0.02, 0.01, sizes, np.random.default_rng(0), self.REPLICATIONS)
        tango = [record["certified"] for record in records if record["rule"] == "Tango"]
        assert [record["examples"] for record in records if record["rule"] == "Tango"] == list(sizes)
        for rates in tango:
            assert 0.02 < rates["1.0"] <= self.ALLOWED
            assert rates["0.0"] > rates["0.5"] > rates["1.0"] > rates["1.5"]

    @pytest.mark.parametrize(("loss", "drop", "wrong"), [(0.02, 0.0, True), (0.0, 0.05, True), (0.0, 0.0, False)])
    def test_whole_verdicts_are_seldom_wrong(self, study, monkeypatch, loss, drop, wrong):
        monkeypatch.setattr(study, "MARGIN", 0.02 if drop < 0.05 else 0.05)
        monkeypatch.setattr(study, "RESAMPLES", 99)
        population = outcomes(skewed(1000), lost=20, gained=30)
        rates = study.verdict_rates(population, loss, drop, 400, 60, seed=0)
        assert sum(rates["statuses"].values()) == pytest.approx(1)
        if wrong:
            assert rates["certified"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)
        else:
            assert rates["certified"] > 0.3

    def test_bounds_are_those_of_the_package(self, study):
        generator = np.random.default_rng(0)
        for examples in (31, 3000):  # the package draws 3000 examples in two parts
            units = generator.integers(1, 4, (2, examples))
            units[1] = 2
            differences = generator.exponential(1.0, (2, examples)) * units
            fast = study.t_bound(differences, units)
            assert fast == pytest.approx(
                [mean_upper_bound(*row, 0.95) for row in zip(differences, units, strict=True)]
            )
            for row in zip(differences, units, strict=True):
                expected = bootstrap_upper_bound(*row, 0.95, seed=5, resamples=999)
                found = study.bca_bound(*(x[None] for x in row), np.random.default_rng(5), 999)[0]
                assert found == pytest.approx(expected, rel=1e-9)
        same = study.bca_bound(np.full((1, 40), 0.5), np.ones((1, 40)), generator, 99)
        assert same == pytest.approx([0.5])

    def test_the_stricter_rule_counts_the_worst_example_twice(self, study):
        differences, units = np.array([1.0, 9.0, 2.0, 4.0]), np.array([1, 4, 1, 1])
        twice = mean_upper_bound([*differences, 4.0], [*units, 1], 0.95)
        assert study.worst_twice_bound(differences[None], units[None])[0] == pytest.approx(twice)

    @pytest.mark.parametrize("changed", [0.001, 0.02, 0.2])
    def test_the_power_of_the_accuracy_takes_the_deviation_that_the_test_takes(self, study, changed):
        count = 200_000
        share = round(changed * count / 2)
        true, assumed = study.answer_deviations(changed)
        assert true == pytest.approx(math.sqrt(changed))
        statistic = special.ndtri(proportion_p_value(share // 100, share // 100, count // 100, study.MARGIN))
        assert statistic == pytest.approx(-study.MARGIN * math.sqrt(count / 100) / assumed, rel=1e-6)

    @pytest.mark.parametrize(("loss", "drop"), [(0.0, 0.0), (0.01, 0.02), (0.03, 0.1)])
    def test_true_differences_are_as_wanted(self, study, loss, drop):
        population = outcomes(skewed(500), skewed(500, seed=1), lost=9, gained=6)
        shifted, chances = study.at_difference(population, loss, drop)
        assert chances.sum() == pytest.approx(1)
        assert (chances * shifted.loss_increase).sum() == pytest.approx(loss, abs=1e-12)
        assert (chances * shifted.accuracy_drop).sum() == pytest.approx(drop, abs=1e-12)
        _, increase = at_fitted_temperatures(replace(shifted, tempered=shifted.tempered * chances))
        assert increase.sum() == pytest.approx(loss, abs=1e-12)

    def test_clusters_are_taken_whole(self, study):
        answers = tokens()
        drawn = np.array([7, 0, 7, 39])
        taken = study.take(answers, drawn)
        assert taken.examples == taken.clusters == 4
        assert np.array_equal(taken.loss_increase, answers.loss_increase[drawn])
        assert np.array_equal(taken.accuracy_drop, answers.accuracy_drop[drawn])
        assert np.array_equal(taken.tempered, answers.tempered[:, :, drawn])
        assert np.array_equal(taken.labels, answers.labels.reshape(40, 5)[drawn].ravel())
        everything = study.take(answers, np.arange(40))
        assert certify(everything, 0.1, 0.1, 0.95).loss_increase == certify(answers, 0.1, 0.1, 0.95).loss_increase
        assert everything.accuracy == answers.accuracy

    def test_outcomes_survive_the_file(self, study, tmp_path):
        pairs = {"a, keep 0.5": outcomes(noise()), "b, keep 0.1": losses_only(noise())}
        study.save_outcomes(tmp_path / "outcomes", pairs)
        loaded = study.load_outcomes(tmp_path / "outcomes")
        assert list(loaded) == list(pairs)
        for name, answers in pairs.items():
            assert certify(loaded[name], 0.1, 0.5, 0.95) == certify(answers, 0.1, 0.5, 0.95)
