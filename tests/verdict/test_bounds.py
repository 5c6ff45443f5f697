"""Confidence bounds of paired comparisons, against published examples, slow oracles and their coverage."""

import math
import tracemalloc
import warnings
from itertools import product

import numpy as np
import pytest
from scipy import optimize, stats
from support.tolerances import ROUNDING

from hf_lossless_lr.errors import DataError
from hf_lossless_lr.verdict.bounds import (
    bootstrap_upper_bound,
    examples_needed,
    expected_calibration_error,
    holm,
    mean_p_value,
    mean_upper_bound,
    proportion_p_value,
    proportion_upper_bound,
    statistic_upper_bound,
)

pytestmark = pytest.mark.numerical

# Student's data on sleep (datasets::sleep of R): hours gained with each of two drugs by the same ten patients.
SLEEP_1 = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
SLEEP_2 = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


def clusters(count, seed, mean=0.1):
    """Skewed differences over clusters of unequal sizes."""
    generator = np.random.default_rng(seed)
    units = generator.integers(1, 9, count)
    return units * mean + (generator.exponential(1.0, count) - 1) * np.sqrt(units), units


def small_tables(examples):
    return [(lost, gained) for lost, gained in product(range(examples + 1), repeat=2) if lost + gained <= examples]


class TestMean:
    def test_is_the_published_interval_of_the_sleep_data(self):
        # R's t.test(extra ~ group, data = sleep, paired = TRUE) prints "t = -4.0621, df = 9, p-value = 0.002833" and
        # the 95 percent interval "-2.4598858 -0.7001142", two-sided.
        differences, units = SLEEP_1 - SLEEP_2, np.ones(10)
        assert mean_upper_bound(differences, units, 0.975) == pytest.approx(-0.7001142, abs=5e-8)
        assert -mean_upper_bound(-differences, units, 0.975) == pytest.approx(-2.4598858, abs=5e-8)
        assert mean_p_value(differences, units, 0.0) == pytest.approx(0.002833 / 2, abs=5e-7)

    @pytest.mark.parametrize("count", [2, 3, 10, 200])
    @pytest.mark.parametrize("confidence", [0.6, 0.95, 0.999])
    def test_is_the_t_test_where_every_cluster_has_one_unit(self, count, confidence):
        differences = clusters(count, seed=count)[0]
        result = stats.ttest_1samp(differences, 0.3, alternative="less")
        bound = mean_upper_bound(differences, np.ones(count), confidence)
        assert bound == pytest.approx(result.confidence_interval(confidence).high, rel=1e-12)
        assert mean_p_value(differences, np.ones(count), 0.3) == pytest.approx(result.pvalue, rel=1e-10)

    def test_is_the_cluster_robust_regression_on_a_constant(self):
        # The sandwich estimator over the units themselves, with the usual factor n / (n - 1).
        generator = np.random.default_rng(5)
        cluster_of = np.repeat(np.arange(12), generator.integers(1, 7, 12))
        values = generator.normal(size=len(cluster_of)) + generator.normal(size=12)[cluster_of]
        design = np.ones((len(values), 1))
        bread = np.linalg.inv(design.T @ design)
        coefficient = bread @ design.T @ values
        residuals = values - design @ coefficient
        scores = [design[cluster_of == i].T @ residuals[cluster_of == i] for i in range(12)]
        variance = 12 / 11 * bread @ sum(np.outer(score, score) for score in scores) @ bread
        expected = coefficient[0] + stats.t.ppf(0.95, 11) * math.sqrt(variance[0, 0])
        differences, units = np.bincount(cluster_of, values), np.bincount(cluster_of)
        assert mean_upper_bound(differences, units, 0.95) == pytest.approx(expected, rel=1e-12)

    def test_moves_with_the_differences_and_their_scale(self):
        differences, units = clusters(30, seed=1)
        bound = mean_upper_bound(differences, units, 0.95)
        assert mean_upper_bound(3 * differences + 2 * units, units, 0.95) == pytest.approx(3 * bound + 2)
        assert bound > differences.sum() / units.sum()

    @pytest.mark.parametrize("confidence", [0.51, 0.8, 0.95, 0.999])
    def test_p_value_and_bound_agree(self, confidence):
        differences, units = clusters(25, seed=2)
        bound = mean_upper_bound(differences, units, confidence)
        for margin in (*np.linspace(-1, 2, 61), bound - 1e-9, bound + 1e-9):
            assert (mean_p_value(differences, units, margin) <= 1 - confidence) == (bound <= margin)
        assert mean_p_value(differences, units, bound) == pytest.approx(1 - confidence, rel=1e-9)

    def test_is_the_mean_where_all_clusters_agree(self):
        differences, units = [0.5, 1.0, 2.0], [1, 2, 4]
        assert mean_upper_bound(differences, units, 0.99) == 0.5
        assert [mean_p_value(differences, units, margin) for margin in (0.4, 0.5, 0.6)] == [1.0, 0.0, 0.0]

    def test_shows_nothing_with_one_cluster(self):
        assert mean_upper_bound([-5.0], [3], 0.95) == math.inf
        assert mean_p_value([-5.0], [3], 10.0) == 1.0

    def test_takes_no_assurance_from_clusters_without_units(self):
        differences, units = clusters(9, seed=3)
        padded = np.append(differences, [0, 0]), np.append(units, [0, 0])
        assert mean_upper_bound(*padded, 0.95) == mean_upper_bound(differences, units, 0.95)
        assert mean_p_value(*padded, 0.4) == mean_p_value(differences, units, 0.4)
        assert mean_upper_bound([0.5, 0, 0], [1, 0, 0], 0.95) == math.inf

    @pytest.mark.slow
    def test_covers_the_mean_as_often_as_it_says(self):
        # Normal differences of 5 clusters, where t is exact; three standard errors of the simulation. The normal
        # distribution in place of t would cover 91 %.
        generator = np.random.default_rng(0)
        draws = generator.normal(1.0, 2.0, (4000, 5))
        covered = np.mean([mean_upper_bound(row, np.ones(5), 0.95) >= 1.0 for row in draws])
        assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))

    @pytest.mark.slow
    def test_covers_the_mean_of_unequal_clusters(self):
        generator = np.random.default_rng(1)
        covered = 0
        for _ in range(2000):
            units = generator.integers(1, 6, 50)
            covered += mean_upper_bound(units * generator.normal(1.0, 2.0, 50), units, 0.9) >= 1.0
        # Not exact: one percent for the method besides three standard errors of the simulation.
        assert covered / 2000 == pytest.approx(0.9, abs=0.01 + 3 * math.sqrt(0.9 * 0.1 / 2000))


