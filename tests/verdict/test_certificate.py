"""Certificates: what each status takes, and what can never be certified."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy import optimize, special, stats
from support.tiny_models import bert_sequence_classification, bert_token_classification, llama, split_batch

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.data.loaders import make_dataloader
from hf_lossless_lr.errors import CertificateError
from hf_lossless_lr.pipeline.summary import certificate_of
from hf_lossless_lr.verdict import certificate as certificate_module
from hf_lossless_lr.verdict.bounds import (
    bootstrap_upper_bound,
    examples_needed,
    expected_calibration_error,
    mean_p_value,
    mean_upper_bound,
    proportion_p_value,
    proportion_upper_bound,
)
from hf_lossless_lr.verdict.certificate import (
    CERTIFIED,
    accuracy_difference,
    certify,
    certify_together,
    demoted,
    loss_difference,
)
from hf_lossless_lr.verdict.outcomes import TEMPERATURES, PairedOutcomes, paired_outcomes
from hf_lossless_lr.verdict.temperatures import INTERPOLATED, at_fitted_temperatures

COUNT = 120
LOGS = np.log(TEMPERATURES)
TEMPERATURE_ERROR = 0.01  # relative, of a fitted temperature: a parabola through three points a factor 2^¼ apart
FITTED_LOSS_ERROR = 5e-4  # nats, of a mean loss at a fitted temperature; the default margin is 20 times that
ENDPOINTS = {"loss": "loss_increase", "tempered": "tempered_loss_increase", "accuracy": "accuracy_drop"}


def noise(mean, deviation=0.1, count=COUNT, seed=0):
    """Differences with the given mean exactly."""
    values = np.random.default_rng(seed).normal(0, deviation, count)
    return values - values.mean() + mean


def outcomes(loss, tempered=None, lost=0, gained=0, right=0.9):
    """One answer an example, by given loss increases; the losses at temperatures are parabolas with vertex at 1."""
    count, dense = len(loss), np.random.default_rng(9).uniform(0.2, 0.4, len(loss))
    curve = dense + LOGS[:, None] ** 2
    answers = np.zeros((2, count), dtype=bool)
    answers[:, : round(right * count)] = True
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


def losses_only(loss, units=None, by_example=True, examples=None):
    """A head that does not classify."""
    units = np.ones(len(loss), dtype=int) if units is None else units
    dense = 0.3 * units
    return PairedOutcomes(
        np.stack([dense, dense + loss]), units, len(loss) if examples is None else examples, by_example
    )


def from_logits(dense, compressed, labels):
    """The answers of two classifiers with the given logits."""
    logs = [special.log_softmax(logits, axis=1) for logits in (dense, compressed)]

    def losses(temperature):
        scaled = [special.log_softmax(log / temperature, axis=1) for log in logs]
        return -np.stack([log[np.arange(len(labels)), labels] for log in scaled])

    right = np.stack([log.argmax(1) == labels for log in logs])
    return PairedOutcomes(
        loss=losses(1.0),
        units=np.ones(len(labels), dtype=int),
        examples=len(labels),
        by_example=True,
        right=right,
        confidence=np.stack([np.exp(log.max(1)) for log in logs]),
        changed=logs[0].argmax(1) != logs[1].argmax(1),
        labels=labels,
        cluster_of_unit=np.arange(len(labels)),
        divergence=(np.exp(logs[0]) * (logs[0] - logs[1])).sum(1),
        tempered=np.stack([losses(temperature) for temperature in TEMPERATURES], axis=1),
    )


def logits(count=600, classes=3, spread=2.0, seed=0):
    """Logits of a model that is as sure as it should be, and labels."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, spread, (count, classes))
    return values, (values + generator.gumbel(size=values.shape)).argmax(1)


def case(endpoint):
    """Outcomes that are clearly worse in one respect only."""
    good = noise(0.0, 0.01, seed=1)
    if endpoint == "accuracy":
        return outcomes(good, lost=12, gained=4)
    worse = noise(0.05)
    return outcomes(worse, good) if endpoint == "loss" else outcomes(good, worse)


def judge(answers, endpoint="loss", margin=0.5):
    """Certify with a margin for one endpoint, and wide ones for the others."""
    loss_margin, accuracy_margin = (0.5, margin) if endpoint == "accuracy" else (margin, 0.5)
    return certify(answers, loss_margin, accuracy_margin, 0.95)


def difference(certificate, endpoint):
    return getattr(certificate, ENDPOINTS[endpoint])


@pytest.fixture
def quick(monkeypatch):
    """A bootstrap of fewer resamples, where the bounds may be any."""
    monkeypatch.setattr(certificate_module, "bootstrap_upper_bound", partial(bootstrap_upper_bound, resamples=299))


@pytest.fixture
def t_alone(monkeypatch):
    """Bounds by Student's t: the bootstrap never is the wider one."""
    monkeypatch.setattr(certificate_module, "bootstrap_upper_bound", lambda *_: -math.inf)


