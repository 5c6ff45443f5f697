"""Scores: metrics of summed counts, their jackknife errors, and the paired comparison of two models."""

import json
import math

import numpy as np
import pytest
from scipy.stats import t as student

from hf_lossless_lr.errors import DataError
from hf_lossless_lr.evaluation.scores import Score, Scores, compare, summarize
from hf_lossless_lr.report.tables import score_table
from hf_lossless_lr.verdict.bounds import mean_upper_bound, proportion_upper_bound

ACCURACY = Score("accuracy", lambda sums: sums[..., 1] / sums[..., 0])
SHARE = Score(ACCURACY.name, ACCURACY.of_sums, right=lambda counts: counts[..., 1])
F1 = Score("F1", lambda sums: 2 * sums[..., 0] / (2 * sums[..., 0] + sums[..., 1] + sums[..., 2]))
PERPLEXITY = Score("perplexity", lambda sums: np.exp(sums[..., 1] / sums[..., 0]), higher_is_better=False)
COUNT = 60


def answers(right):
    """Counts of the metric accuracy: 1, and whether the answer is right."""
    right = np.asarray(right, dtype=float)
    return np.stack([np.ones_like(right), right], 1)


def scores(counts, *metrics):
    return Scores(np.asarray(counts, dtype=float), metrics)


def drawn(share, seed, count=COUNT):
    return np.random.default_rng(seed).random(count) < share


def losses(seed, count=COUNT):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 20, count)
    return np.stack([tokens, tokens * generator.uniform(1, 3, count)], 1)


class TestValues:
    def test_are_those_of_the_sums_in_the_order_of_the_metrics(self):
        values = scores([[1, 0, 1], [1, 1, 0], [0, 1, 0]], F1, ACCURACY).values()
        assert list(values) == ["F1", "accuracy"]
        assert values["F1"][0] == 4 / 7
        assert values["accuracy"][0] == 1

    def test_have_the_error_of_a_jackknife_written_as_a_loop(self):
        for metric, counts in ((PERPLEXITY, losses(0)), (ACCURACY, answers(drawn(0.7, 1)))):
            without = [float(metric.of_sums(np.delete(counts, i, 0).sum(0))) for i in range(COUNT)]
            squares = sum((value - sum(without) / COUNT) ** 2 for value in without)
            error = math.sqrt((COUNT - 1) / COUNT * squares)
            assert scores(counts, metric).values()[metric.name] == pytest.approx(
                (float(metric.of_sums(counts.sum(0))), error), rel=1e-9
            )

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_of_a_mean_have_the_textbook_error(self, share):
        right = drawn(share, 2)
        value, error = scores(answers(right), ACCURACY).values()["accuracy"]
        assert value == right.mean()
        assert error == pytest.approx(math.sqrt(value * (1 - value) / (COUNT - 1)), rel=1e-9)
        assert error == pytest.approx(right.std(ddof=1) / math.sqrt(COUNT), rel=1e-9)

    def test_of_a_ratio_have_nearly_the_error_of_the_ratio_estimator(self):
        tokens, loss = losses(3, 500).T
        metric = Score("loss", lambda sums: sums[..., 1] / sums[..., 0])
        value, error = scores(np.stack([tokens, loss], 1), metric).values()["loss"]
        bound = mean_upper_bound(loss, tokens, 0.95)
        assert error == pytest.approx((bound - value) / student.ppf(0.95, 499), rel=0.02)

    def test_of_equal_examples_have_no_error(self):
        assert scores(answers(np.ones(9)), ACCURACY).values() == {"accuracy": (1.0, 0.0)}

    def test_do_not_depend_on_the_order_of_the_examples(self):
        counts = losses(4)
        values = [scores(part, PERPLEXITY).values()["perplexity"] for part in (counts, counts[::-1])]
        assert values[0] == pytest.approx(values[1], rel=1e-9)


class TestSummary:
    @pytest.mark.parametrize("metric", [ACCURACY, SHARE, PERPLEXITY])
    def test_of_one_example_has_no_error(self, metric):
        one = scores(losses(0, 1), metric)
        (entry,) = summarize([one], 0.95)[metric.name]["values"]
        assert entry == {"value": float(metric.of_sums(one.counts[0])), "standard_error": None}
        assert f"{entry['value']:.4f} ± unknown" in score_table(summarize([one], 0.95))

    def test_of_one_example_has_no_bounds(self):
        summary = summarize([scores(losses(seed, 1), PERPLEXITY) for seed in (0, 1)], 0.95)
        json.dumps(summary, allow_nan=False)
        drop = summary["perplexity"]["drop"]
        assert (drop["lower"], drop["upper"]) == (None, None)
        assert score_table(summary).endswith(f"   {drop['mean']:+.4f} (unknown to unknown)")