def bca_bound(rows, statistic, confidence, seed=99, resamples=9999):
    """The upper BCa bound of a statistic of column sums written out from Efron (1987), one resample at a time."""
    generator, count, total = np.random.default_rng(seed), len(rows), rows.sum(0)
    drawn = np.sort([statistic(rows[generator.integers(count, size=count)].sum(0)) for _ in range(resamples)])
    observed = statistic(total)
    bias = stats.norm.ppf(((drawn < observed).mean() + (drawn <= observed).mean()) / 2)
    left_out = np.array([statistic(total - row) for row in rows])
    influence = left_out.mean() - left_out
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    shifted = bias + stats.norm.ppf(confidence)
    return np.quantile(drawn, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def f1(sums):
    """F1 of true positives, false positives and false negatives."""
    return 2 * sums[..., 0] / np.maximum(2 * sums[..., 0] + sums[..., 1] + sums[..., 2], 1)


def f1_counts(count, seed):
    """Counts of a dense model and of one that is worse on some examples."""
    generator = np.random.default_rng(seed)
    found, invented, overlooked = generator.binomial(5, 0.8, count), *generator.poisson((0.5, 1.0), (count, 2)).T
    dense = np.stack([found, invented, overlooked], 1)
    missed = generator.binomial(found, 0.15)
    return dense, dense + np.outer(missed, [-1, 0, 1]) + np.outer(generator.poisson(0.1, count), [0, 1, 0])


class TestBootstrap:
    @pytest.mark.parametrize(("confidence", "resamples"), [(0.6, 9999), (0.95, 9999), (0.95, 500), (0.99, 9999)])
    def test_is_that_of_scipy_for_a_plain_mean(self, confidence, resamples):
        differences = clusters(23, seed=4)[0]
        options = {"alternative": "less", "confidence_level": confidence, "n_resamples": resamples}
        expected = stats.bootstrap((differences,), np.mean, rng=np.random.default_rng(7), **options)
        given = {} if resamples == 9999 else {"resamples": resamples}
        bound = bootstrap_upper_bound(differences, np.ones(23), confidence, seed=7, **given)
        assert bound == pytest.approx(expected.confidence_interval.high, rel=1e-12)

    @pytest.mark.parametrize("seed", range(4))
    def test_is_bca_written_out(self, seed):
        # Over seeds, the bound deviates by about 0.035 of the spread of the mean, a difference of two by 0.05; three
        # times that is allowed. The bootstrap without BCa's two corrections is lower by 0.18 or more.
        differences, units = clusters(15, seed)
        rows = np.stack([differences, units], 1).astype(float)
        spread = stats.sem(differences - ratio(rows.sum(0)) * units) * 15 / units.sum()
        bound = bootstrap_upper_bound(differences, units, 0.95)
        assert bound == pytest.approx(bca_bound(rows, ratio, 0.95), abs=3 * 0.05 * spread)

    def test_is_near_the_t_bound_for_many_clusters(self):
        differences, units = clusters(1000, seed=5)
        mean, bound = differences.sum() / units.sum(), mean_upper_bound(differences, units, 0.95)
        assert bootstrap_upper_bound(differences, units, 0.95) == pytest.approx(bound, abs=0.06 * (bound - mean))

    def test_depends_on_the_seed_alone(self):
        differences, units = clusters(40, seed=6)
        first = bootstrap_upper_bound(differences, units, 0.95, seed=1)
        assert bootstrap_upper_bound(differences, units, 0.95, seed=1) == first
        assert bootstrap_upper_bound(differences, units, 0.95, seed=2) != first

    def test_holds_little_in_memory_at_a_time(self):
        differences, units = clusters(3000, seed=7)
        bootstrap_upper_bound(differences, units, 0.95, resamples=2)  # imports scipy
        tracemalloc.start()
        try:
            bootstrap_upper_bound(differences, units, 0.95, resamples=200)
            assert tracemalloc.get_traced_memory()[1] < 2e6  # 3000 leave-one-out samples at once take 72 MB
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        ("differences", "units", "mean"),
        [([0.1] * 7, [1] * 7, 0.1), ([0.0] * 5, [3, 1, 4, 1, 5], 0.0), ([0.5, 1.0, 2.0], [1, 2, 4], 0.5)],
    )
    def test_is_the_mean_where_all_clusters_agree(self, differences, units, mean):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert bootstrap_upper_bound(differences, units, 0.95) == pytest.approx(mean, abs=1e-15)

    def test_shows_nothing_with_one_cluster(self):
        assert bootstrap_upper_bound([-5.0, 0.0], [3, 0], 0.95) == math.inf