@pytest.mark.usefixtures("quick")
class TestStatus:
    @pytest.mark.parametrize("endpoint", ENDPOINTS)
    def test_is_lossless_exactly_up_to_the_upper_bound(self, endpoint):
        upper = difference(judge(case(endpoint), endpoint), endpoint).upper
        assert judge(case(endpoint), endpoint, upper).status == "lossless"
        assert judge(case(endpoint), endpoint, math.nextafter(upper, 0)).status == "inconclusive"

    @pytest.mark.parametrize("endpoint", ENDPOINTS)
    def test_is_lossy_exactly_beyond_the_lower_bound(self, endpoint):
        lower = difference(judge(case(endpoint), endpoint), endpoint).lower
        assert lower > 0
        assert judge(case(endpoint), endpoint, lower).status == "inconclusive"
        assert judge(case(endpoint), endpoint, math.nextafter(lower, 0)).status == "lossy"

    @pytest.mark.parametrize("endpoint", ["loss", "tempered"])
    @pytest.mark.parametrize(("shift", "status"), [(-1e-9, "improved"), (1e-9, "lossless")])
    def test_is_improved_exactly_if_both_losses_are_lower(self, endpoint, shift, status):
        """The one at fitted temperatures by more than what its interpolation may be off."""
        better, differences = noise(-0.5, seed=1), noise(-0.5)
        shift -= INTERPOLATED if endpoint == "tempered" else 0
        differences = differences - loss_difference(differences, np.ones(COUNT), 0.95, True).upper + shift
        pair = (differences, better) if endpoint == "loss" else (better, differences)
        certificate = judge(outcomes(*pair))
        assert difference(certificate, endpoint).upper == pytest.approx(shift, abs=1e-12)
        assert certificate.status == status

    def test_is_not_improved_where_one_loss_is_the_same(self):
        same, better = np.zeros(COUNT), noise(-0.5)
        for pair in ((same, better), (better, same)):
            certificate = judge(outcomes(*pair))
            assert 0.0 in (certificate.loss_increase.upper, certificate.tempered_loss_increase.upper)
            assert certificate.status == "lossless"

    def test_is_not_improved_where_losses_at_temperatures_are_unknown(self):
        answers = outcomes(noise(-0.5))
        assert judge(answers).status == "improved"
        certificate = judge(replace(answers, tempered=None))
        assert certificate.status == "lossless"
        assert certificate.temperatures is None
        assert certificate.tempered_loss_increase is None

    @pytest.mark.parametrize(("lost", "status"), [(3, "improved"), (10, "inconclusive"), (30, "lossy")])
    def test_of_a_lower_loss_depends_on_the_accuracy(self, lost, status):
        assert judge(outcomes(noise(-0.5), lost=lost), "accuracy", 0.1).status == status

    def test_of_a_much_better_accuracy_depends_on_the_loss(self):
        answers = outcomes(noise(0.05), gained=12)
        assert answers.accuracy[1] > answers.accuracy[0]
        assert judge(answers, margin=0.06).status == "inconclusive"
        assert judge(answers, margin=0.01).status == "lossy"

    def test_of_a_model_that_answers_the_same_is_lossless_without_a_margin_for_the_loss(self):
        certificate = judge(outcomes(np.zeros(COUNT)), margin=0.0)
        assert certificate.status == "lossless"
        assert certificate.reasons == ()

    def test_of_a_head_that_does_not_classify_depends_on_the_loss_alone(self):
        assert certify(losses_only(noise(0.0)), 0.1, 0.0, 0.95).status == "lossless"
        assert certify(losses_only(noise(0.1)), 0.1, 0.0, 0.95).status == "inconclusive"
        assert certify(losses_only(noise(0.2)), 0.1, 0.0, 0.95).status == "lossy"

    def test_gets_harder_with_the_confidence(self):
        statuses = [certify(outcomes(noise(0.05)), 0.07, 0.5, confidence).status for confidence in (0.9, 0.999)]
        assert statuses == ["lossless", "inconclusive"]


@pytest.mark.usefixtures("quick")
class TestVerdict:
    @pytest.mark.parametrize(
        ("loss_margin", "accuracy_margin", "text"),
        [
            (0.5, 0.5, "lossless@(0.5 nats, 50 points)"),
            (0.5, 0.1, "lossless@(0.5 nats, 10 points)"),
            (0.25, 0.03, "lossless@(0.25 nats, 3 points)"),
            (0.01, 1.0, "lossless@(0.01 nats, 100 points)"),
        ],
    )
    def test_states_the_margins(self, loss_margin, accuracy_margin, text):
        assert certify(outcomes(noise(0.0, 0.01)), loss_margin, accuracy_margin, 0.95).verdict == text

    def test_of_one_point_is_singular(self):
        certificate = replace(judge(outcomes(noise(0.0))), accuracy_margin=0.01)
        assert certificate.verdict == "lossless@(0.5 nats, 1 point)"

    def test_states_no_points_where_there_is_no_accuracy(self):
        assert certify(losses_only(noise(0.0)), 0.1, 0.01, 0.95).verdict == "lossless@(0.1 nats)"

    @pytest.mark.parametrize(("mean", "status"), [(-0.5, "improved"), (0.1, "inconclusive"), (0.5, "lossy")])
    def test_is_the_bare_status_otherwise(self, mean, status):
        assert judge(outcomes(noise(mean)), margin=0.1).verdict == status