class TestCompare:
    @pytest.mark.parametrize(
        ("metric", "make"), [(ACCURACY, lambda seed: answers(drawn(0.8, seed))), (PERPLEXITY, losses)]
    )
    def test_is_symmetric(self, metric, make):
        one, other = scores(make(5), metric), scores(make(6), metric)
        there, back = compare(one, other, 0.9)[metric.name], compare(other, one, 0.9)[metric.name]
        assert (there.mean, there.lower, there.upper) == (-back.mean, -back.upper, -back.lower)
        assert there.lower < there.mean < there.upper

    def test_is_positive_where_the_compressed_model_is_worse(self):
        right = drawn(0.9, 7)
        worse = right & drawn(0.7, 8)
        difference = compare(scores(answers(right), ACCURACY), scores(answers(worse), ACCURACY), 0.95)["accuracy"]
        assert difference.mean == pytest.approx(right.mean() - worse.mean(), abs=1e-12)
        assert 0 < difference.lower < difference.mean < difference.upper

    def test_is_positive_where_a_perplexity_grows(self):
        before = losses(9)
        after = before * [1, 1.1]
        difference = compare(scores(before, PERPLEXITY), scores(after, PERPLEXITY), 0.95)["perplexity"]
        values = [float(PERPLEXITY.of_sums(counts.sum(0))) for counts in (before, after)]
        assert difference.mean == pytest.approx(values[1] - values[0], rel=1e-12)
        assert 0 < difference.lower < difference.mean < difference.upper

    def test_of_a_model_with_itself_is_nothing(self):
        same = scores(losses(10), PERPLEXITY)
        difference = compare(same, same, 0.95)["perplexity"]
        assert (difference.mean, difference.lower, difference.upper) == (0, 0, 0)

    def test_bounds_a_drop_of_accuracy_about_as_tango_and_student_do(self):
        count = 400
        right = drawn(0.85, 11, count)
        after = right ^ (drawn(0.1, 12, count))
        difference = compare(scores(answers(right), ACCURACY), scores(answers(after), ACCURACY), 0.95)["accuracy"]
        lost, gained = int((right & ~after).sum()), int((after & ~right).sum())
        drop = right.astype(float) - after
        assert difference.upper == pytest.approx(proportion_upper_bound(lost, gained, count, 0.95), abs=0.004)
        assert difference.lower == pytest.approx(-proportion_upper_bound(gained, lost, count, 0.95), abs=0.004)
        assert difference.upper == pytest.approx(mean_upper_bound(drop, np.ones(count), 0.95), abs=0.004)

    @pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 0), (0, 2), (9, 4)])
    def test_bounds_a_share_of_right_answers_by_tangos_test(self, lost, gained):
        right = np.arange(COUNT) < 40
        after = right.copy()
        after[:lost], after[40 : 40 + gained] = False, True
        difference = compare(scores(answers(right), SHARE), scores(answers(after), SHARE), 0.9)["accuracy"]
        assert difference.mean == pytest.approx((lost - gained) / COUNT, abs=1e-12)
        assert difference.upper == proportion_upper_bound(lost, gained, COUNT, 0.9) > difference.mean
        assert difference.lower == -proportion_upper_bound(gained, lost, COUNT, 0.9) < difference.mean

    def test_bounds_are_wider_at_a_higher_level(self):
        one, other = (scores(answers(drawn(0.8, seed)), ACCURACY) for seed in (13, 14))
        low, high = (compare(one, other, level)["accuracy"] for level in (0.8, 0.99))
        assert high.lower < low.lower < low.upper < high.upper

    def test_pairs_the_examples(self):
        right = drawn(0.5, 15)
        paired = compare(scores(answers(right), ACCURACY), scores(answers(right), ACCURACY), 0.95)["accuracy"]
        mixed = compare(scores(answers(right), ACCURACY), scores(answers(right[::-1]), ACCURACY), 0.95)["accuracy"]
        assert paired.upper == 0 < mixed.upper

    def test_gives_every_metric(self):
        one, other = (scores(np.random.default_rng(seed).integers(1, 4, (20, 3)), F1, ACCURACY) for seed in (1, 2))
        assert list(compare(one, other, 0.95)) == ["F1", "accuracy"]

    @pytest.mark.parametrize("shape", [(COUNT - 1, 2), (COUNT, 3)])
    def test_refuses_scores_of_other_examples_or_counts(self, shape):
        one, other = scores(answers(drawn(0.5, 0)), ACCURACY), scores(np.ones(shape), ACCURACY)
        with pytest.raises(DataError, match="the two models were not scored on the same examples, so they cannot be"):
            compare(one, other, 0.95)