class TestStatistic:
    @pytest.mark.parametrize("seed", range(6))
    def test_of_a_share_is_the_bootstrap_of_its_difference(self, seed):
        # Many resamples tie with the observed drop, which decides on the correction of the bias: 0.8 - 0.7 must be
        # 0.7 - 0.6, though it is not in floating point.
        generator = np.random.default_rng(seed)
        units = generator.integers(1, 3, 30) if seed % 2 else np.ones(30)
        right = generator.binomial(units.astype(int), 0.8)
        after = np.where(generator.uniform(size=30) < 0.1, units - right, right)
        dense, compressed = np.stack([right, units], 1), np.stack([after, units], 1)
        expected = bootstrap_upper_bound(right - after, units, 0.95, seed=3)
        assert statistic_upper_bound(ratio, dense, compressed, 0.95, seed=3) == pytest.approx(expected, abs=ROUNDING)

    @pytest.mark.parametrize("seed", range(3))
    def test_of_f1_is_bca_written_out(self, seed):
        dense, compressed = f1_counts(40, seed)

        def drop(sums):
            return f1(sums[..., :3]) - f1(sums[..., 3:])

        rows = np.hstack([dense, compressed]).astype(float)
        spread = np.std([drop(rows.sum(0) - row) for row in rows]) * math.sqrt(39)
        bound = statistic_upper_bound(f1, dense, compressed, 0.95)
        assert bound == pytest.approx(bca_bound(rows, drop, 0.95), abs=3 * 0.05 * spread)
        assert bound > drop(rows.sum(0)) > 0

    def test_is_paired(self):
        dense, compressed = f1_counts(60, seed=1)
        assert statistic_upper_bound(f1, dense, dense, 0.95) == 0.0
        shuffled = np.random.default_rng(0).permutation(compressed)
        paired = statistic_upper_bound(f1, dense, compressed, 0.95)
        assert paired < statistic_upper_bound(f1, dense, shuffled, 0.95)

    @pytest.mark.parametrize(("value", "expected"), [(-1.0, 0.0), (1.0, 1.0)])
    def test_is_the_largest_drop_seen_where_bca_has_no_answer(self, value, expected):
        # The metric has `value` for the sum of all examples and 0 for that of every resample.
        dense = 2.0 ** np.arange(20)[:, None]

        def metric(sums):
            return np.where(sums[..., 0] == dense.sum(), value, 0.0)

        assert statistic_upper_bound(metric, dense, 0 * dense, 0.95, resamples=99) == expected

    def test_refuses_a_metric_that_is_not_always_defined(self):
        dense = np.array([[1, 0], [0, 0], [0, 0], [0, 1]])
        with pytest.raises(DataError, match="of a resample is not finite"):
            statistic_upper_bound(lambda sums: sums[..., 0] / sums.sum(-1), dense, dense, 0.95)

    def test_shows_nothing_with_one_example(self):
        assert statistic_upper_bound(f1, [[3, 0, 0]], [[3, 0, 0]], 0.95) == math.inf