class TestBounds:
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("clustered", [False, True])
    def test_of_a_loss_are_the_wider_of_t_and_bootstrap(self, sign, clustered):
        generator = np.random.default_rng(3)
        units = generator.integers(1, 6, 60) if clustered else np.ones(60, dtype=int)
        differences = sign * generator.exponential(1.0, 60) * units
        found = loss_difference(differences, units, 0.9, bootstrap=True)
        uppers = [f(differences, units, 0.9) for f in (mean_upper_bound, bootstrap_upper_bound)]
        lowers = [-f(-differences, units, 0.9) for f in (mean_upper_bound, bootstrap_upper_bound)]
        assert (found.upper, found.lower) == (max(uppers), min(lowers))
        assert found.mean == pytest.approx(differences.sum() / units.sum())
        wider = uppers[1] > uppers[0], lowers[1] < lowers[0]
        assert wider == ((True, False) if sign > 0 else (False, True))  # on the side of the tail

    def test_of_a_trial_are_those_of_t(self):
        differences, units = noise(0.1), np.ones(COUNT)
        found = loss_difference(differences, units, 0.9, bootstrap=False)
        assert found.upper == mean_upper_bound(differences, units, 0.9)
        assert found.lower == -mean_upper_bound(-differences, units, 0.9)

    def test_in_a_certificate_are_the_wider_ones_of_all_losses(self):
        skewed = np.random.default_rng(3).exponential(0.1, COUNT)
        answers = outcomes(skewed, 2 * skewed)
        certificate = judge(answers)
        assert certificate.loss_increase == loss_difference(skewed, answers.units, 0.95, bootstrap=True)
        tempered = loss_difference(2 * skewed, answers.units, 0.95, bootstrap=True)
        assert certificate.tempered_loss_increase.upper == pytest.approx(tempered.upper, rel=1e-9)
        assert certificate.tempered_loss_increase.lower == pytest.approx(tempered.lower, rel=1e-9)
        assert certificate.loss_increase.upper > mean_upper_bound(skewed, answers.units, 0.95)


def tokens(copies=1, units=5, examples=40, seed=0):
    """A head with several answers an example; `copies` repeats each token within its example."""
    generator = np.random.default_rng(seed)
    right = generator.uniform(size=(2, examples, units)) < 0.8
    right[1] = np.where(generator.uniform(size=(examples, 1)) < 0.2, right[1], right[0])
    increase = np.repeat(generator.normal(0.02, 0.1, (examples, units)), copies, axis=1)
    right = np.repeat(right, copies, axis=2).reshape(2, -1)
    count = units * copies
    loss = np.stack([np.full(examples, 0.3 * count), 0.3 * count + increase.sum(1)])
    return PairedOutcomes(
        loss=loss,
        units=np.full(examples, count),
        examples=examples,
        by_example=True,
        right=right,
        labels=np.arange(right.shape[1]) % 4,
        cluster_of_unit=np.repeat(np.arange(examples), count),
        tempered=loss[:, None] + count * LOGS[:, None] ** 2,
    )


class TestAccuracy:
    @pytest.mark.parametrize("bootstrap", [True, False])
    def test_of_one_answer_an_example_is_bounded_by_tango(self, bootstrap):
        found = accuracy_difference(outcomes(noise(0.0), lost=7, gained=3), 0.95, bootstrap)
        assert found.mean == pytest.approx(4 / COUNT)
        assert found.upper == proportion_upper_bound(7, 3, COUNT, 0.95)
        assert found.lower == -proportion_upper_bound(3, 7, COUNT, 0.95)

    @pytest.mark.parametrize("bootstrap", [True, False])
    def test_of_several_answers_an_example_is_bounded_like_a_loss(self, bootstrap):
        answers = tokens()
        drop = (answers.right[0].astype(int) - answers.right[1]).reshape(40, 5).sum(1)
        found = accuracy_difference(answers, 0.95, bootstrap)
        assert found == loss_difference(drop, answers.units, 0.95, bootstrap)
        assert found.mean == pytest.approx(drop.sum() / 200)

    def test_of_a_loss_that_is_known_by_batch_is_bounded_by_the_answers_to_examples(self):
        """By batch, a few changed answers could be missed by a bound of t; where none changed, it would be 0."""
        for lost in (0, 7):
            by_example = outcomes(noise(0.0), lost=lost)
            batches = np.arange(COUNT) // 4
            by_batch = replace(
                losses_only(np.bincount(batches, noise(0.0)), np.bincount(batches), False, COUNT),
                right=by_example.right,
                cluster_of_unit=batches,
                example_of_unit=np.arange(COUNT),
            )
            expected = accuracy_difference(by_example, 0.95, False)
            assert accuracy_difference(by_batch, 0.95, False) == expected
            assert expected.upper > 0

    def test_of_several_units_an_example_is_bounded_like_a_loss(self):
        answers = tokens(3)
        drop = answers.accuracy_drop
        assert accuracy_difference(answers, 0.95, False) == loss_difference(drop, answers.units, 0.95, False)

    def test_is_none_where_the_head_does_not_classify(self):
        assert accuracy_difference(losses_only(noise(0.0)), 0.95, True) is None

    @pytest.mark.usefixtures("quick")
    def test_bounds_do_not_narrow_if_tokens_are_repeated_within_their_example(self):
        once, often = (certify(tokens(copies), 0.01, 0.01, 0.95) for copies in (1, 9))
        assert (often.units, often.examples) == (9 * once.units, once.examples)
        for endpoint in ENDPOINTS:
            for bound in ("mean", "lower", "upper"):
                values = [getattr(difference(certificate, endpoint), bound) for certificate in (once, often)]
                assert values[1] == pytest.approx(values[0], rel=1e-9), (endpoint, bound)
        assert often.p_value == pytest.approx(once.p_value, rel=1e-9)
        assert often.examples_needed == once.examples_needed