def constrained_p_value(lost, gained, examples, drop):
    """The score test with the most likely probabilities under the hypothesis found by numeric optimization."""

    def loss(gain):
        cells = ((lost, gain + drop), (gained, gain), (examples - lost - gained, 1 - 2 * gain - drop))
        return -sum(count * math.log(max(probability, 1e-300)) for count, probability in cells if count)

    low, high = max(0.0, -drop), (1 - drop) / 2
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    gain = min((low, high, found.x), key=loss)
    variance = (2 * gain + drop - drop**2) / examples  # of the observed drop
    return stats.norm.cdf(((lost - gained) / examples - drop) / math.sqrt(variance))


class TestProportion:
    # Two-sided intervals of (lost - gained) / examples: each end is a bound at half the remaining level.
    PUBLISHED = (
        # Examples of T. Tango, Statistics in Medicine 17, 1998, as reproduced in the tests of the R package ratesci
        # (github.com/PeteLaud/ratesci, tests/testthat/test3.R: "Tango"): tables 4, 9, 3, 16 and 43, 0, 1, 0.
        (9, 3, 32, 0.95, -0.027, 0.390, 3),
        (0, 1, 44, 0.90, -0.096, 0.037, 3),
        # A. Agresti and Y. Min, Statistics in Medicine 24, 2005, table 53, 16, 8, 9; same file.
        (16, 8, 86, 0.95, -0.020, 0.207, 3),
        # M. Fagerland et al., Statistics in Medicine 33, 2014, table 1, 1, 7, 12 (Bentur et al., 2009); same file.
        (1, 7, 21, 0.95, -0.517, -0.026, 3),
        # R's PropCIs::scoreci.mp(25, 28, 618) at 90 %, an interval of (second - first) / n: [-0.0148, 0.0247], as a
        # public test `test_tango_interval_matches_the_r_vector` quotes it.
        (28, 25, 618, 0.90, -0.0148, 0.0247, 4),
    )

    @pytest.mark.parametrize("example", PUBLISHED, ids=str)
    def test_is_the_published_interval(self, example):
        lost, gained, examples, level, low, high, digits = example
        assert round(proportion_upper_bound(lost, gained, examples, (1 + level) / 2), digits) == high
        assert round(-proportion_upper_bound(gained, lost, examples, (1 + level) / 2), digits) == low

    TABLES = ((0, 0, 10), (0, 3, 10), (3, 0, 10), (5, 5, 10), (0, 10, 10), (9, 0, 10), (2, 7, 40), (30, 12, 1000))

    @pytest.mark.parametrize("table", TABLES, ids=str)
    def test_is_the_score_test_with_numeric_maximum_likelihood(self, table):
        for confidence in (0.9, 0.975):
            bound = proportion_upper_bound(*table, confidence)
            assert constrained_p_value(*table, bound) == pytest.approx(1 - confidence, abs=1e-6)
            for drop in np.linspace(-0.99, 0.99, 36):
                expected = constrained_p_value(*table, drop)
                assert proportion_p_value(*table, drop) == pytest.approx(expected, abs=1e-6)
                assert (expected > 1 - confidence) == (drop < bound)

    @pytest.mark.parametrize("table", [(0, 1, 2), (0, 2, 4), (0, 3, 4), (0, 3, 5)], ids=str)
    def test_stands_a_double_root(self, table):
        # There the discriminant is 0, and often below it by rounding.
        drop = -table[1] / (2 * table[2] - table[1])
        for margin in (drop, math.nextafter(drop, 1), math.nextafter(drop, -1)):
            expected = constrained_p_value(*table, margin)
            assert proportion_p_value(*table, margin) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("confidence", [0.51, 0.9, 0.975])
    def test_p_value_and_bound_agree(self, confidence):
        for lost, gained in small_tables(9):
            bound = proportion_upper_bound(lost, gained, 9, confidence)
            assert (lost - gained) / 9 <= bound <= 1
            near = [bound - 1e-9, bound + 1e-9] if bound < 1 else []
            for margin in (*np.linspace(-0.95, 0.95, 20), *near):
                assert (proportion_p_value(lost, gained, 9, margin) <= 1 - confidence) == (bound <= margin)

    def test_p_value_falls_as_the_margin_grows(self):
        for lost, gained in small_tables(6):
            p_values = [proportion_p_value(lost, gained, 6, margin) for margin in np.linspace(-1, 1, 101)]
            assert np.all(np.diff(p_values) <= 1e-12)
            assert 0 <= min(p_values) <= max(p_values) <= 1

    @pytest.mark.parametrize("examples", [1, 30, 5000])
    def test_has_a_closed_form_where_no_answer_changes(self, examples):
        z = stats.norm.ppf(0.95)
        assert proportion_upper_bound(0, 0, examples, 0.95) == pytest.approx(z**2 / (examples + z**2), rel=1e-9)
        assert proportion_p_value(0, 0, examples, 0.0) == 0.5

    def test_is_one_where_every_answer_is_lost(self):
        assert proportion_upper_bound(7, 0, 7, 0.95) == 1.0
        assert proportion_p_value(7, 0, 7, 0.999) > 0.5

    def test_is_mcnemar_without_a_margin(self):
        for lost, gained in ((1, 7), (6, 16), (20, 5)):
            expected = stats.norm.cdf((lost - gained) / math.sqrt(lost + gained))
            assert proportion_p_value(lost, gained, 100, 0.0) == pytest.approx(expected, rel=1e-12)

    def test_is_walds_for_very_many_examples_of_any_integer_type(self):
        counts = np.array([5_000_000, 4_000_000, 1_000_000_000], dtype=np.int32)
        expected = 1e-3 + stats.norm.ppf(0.95) * math.sqrt((9e-3 - 1e-6) / 1e9)
        assert proportion_upper_bound(*counts, 0.95) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.slow
    @pytest.mark.parametrize("chances", [(0.1, 0.1), (0.2, 0.05), (0.05, 0.3), (0.3, 0.4)], ids=str)
    def test_covers_the_drop_as_often_as_it_says(self, chances):
        # No simulation: all tables of 40 examples, each with its probability. They are few: it cannot be exact.
        coverage = 0.0
        for lost, gained in small_tables(40):
            if proportion_upper_bound(lost, gained, 40, 0.95) >= chances[0] - chances[1]:
                table = (lost, gained, 40 - lost - gained)
                coverage += stats.multinomial.pmf(table, 40, (*chances, 1 - sum(chances)))
        assert 0.935 <= coverage <= 0.965


class TestExamplesNeeded:
    def test_is_the_published_number(self):
        # Chow, Shao and Wang, Sample Size Calculation in Clinical Research, 2003, example 3.1.4, as in the manual of
        # TrialSize (R): OneSampleMean.NIS(0.05, 0.2, 1, 0.5, -0.5) is 7. There more is better.
        assert examples_needed(mean=-0.5, deviation=1.0, margin=0.5, confidence=0.95, power=0.8) == 7

    @pytest.mark.parametrize("power", [0.6, 0.8, 0.95])
    def test_is_the_smallest_number_with_the_power(self, power):
        def achieved(count):
            return stats.norm.cdf((0.5 - 0.2) * math.sqrt(count) / 1.7 - stats.norm.ppf(0.975))

        count = examples_needed(0.2, 1.7, 0.5, 0.975, power)
        assert achieved(count - 1) < power <= achieved(count)

    def test_wants_a_power_of_four_fifths(self):
        assert examples_needed(0.2, 1.7, 0.5, 0.975) == examples_needed(0.2, 1.7, 0.5, 0.975, 0.8)

    @pytest.mark.parametrize("mean", [0.5, 0.6])
    def test_is_none_where_the_mean_is_not_below_the_margin(self, mean):
        assert examples_needed(mean, 1.0, 0.5, 0.95) is None

    def test_is_none_beyond_all_numbers(self):
        assert examples_needed(0.0, 1e300, 1e-300, 0.95) is None

    def test_is_two_at_least(self):
        assert examples_needed(0.0, 0.0, 0.5, 0.95) == 2