@pytest.mark.usefixtures("quick")
class TestTemperature:
    @pytest.mark.parametrize("classes", [2, 10])
    @pytest.mark.parametrize("scale", [0.6, 0.77, 1.0, 1.3, 1.8])
    def test_fitted_agrees_with_a_minimization(self, classes, scale):
        values, labels = logits(classes=classes)
        answers = from_logits(scale * values, values, labels)
        (temperature, other), increase = at_fitted_temperatures(answers)

        def mean_loss(log_temperature, factor):
            logs = special.log_softmax(factor * values / np.exp(log_temperature), axis=1)
            return -logs[np.arange(len(labels)), labels].mean()

        exact = [
            optimize.minimize_scalar(mean_loss, bounds=(-1, 1), args=(factor,), method="bounded")
            for factor in (scale, 1)
        ]
        assert temperature == pytest.approx(np.exp(exact[0].x), rel=TEMPERATURE_ERROR)
        assert other == pytest.approx(np.exp(exact[1].x), rel=TEMPERATURE_ERROR)
        assert increase.mean() == pytest.approx(exact[1].fun - exact[0].fun, abs=FITTED_LOSS_ERROR)

    def test_interpolates_the_loss_of_each_example(self):
        values, labels = logits()
        answers = from_logits(values, 1.3 * values, labels)
        temperatures, increase = at_fitted_temperatures(answers)
        exact = from_logits(values / temperatures[0], 1.3 * values / temperatures[1], labels).loss_increase
        assert np.abs(increase - exact).max() < 10 * FITTED_LOSS_ERROR

    @pytest.mark.parametrize("step", [-3, -1, 2])
    def test_change_is_no_difference_at_all_at_a_step_of_the_grid(self, step):
        values, labels = logits()
        temperatures, increase = at_fitted_temperatures(from_logits(values, 2 ** (step / 4) * values, labels))
        assert np.abs(increase).max() < 1e-12
        assert temperatures[1] / temperatures[0] == pytest.approx(2 ** (step / 4), rel=1e-9)

    @pytest.mark.parametrize("step", [0.5, 1.5, 2.5])
    def test_change_of_a_network_with_many_classes_is_no_improvement(self, step):
        """As after training with smoothed labels: far above others in a thousand classes that are alike."""
        generator, examples = np.random.default_rng(1), np.arange(1500)
        values, labels = generator.normal(0, 0.6, (1500, 1000)), generator.integers(0, 1000, 1500)
        values[examples, labels] += generator.normal(7.5, 1.5, 1500)
        for _ in range(3):
            values[examples, generator.integers(0, 1000, 1500)] += generator.exponential(2.2, 1500) + 1
        certificate = certify(from_logits(2 ** (step / 4) * values, values, labels), 0.01, 0.01, 0.95)
        assert abs(certificate.tempered_loss_increase.mean) < INTERPOLATED
        assert certificate.status != "improved"

    @pytest.mark.parametrize("factor", [0.6, 0.8, 1.4])
    def test_change_is_next_to_no_difference_at_fitted_temperatures(self, factor):
        values, labels = logits()
        certificate = certify(from_logits(values, factor * values, labels), 0.01, 0.01, 0.95)
        assert certificate.tempered_loss_increase.mean == pytest.approx(0, abs=FITTED_LOSS_ERROR)
        assert certificate.loss_increase.mean > 10 * FITTED_LOSS_ERROR
        assert certificate.accuracy_drop.mean == 0

    @pytest.mark.parametrize("factor", [1.5, 0.65])
    def test_change_that_lowers_the_loss_is_no_improvement(self, factor):
        values, labels = logits()
        certificate = certify(from_logits(factor * values, values, labels), 0.01, 0.01, 0.95)
        assert certificate.loss_increase.upper < 0
        assert certificate.status == "lossless"

    @pytest.mark.parametrize(("factor", "extreme"), [(1.9, "less"), (0.52, "more")])
    def test_change_does_not_hide_lost_information(self, factor, extreme):
        values, labels = logits()
        noisy = values + np.random.default_rng(1).normal(0, 0.4, values.shape)
        certificate = certify(from_logits(factor * values, noisy, labels), 0.01, 0.5, 0.95)
        assert certificate.loss_increase.upper < 0
        assert certificate.tempered_loss_increase.lower > 0.01
        assert certificate.status == "lossy"
        assert certificate.reasons == (
            f"the loss is lower only because the logits are {extreme} extreme: at fitted temperatures it is higher",
        )

    def test_change_makes_little_noise_inconclusive(self):
        values, labels = logits()
        noisy = values + np.random.default_rng(1).normal(0, 0.3, values.shape)
        certificate = certify(from_logits(1.6 * values, noisy, labels), 0.01, 0.5, 0.95)
        assert certificate.loss_increase.upper < 0
        assert certificate.status == "inconclusive"

    @pytest.mark.parametrize(("factor", "after", "bound"), [(10.0, 3.4, 4.0), (0.1, 0.6, 0.5)])
    def test_outside_the_range_cannot_pass_for_an_improvement(self, factor, after, bound):
        # Noise destroys information; but the dense model is so far from well calibrated that the loss still falls at
        # the temperatures that come nearest.
        values, labels = logits()
        noisy = after * (values + np.random.default_rng(1).normal(0, 0.3, values.shape))
        certificate = certify(from_logits(factor * values, noisy, labels), 0.01, 0.5, 0.95)
        assert certificate.temperatures == (pytest.approx(bound), pytest.approx(after, rel=0.1))
        assert certificate.tempered_loss_increase.upper < 0
        assert certificate.status == "inconclusive"
        assert certificate.reasons == (
            "the dense model's best temperature is not between 0.5 and 4, so the losses at fitted temperatures cannot "
            "be compared",
        )

    def test_of_the_compressed_model_may_be_outside_the_range(self):
        values, labels = logits()
        certificate = certify(from_logits(3.8 * values, 4.2 * values, labels), 0.3, 0.01, 0.95)
        assert certificate.temperatures == (pytest.approx(3.8, rel=0.01), pytest.approx(4.0))
        assert (certificate.status, certificate.reasons) == ("lossless", ())

    def test_outside_the_range_can_still_be_lossy(self):
        values, labels = logits()
        noisy = values + np.random.default_rng(1).normal(0, 3, values.shape)
        certificate = certify(from_logits(5 * values, 5 * noisy, labels), 0.01, 0.5, 0.95)
        assert (certificate.status, certificate.reasons) == ("lossy", ())

    def test_stays_in_the_range_where_the_loss_bends_the_other_way(self):
        # Far from the best temperature the loss levels off, and a parabola through three points has a maximum.
        values, labels = logits(spread=20.0)
        answers = from_logits(values / 300, values / 300, labels)
        totals = answers.tempered[0].sum(1)
        assert totals[0] + totals[2] < 2 * totals[1]
        assert at_fitted_temperatures(answers)[0] == pytest.approx((0.5, 0.5))

    def test_is_unknown_where_losses_were_taken_at_one_only(self):
        assert at_fitted_temperatures(replace(outcomes(noise(0.0)), tempered=None)) == (None, None)