class TestHolm:
    def test_is_the_example_by_hand(self):
        # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04, which may not fall below 0.06.
        adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
        assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
        assert list(adjusted) == ["a", "b", "c", "d"]

    def test_rejects_what_the_published_example_rejects(self):
        # Manual of the R package HDLSSkST, Holm(c(0.50, 0.01, 0.001, 0.69, 0.02, 0.05, 0.0025), 0.05): 0 0 1 0 0 0 1.
        # The third smallest, 0.01, is on the edge: 5 * 0.01 = 0.05, which that package does not reject.
        adjusted = holm(dict(zip("abcdefg", (0.50, 0.01, 0.001, 0.69, 0.02, 0.05, 0.0025), strict=True)))
        assert [value < 0.05 for value in adjusted.values()] == [False, False, True, False, False, False, True]

    def test_is_the_step_down_procedure(self):
        generator = np.random.default_rng(0)
        for _ in range(50):
            p_values = dict(enumerate(generator.uniform(size=6) ** 3))
            adjusted = holm(p_values)
            for level in (0.01, 0.05, 0.2, 0.7):
                rejected = set()
                for rank, name in enumerate(sorted(p_values, key=p_values.get)):
                    if p_values[name] > level / (6 - rank):
                        break
                    rejected.add(name)
                assert {name for name, value in adjusted.items() if value <= level} == rejected

    def test_keeps_one_p_value_and_none(self):
        assert holm({"a": 0.3}) == {"a": 0.3}
        assert holm({}) == {}

    def test_is_one_at_most(self):
        assert holm({"a": 0.9, "b": 0.7, "c": 0.0}) == {"a": 1.0, "b": 1.0, "c": 0.0}