@pytest.mark.usefixtures("quick")
class TestChance:
    @pytest.mark.parametrize(("right", "certified"), [(0.6, False), (0.61, True)])
    def test_is_two_standard_errors_away(self, right, certified):
        # 100 examples of two classes: the standard error of one half is 0.05.
        certificate = judge(outcomes(noise(0.0, count=100), right=right))
        assert certificate.chance == 0.5
        assert certificate.status == ("lossless" if certified else "inconclusive")
        assert bool(certificate.reasons) is not certified

    @pytest.mark.parametrize("mean", [-0.5, 0.0])
    def test_is_never_certified(self, mean):
        generator = np.random.default_rng(0)
        answers = replace(outcomes(noise(mean, 0.01, 600), right=0.25), labels=generator.integers(0, 4, 600))
        certificate = judge(answers)
        assert certificate.loss_increase.upper < 0.5
        assert certificate.status == "inconclusive"
        assert len(certificate.reasons) == 1
        assert certificate.reasons[0].startswith(
            "the dense model is right on 25.0%, not two standard errors above always"
        )
        assert f"({certificate.chance:.1%})" in certificate.reasons[0]

    def test_of_a_model_shown_to_be_worse_is_still_lossy(self):
        certificate = judge(outcomes(noise(0.7), right=0.5))
        assert (certificate.status, certificate.reasons) == ("lossy", ())

    def test_is_the_most_frequent_answer(self):
        answers = replace(outcomes(noise(0.0), right=0.9), labels=(np.arange(COUNT) % 10 == 0).astype(int))
        certificate = judge(answers)
        assert certificate.chance == 0.9
        assert certificate.status == "inconclusive"

    def test_counts_examples_not_tokens(self):
        # 40 examples of 5 tokens: the standard error of one half is 0.079, not 0.035. Twice that is more than 0.12.
        answers = replace(tokens(), labels=np.arange(200) % 2)
        right = np.tile(np.arange(200) < 124, (2, 1))
        certificate = certify(replace(answers, right=right), 9.0, 0.5, 0.95)
        assert certificate.chance == 0.5
        assert certificate.status == "inconclusive"

    def test_is_unknown_where_the_head_does_not_classify(self):
        assert certify(losses_only(noise(0.0)), 0.1, 0.01, 0.95).chance is None