class TestCalibration:
    def test_is_the_example_by_hand(self):
        # Bins (0, 0.5] and (0.5, 1]: |0 + 1 + 0 - 1.1| and |1 + 0 - 1.5|, over 5 answers.
        confidences, correct = [0.2, 0.4, 0.5, 0.6, 0.9], [0, 1, 0, 1, 0]
        assert expected_calibration_error(confidences, correct, bins=2) == pytest.approx((0.1 + 0.5) / 5)

    def test_of_one_bin_is_the_difference_of_the_means(self):
        assert expected_calibration_error([0.0, 1.0, 0.6], [True, False, False], bins=1) == pytest.approx(0.6 / 3)

    @pytest.mark.parametrize(("bins", "options"), [(15, {}), (10, {"bins": 10}), (7, {"bins": 7})], ids=str)
    def test_is_the_sum_over_bins(self, bins, options):
        generator = np.random.default_rng(0)
        confidences = np.concatenate([generator.uniform(size=90), np.arange(0, bins + 1) / bins])
        correct = generator.uniform(size=len(confidences)) < confidences  # so some bins are too sure, some too unsure
        expected = 0.0
        for index in range(bins):
            held = (confidences > index / bins) & (confidences <= (index + 1) / bins)
            held |= (confidences == 0) & (index == 0)
            expected += held.mean() * abs(correct[held].mean() - confidences[held].mean())
        assert expected_calibration_error(confidences, correct, **options) == pytest.approx(expected, rel=1e-12)


ONE_BY_ONE = ([1.0, 2.0], [1, 1])
COUNTS = ([[3, 1], [2, 2]], [[3, 1], [2, 2]])
NAN, INF = math.nan, math.inf