@pytest.mark.usefixtures("quick")
class TestErrors:
    def test_of_too_few_examples(self):
        with pytest.raises(CertificateError, match="29 examples are too few for a certificate; it takes at least 30"):
            judge(outcomes(noise(0.0, count=29)))
        assert judge(outcomes(noise(0.0, count=30)), "accuracy", 0.9).status == "lossless"

    def test_of_too_few_examples_with_a_label(self):
        with pytest.raises(CertificateError, match="20 examples are too few"):
            certify(losses_only(noise(0.0, count=20), examples=300), 0.1, 0.01, 0.95)

    def test_of_few_batches_where_examples_cannot_be_told_apart(self):
        few = losses_only(np.linspace(1.0, 1.1, 29), np.full(29, 10), by_example=False, examples=290)
        message = "known by batch only, and 29 batches are too few .* at least 30: set batch_size, as to 9"
        with pytest.raises(CertificateError, match=message):
            certify(few, 0.1, 0.01, 0.95)
        enough = losses_only(np.linspace(1.0, 1.1, 30), np.full(30, 10), by_example=False, examples=300)
        assert certify(enough, 0.1, 0.01, 0.95).clusters == "batches"

    def test_of_one_class(self):
        with pytest.raises(CertificateError, match="all labels of the held-out data are 7: one class cannot show"):
            judge(replace(outcomes(noise(0.0)), labels=np.full(COUNT, 7)))


class TestPValue:
    @pytest.mark.usefixtures("t_alone")
    @pytest.mark.parametrize("confidence", [0.8, 0.95])
    def test_is_small_exactly_if_the_model_is_certified(self, confidence):
        generator = np.random.default_rng(0)
        seen = set()
        for seed in range(150):
            lost, gained = generator.integers(0, 8, 2)
            pair = [
                noise(mean, 0.1, seed=seed + 999 * index) for index, mean in enumerate(generator.normal(0, 0.02, 2))
            ]
            for answers in (outcomes(*pair, lost=lost, gained=gained), tokens(seed=seed)):
                certificate = certify(answers, 0.03, 0.07, confidence)
                assert (certificate.p_value <= 1 - confidence) == (certificate.status in CERTIFIED)
                seen.add(certificate.status)
        assert seen >= {"lossless", "inconclusive", "lossy"}

    @pytest.mark.usefixtures("quick")
    def test_is_the_largest_of_all_hypotheses(self):
        ones = np.ones(COUNT)
        for loss, tempered, lost in ((0.03, 0.0, 0), (0.0, 0.03, 0), (0.0, 0.0, 9)):
            pair = noise(loss), noise(tempered, seed=1)
            p_values = [mean_p_value(values, ones, 0.04) for values in pair]
            p_values.append(proportion_p_value(lost, 0, COUNT, 0.1))
            certificate = certify(outcomes(*pair, lost=lost), 0.04, 0.1, 0.95)
            assert certificate.p_value == pytest.approx(max(p_values), rel=1e-9)

    @pytest.mark.usefixtures("quick")
    def test_of_a_margin_of_all_answers_leaves_the_accuracy_out(self):
        certificate = certify(outcomes(noise(0.0), lost=20), 0.04, 1.0, 0.95)
        assert certificate.p_value == pytest.approx(mean_p_value(noise(0.0), np.ones(COUNT), 0.04), rel=1e-9)
        assert certificate.status == "lossless"


def by_formula(differences, units, margin, confidence=0.95):
    """The power formula for 80 %, written out."""
    mean = differences.sum() / units.sum()
    deviation = np.sqrt(((differences - mean * units) ** 2).sum() / (len(units) - 1)) / units.mean()
    return math.ceil(((stats.norm.ppf(confidence) + stats.norm.ppf(0.8)) * deviation / (margin - mean)) ** 2)


@pytest.mark.usefixtures("quick")
class TestExamplesNeeded:
    @pytest.mark.parametrize("confidence", [0.9, 0.99])
    def test_is_the_power_formula(self, confidence):
        differences, units = noise(0.02), np.random.default_rng(2).integers(1, 5, COUNT)
        expected = by_formula(differences, units, 0.02, confidence)
        certificate = certify(losses_only(differences, units), 0.02, 0.01, confidence)
        assert certificate.examples_needed == expected > 30

    @pytest.mark.parametrize(("loss", "tempered"), [(0.02, 0.0), (0.0, 0.02)])
    def test_is_the_largest_of_all_endpoints(self, loss, tempered):
        pair = noise(loss), noise(tempered, seed=1)
        certificate = certify(outcomes(*pair), 0.05, 0.9, 0.95)
        needed = [by_formula(values, np.ones(COUNT), 0.05) for values in pair]
        assert certificate.examples_needed == max(needed)
        assert needed[0] != needed[1]

    def test_counts_examples_where_the_loss_is_taken_by_batch(self):
        differences, units = 8 * noise(0.02), np.full(COUNT, 8)
        certificate = certify(losses_only(differences, units, False, 8 * COUNT), 0.05, 0.01, 0.95)
        assert certificate.examples_needed == 8 * by_formula(differences, units, 0.05)

    @pytest.mark.parametrize("endpoint", ENDPOINTS)
    def test_is_none_where_a_difference_exceeds_its_margin(self, endpoint):
        mean = difference(judge(case(endpoint), endpoint), endpoint).mean
        assert judge(case(endpoint), endpoint, 1.01 * mean).examples_needed is not None
        assert judge(case(endpoint), endpoint, 0.99 * mean).examples_needed is None

    def test_is_no_less_than_a_certificate_takes(self):
        assert certify(losses_only(noise(0.0, 1e-4)), 0.5, 0.01, 0.95).examples_needed == 30

    def test_of_the_accuracy_counts_what_is_uncertain_even_if_no_answer_changes(self):
        certificate = certify(outcomes(np.zeros(COUNT)), 0.5, 0.01, 0.95)
        assert certificate.status == "inconclusive"
        assert certificate.examples_needed == examples_needed(0.0, math.sqrt(0.01 * 0.99), 0.01, 0.95) > COUNT

    @pytest.mark.parametrize(("lost", "gained"), [(2, 2), (12, 12), (5, 3)])
    def test_of_the_accuracy_gives_the_power(self, lost, gained):
        margin, draws = 0.04, 4000
        count = certify(outcomes(np.zeros(COUNT), lost=lost, gained=gained), 0.5, margin, 0.95).examples_needed
        chances = np.array([lost, gained, COUNT - lost - gained]) / COUNT
        tables = np.random.default_rng(0).multinomial(count, chances, draws)[:, :2]
        tables, times = np.unique(tables, axis=0, return_counts=True)
        shown = [proportion_p_value(*table, count, margin) <= 0.05 for table in tables]
        assert 0.78 <= times[shown].sum() / draws <= 0.9

    @pytest.mark.usefixtures("t_alone")
    def test_is_more_than_there_are_where_the_bounds_decide(self):
        generator, checked = np.random.default_rng(0), 0
        for seed in range(60):
            lost, gained = generator.integers(0, 8, 2)
            pair = [
                noise(mean, 0.1, seed=seed + 999 * index) for index, mean in enumerate(generator.normal(0, 0.02, 2))
            ]
            certificate = certify(outcomes(*pair, lost=lost, gained=gained), 0.03, 0.07, 0.95)
            if certificate.status not in CERTIFIED and certificate.examples_needed is not None:
                assert certificate.examples_needed > COUNT
                checked += 1
        assert checked > 10