class TestBadInput:
    @pytest.mark.parametrize(
        "function",
        [
            lambda confidence: mean_upper_bound(*ONE_BY_ONE, confidence),
            lambda confidence: bootstrap_upper_bound(*ONE_BY_ONE, confidence),
            lambda confidence: statistic_upper_bound(ratio, *COUNTS, confidence),
            lambda confidence: proportion_upper_bound(1, 1, 4, confidence),
            lambda confidence: proportion_upper_bound(4, 0, 4, confidence),
            lambda confidence: examples_needed(0.0, 1.0, 1.0, confidence),
        ],
    )
    @pytest.mark.parametrize("confidence", [0.5, 1.0, 0.05, 95, -0.95, NAN])
    def test_confidence_is_out_of_range(self, function, confidence):
        with pytest.raises(DataError, match=f"confidence must lie between 0.5 and 1, not {confidence}"):
            function(confidence)

    @pytest.mark.parametrize(
        "function",
        [
            lambda *arrays: mean_upper_bound(*arrays, 0.95),
            lambda *arrays: mean_p_value(*arrays, 0.1),
            lambda *arrays: bootstrap_upper_bound(*arrays, 0.95),
        ],
    )
    @pytest.mark.parametrize(
        ("differences", "units", "message"),
        [
            ([], [], r"differences and units must have one shape of 1 dimensions, not empty, but have \(0,\)"),
            ([1.0, 2.0], [1], r"have \(2,\) and \(1,\)"),
            ([[1.0, 2.0]], [[1, 1]], r"have \(1, 2\)"),
            ([1.0, NAN], [1, 1], "differences must be finite and .* not nan"),
            ([1.0, -INF], [1, 1], "differences must be finite and .* not -inf"),
            ([1.0, 2.0], [1, INF], "units must be finite and .* not inf"),
            ([1.0, 2.0], [4, -3], "units must be finite and from 0 to inf, not -3"),
            ([0.0, 0.0], [0, 0], "units must not be 0 in all clusters"),
            ([1.0, 2.0, 3.0], [0, 1, 1], "nor in one whose difference is not 0"),
        ],
    )
    def test_clusters(self, function, differences, units, message):
        with pytest.raises(DataError, match=message):
            function(differences, units)

    @pytest.mark.parametrize(
        ("dense", "compressed", "message"),
        [
            (np.zeros((0, 2)), np.zeros((0, 2)), r"not empty, but have \(0, 2\)"),
            ([1, 2], [1, 2], r"dense and compressed must have one shape of 2 dimensions, .* \(2,\)"),
            (COUNTS[0], [[3, 1]], r"\(2, 2\) and \(1, 2\)"),
            ([[1, -2]], [[1, 2]], "dense must be finite and from 0 to inf, not -2"),
            ([[1, 2]], [[1, NAN]], "compressed must be finite and from 0 to inf, not nan"),
        ],
    )
    def test_counts_of_examples(self, dense, compressed, message):
        with pytest.raises(DataError, match=message):
            statistic_upper_bound(ratio, dense, compressed, 0.95)

    @pytest.mark.parametrize(
        "function",
        [
            lambda lost, gained, examples: proportion_upper_bound(lost, gained, examples, 0.95),
            lambda lost, gained, examples: proportion_p_value(lost, gained, examples, 0.1),
        ],
    )
    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ((-1, 0, 5), "lost must be a whole number of at least 0, not -1"),
            ((0, 1.5, 5), "gained must be a whole number of at least 0, not 1.5"),
            ((0, NAN, 5), "gained must be a whole number of at least 0, not nan"),
            ((0, 0, 0), "examples must be a whole number of at least 1, not 0"),
            ((0, 0, INF), "examples must be a whole number of at least 1, not inf"),
            ((3, 3, 5), r"lost \(3\) and gained \(3\) are together more than the examples \(5\)"),
        ],
    )
    def test_table(self, function, table, message):
        with pytest.raises(DataError, match=message):
            function(*table)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda: mean_p_value(*ONE_BY_ONE, NAN), "margin must be finite .* not nan"),
            (lambda: proportion_p_value(1, 1, 4, 1.1), "margin must be finite and from -1 to 1, not 1.1"),
            (lambda: proportion_p_value(1, 1, 4, -1.1), "margin must be finite and from -1 to 1, not -1.1"),
            (lambda: proportion_p_value(1, 1, 4, NAN), "margin must be finite and from -1 to 1, not nan"),
            (lambda: bootstrap_upper_bound(*ONE_BY_ONE, 0.95, seed=-1), "seed must be .* not -1"),
            (lambda: bootstrap_upper_bound(*ONE_BY_ONE, 0.95, resamples=0), "resamples must be .* at least 1, not 0"),
            (lambda: statistic_upper_bound(ratio, *COUNTS, 0.95, seed=0.5), "seed must be .* not 0.5"),
            (lambda: examples_needed(INF, 1.0, 1.0, 0.95), "mean must be finite .* not inf"),
            (lambda: examples_needed(0.0, 1.0, NAN, 0.95), "margin must be finite .* not nan"),
            (lambda: examples_needed(0.0, -1.0, 1.0, 0.95), "deviation must be finite and from 0 to inf, not -1"),
            (lambda: examples_needed(0.0, 1.0, 1.0, 0.95, power=1.0), "power must lie between 0.5 and 1, not 1.0"),
            (lambda: examples_needed(0.0, 1.0, 1.0, 0.95, power=0.2), "power must lie between 0.5 and 1, not 0.2"),
            (lambda: holm({"a": 0.1, "b": 1.5}), "p-value of 'b' must be finite and from 0 to 1, not 1.5"),
            (lambda: holm({"a": NAN}), "p-value of 'a' must be finite and from 0 to 1, not nan"),
            (lambda: expected_calibration_error([], []), "not empty"),
            (lambda: expected_calibration_error([0.5], [1, 0]), r"have \(1,\) and \(2,\)"),
            (lambda: expected_calibration_error([0.5, 1.2], [1, 0]), "confidences must be finite and .* not 1.2"),
            (lambda: expected_calibration_error([0.5, NAN], [1, 0]), "confidences must be finite and .* not nan"),
            (lambda: expected_calibration_error([0.5, 0.2], [1, 2]), "correct must be finite and from 0 to 1, not 2"),
            (
                lambda: expected_calibration_error([0.5], [1], bins=0),
                "bins must be a whole number of at least 1, not 0",
            ),
        ],
    )
    def test_single_arguments(self, function, message):
        with pytest.raises(DataError, match=message):
            function()