def with_p_values(**values):
    certified = judge(outcomes(noise(0.0)))
    assert certified.status == "lossless"
    return {task: replace(certified, p_value=value) for task, value in values.items()}


@pytest.mark.usefixtures("quick")
class TestTogether:
    def test_is_holm_by_hand(self):
        # Sorted 0.01, 0.02, 0.04 times 3, 2, 1: 0.03, 0.04, 0.04.
        together = certify_together(with_p_values(a=0.04, b=0.01, c=0.02))
        assert {task: c.p_value for task, c in together.items()} == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})
        assert [c.status for c in together.values()] == ["lossless"] * 3
        assert all(c.reasons == () for c in together.values())

    def test_takes_back_what_is_not_shown_for_all(self):
        # 0.02 times 3, then 0.03 and 0.04 may not be smaller; but 0.001 is.
        together = certify_together(with_p_values(a=0.02, b=0.001, c=0.03, d=0.04))
        assert {t: c.p_value for t, c in together.items()} == pytest.approx(
            {"a": 0.06, "b": 0.004, "c": 0.06, "d": 0.06}
        )
        assert {t: c.status for t, c in together.items()} == {
            "a": "inconclusive",
            "b": "lossless",
            "c": "inconclusive",
            "d": "inconclusive",
        }
        assert together["a"].reasons == ("not shown once corrected for 4 tasks (Holm)",)
        assert together["b"].reasons == ()

    def test_calls_none_of_several_improved(self):
        """The p-value is about the margin, and says nothing of being better."""
        tasks = {task: replace(c, status="improved") for task, c in with_p_values(a=0.001, b=0.001).items()}
        for found in certify_together(tasks).values():
            assert (found.status, found.reasons) == (
                "lossless",
                ("not `improved`: that is not corrected for 2 tasks",),
            )
        assert certify_together({"a": tasks["a"]})["a"].status == "improved"

    def test_calls_none_of_later_ratios_improved(self):
        answers, config = outcomes(noise(-0.5)), LosslessLowRankConfig(loss_margin=0.5, accuracy_margin=0.5)
        for earlier, status in (([], "improved"), ([(0.7, True)], "lossless"), ([(0.7, False)], "inconclusive")):
            found, reason = certificate_of(True, config, answers, "", 0.5, earlier)
            assert (found.status, reason) == (status, None)

    def test_leaves_what_was_not_certified_and_a_single_task(self):
        tasks = with_p_values(a=0.03, b=0.5)
        tasks["b"] = replace(tasks["b"], status="lossy")
        together = certify_together(tasks)
        assert together["a"].status == "inconclusive"
        assert (together["b"].status, together["b"].reasons) == ("lossy", ())
        alone = with_p_values(a=0.05)
        assert certify_together(alone) == alone
        assert certify_together({}) == {}

    @pytest.mark.slow
    def test_keeps_to_the_level_of_each_certificate(self):
        tasks = {task: replace(c, confidence=0.9) for task, c in with_p_values(a=0.04, b=0.04).items()}
        assert [c.status for c in certify_together(tasks).values()] == ["lossless", "lossless"]
        for p_value, status in ((0.25, "lossless"), (0.26, "inconclusive")):  # 1 - 0.75 is exact
            alone = {"a": replace(with_p_values(a=p_value)["a"], confidence=0.75)}
            assert certify_together(alone)["a"].status == status


@pytest.mark.usefixtures("quick")
class TestDemoted:
    @pytest.mark.parametrize(
        ("mean", "before", "after"),
        [
            (-0.5, "improved", "inconclusive"),
            (0.0, "lossless", "inconclusive"),
            (0.1, "inconclusive", "inconclusive"),
            (0.5, "lossy", "lossy"),
        ],
    )
    def test_is_never_better_than_inconclusive(self, mean, before, after):
        certificate = judge(outcomes(noise(mean)), margin=0.1)
        assert certificate.status == before
        result = demoted(demoted(certificate, "first"), "second")
        assert result == replace(certificate, status=after, reasons=(*certificate.reasons, "first", "second"))


@pytest.mark.usefixtures("quick")
class TestRecord:
    def test_says_what_was_measured(self):
        answers = outcomes(noise(0.02), noise(0.01, seed=1), lost=5, gained=2)
        certificate = certify(answers, 0.07, 0.3, 0.9, fingerprint="f00")
        assert (certificate.loss_margin, certificate.accuracy_margin, certificate.confidence) == (0.07, 0.3, 0.9)
        assert (certificate.examples, certificate.units, certificate.clusters) == (COUNT, COUNT, "examples")
        assert certificate.fingerprint == "f00"
        assert certificate.loss == answers.mean_loss
        assert certificate.accuracy == (0.9, pytest.approx(0.9 - 3 / COUNT))
        assert certificate.temperatures == pytest.approx((1.0, 1.0))
        assert certificate.loss_increase.mean == pytest.approx(0.02)
        assert certificate.tempered_loss_increase.mean == pytest.approx(0.01)
        assert certificate.calibration_error == tuple(
            expected_calibration_error(*pair) for pair in zip(answers.confidence, answers.right, strict=True)
        )
        assert certificate.changed == pytest.approx(7 / COUNT)
        assert certificate.divergence == 0.25

    def test_leaves_out_what_a_head_does_not_have(self):
        units = np.full(COUNT, 3)
        certificate = certify(losses_only(noise(0.0), units, False, 900), 0.1, 0.01, 0.95)
        assert (certificate.examples, certificate.units, certificate.clusters) == (900, 3 * COUNT, "batches")
        nothing = ("accuracy", "accuracy_drop", "chance", "temperatures", "tempered_loss_increase")
        for name in (*nothing, "calibration_error", "changed", "divergence"):
            assert getattr(certificate, name) is None


def answers_of(dense, compressed, batch):
    loader = make_dataloader(split_batch(batch, 16), dense, batch_size=16)
    return paired_outcomes(dense, compressed, loader, Accelerator(), temperatures=True)


def taught(build, count, scale=20.0):
    """A tiny model with a sharp, balanced head, and labels drawn from its answers: it is as sure as it should be."""
    model, batch = build(count)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.mul_(scale)
        model.classifier.bias -= model(**batch).logits.flatten(0, -2).median(0).values
        scores = model(**batch).logits
    uniform = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1))
    labels = (scores - uniform.log().neg().log()).argmax(-1)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, labels)
    return model, batch


def noisy(model, size, seed=0):
    """A copy with noise in the weights below the head."""
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.base_model.parameters():
            shape = parameter.shape
            parameter.add_(size * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return other


@pytest.mark.usefixtures("quick")
class TestRealModels:
    @pytest.mark.parametrize("build", [bert_sequence_classification, bert_token_classification])
    def test_as_good_as_itself_is_lossless(self, build):
        model, batch = taught(build, 320)
        certificate = certify(answers_of(model, model, batch), 0.0, 0.05, 0.95)
        assert certificate.verdict == "lossless@(0 nats, 5 points)"
        assert 0.6 < certificate.temperatures[0] < 1.6

    @pytest.mark.parametrize("build", [bert_sequence_classification, bert_token_classification])
    def test_with_much_noise_is_lossy(self, build):
        model, batch = taught(build, 160)
        assert certify(answers_of(model, noisy(model, 0.3), batch), 0.01, 0.01, 0.95).status == "lossy"

    def test_with_smaller_logits_differs_by_its_temperature_only(self):
        model, batch = taught(bert_sequence_classification, 160)
        other = deepcopy(model)
        with torch.no_grad():
            for parameter in other.classifier.parameters():
                parameter.mul_(0.7)
        certificate = certify(answers_of(model, other, batch), 0.01, 0.05, 0.95)
        assert certificate.temperatures[1] / certificate.temperatures[0] == pytest.approx(0.7, rel=TEMPERATURE_ERROR)
        assert certificate.tempered_loss_increase.mean == pytest.approx(0, abs=FITTED_LOSS_ERROR)
        assert certificate.accuracy_drop.mean == 0

    def test_with_labels_drawn_at_random_is_never_certified(self):
        model, batch = bert_sequence_classification(160)
        certificate = certify(answers_of(model, model, batch), 0.5, 0.5, 0.95)
        assert certificate.status == "inconclusive"
        assert "nothing to lose" in certificate.reasons[0]

    def test_of_language_takes_texts_as_clusters(self):
        model, batch = llama(48)
        answers = answers_of(model, noisy(model, 0.02), batch)
        certificate = certify(answers, 0.5, 0.5, 0.95)
        assert (certificate.examples, certificate.units) == (48, int((batch["labels"][:, 1:] != -100).sum()))
        expected = loss_difference(answers.loss_increase, answers.units, 0.95, bootstrap=True)
        assert certificate.loss_increase == expected
