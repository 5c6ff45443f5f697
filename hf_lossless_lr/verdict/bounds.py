"""One-sided confidence bounds for paired comparisons of a dense and a compressed model, and what follows from them.

Each example is answered by both models. A cluster is what was drawn independently: an example, a document or a batch.
`differences` are sums over each cluster, compressed minus dense, and `units` its labelled units, both (clusters,).
`lost` examples are answered right by the dense model only, `gained` ones by the compressed model only, out of
`examples`. `confidence` lies between 0.5 and 1; a p-value is at most `1 - confidence` exactly where the bound of the
same name is at most the margin. Every function raises `DataError` for input that cannot be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import DataError

Metric = Callable[[np.ndarray], np.ndarray]  # of sums, from (..., columns) to (...)
DRAWN_AT_ONCE = 2**15  # clusters that resamples draw at once: enough for few of them, few enough for a cache


def mean_upper_bound(differences: ArrayLike, units: ArrayLike, confidence: float) -> float:
    r"""Bound a mean difference per labelled unit from above, by Student's t over clusters.

    `mean + t sqrt(n / (n - 1) Σ (d_i - mean u_i)²) / Σ u_i` with `mean = Σ d_i / Σ u_i` and t of `n - 1` degrees of
    freedom. Clusters without a unit are left out.

    Returns:
        The bound; infinite for fewer than 2 clusters.

    Source: W. G. Cochran, Sampling Techniques, 3rd ed., 1977, chapter 6 (the ratio estimator).
    """
    from scipy.stats import t  # here, as below: scipy is slow to import

    _check_between("confidence", confidence, 0.5, 1)
    mean, error, count = _mean_and_error(*_clusters(differences, units))
    return math.inf if count < 2 else float(mean + t.ppf(confidence, count - 1) * error)


def mean_p_value(differences: ArrayLike, units: ArrayLike, margin: float) -> float:
    """Return the p-value of "the mean per labelled unit is at least `margin`", by the t test of `mean_upper_bound`."""
    from scipy.stats import t

    _check_range("margin", margin)
    mean, error, count = _mean_and_error(*_clusters(differences, units))
    if count < 2 or error == 0:
        return 0.0 if count > 1 and mean <= margin else 1.0
    return float(t.cdf((mean - margin) / error, count - 1))


def bootstrap_upper_bound(
    differences: ArrayLike, units: ArrayLike, confidence: float, seed: int = 0, resamples: int = 9999
) -> float:
    """Bound a mean difference per labelled unit from above, by the BCa bootstrap over clusters.

    Returns:
        The bound; infinite for fewer than 2 clusters.

    Source: B. Efron, Better Bootstrap Confidence Intervals, Journal of the American Statistical Association 82, 1987.
    """
    columns = _clusters(differences, units)
    return _bootstrap_bound(columns, lambda sums: sums[..., 0] / sums[..., 1], confidence, seed, resamples)


def statistic_upper_bound(
    statistic: Metric, dense: ArrayLike, compressed: ArrayLike, confidence: float, seed: int = 0, resamples: int = 9999
) -> float:
    """Bound the drop of a metric of summed counts, such as F1, from above, by the paired BCa bootstrap over examples.

    The drop is `statistic(Σ dense) - statistic(Σ compressed)`; a resample draws the same examples of both models.

    Args:
        statistic: from summed counts, (..., counts), to values of the metric, (...).
        dense: counts of each example, such as true positives, false positives, false negatives, (examples, counts).
        compressed: the same of the compressed model.
        confidence: level of the bound.
        seed: seed of the resampling.
        resamples: number of resamples.

    Returns:
        The bound; infinite for fewer than 2 examples.
    """
    before, after = _arrays(2, 0, dense=dense, compressed=compressed)

    def drop(sums: np.ndarray) -> np.ndarray:
        drops = statistic(sums[..., : before.shape[1]]) - statistic(sums[..., before.shape[1] :])
        return np.round(drops, 12)  # BCa counts ties, and 0.8 - 0.7 is not quite 0.7 - 0.6

    return _bootstrap_bound((*before.T, *after.T), drop, confidence, seed, resamples)


def proportion_upper_bound(lost: int, gained: int, examples: int, confidence: float) -> float:
    """Bound the drop of the share of right answers, `(lost - gained) / examples`, from above, by Tango's score test.

    It is the largest drop that the test does not reject; if no answer changes, it is `z² / (examples + z²)`.

    Returns:
        The bound, at most 1.

    Source: T. Tango, Equivalence Test and Confidence Interval for the Difference in Proportions for the Paired-Sample
        Design, Statistics in Medicine 17, 1998.
    """
    from scipy.optimize import brentq

    table = _table(lost, gained, examples)
    _check_between("confidence", confidence, 0.5, 1)
    if lost == examples:
        return 1.0
    return float(brentq(lambda drop: _score_p_value(*table, drop) - (1 - confidence), -1, 1, xtol=1e-14, maxiter=999))


def proportion_p_value(lost: int, gained: int, examples: int, margin: float) -> float:
    """Return the p-value of "the drop is at least `margin`", by the score test of `proportion_upper_bound`."""
    _check_range("margin", margin, -1, 1)
    return _score_p_value(*_table(lost, gained, examples), margin)


def examples_needed(mean: float, deviation: float, margin: float, confidence: float, power: float = 0.8) -> int | None:
    """Estimate the clusters for which the one-sided test shows, with a given power, that a mean is below a margin.

    `((z_confidence + z_power) deviation / (margin - mean))²`, rounded up.

    Args:
        mean: the expected mean difference.
        deviation: standard deviation of the difference of one cluster.
        margin: the margin.
        confidence: level of the test.
        power: wanted probability that the test succeeds, between 0.5 and 1.

    Returns:
        The number, at least 2; None if no number suffices because the mean is not below the margin.
    """
    from scipy.special import ndtri

    _check_range("mean", mean)
    _check_range("margin", margin)
    _check_range("deviation", deviation, 0)
    _check_between("confidence", confidence, 0.5, 1)
    _check_between("power", power, 0.5, 1)
    if mean >= margin:
        return None
    root = float(ndtri(confidence) + ndtri(power)) * float(deviation) / float(margin - mean)
    return max(math.ceil(root * root), 2) if math.isfinite(root * root) else None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for their number: with those at most α taken as shown, any error at all has probability α.

    The i-th smallest of m becomes `max_{j <= i} min((m - j + 1) p_j, 1)`.

    Returns:
        The adjusted p-values, in the order given.

    Source: S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics, 1979.
    """
    adjusted, largest = dict.fromkeys(p_values, 0.0), 0.0
    for name, value in p_values.items():
        _check_range(f"the p-value of {name!r}", value, 0, 1)
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min((len(p_values) - rank) * float(p_values[name]), 1.0))
        adjusted[name] = largest
    return adjusted


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Measure how far confidences are from the shares of right answers, `Σ_bins |Σ correct - Σ confidences| / n`.

    Args:
        confidences: probability of each predicted answer, (answers,).
        correct: whether each is right, 0 or 1, (answers,).
        bins: number of bins of equal width; a bin holds its upper edge.

    Returns:
        The error, between 0 and 1.

    Source: C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3.
    """
    predicted, right = _arrays(1, 0, 1, confidences=confidences, correct=correct)
    edges = np.arange(1, _count("bins", bins, least=1)) / bins
    sums = np.bincount(np.digitize(predicted, edges, right=True), right - predicted)
    return float(np.abs(sums).sum() / len(right))


def _mean_and_error(differences: np.ndarray, units: np.ndarray) -> tuple[float, float, int]:
    """Return the mean per unit, its standard error (infinite for one cluster) and the number of clusters."""
    count, mean = len(units), differences.sum() / units.sum()
    spread = ((differences - mean * units) ** 2).sum()
    return mean, np.sqrt(count / (count - 1) * spread) / units.sum() if count > 1 else math.inf, count


def _score_p_value(lost: int, gained: int, examples: int, drop: float) -> float:
    """Return the p-value of Tango's score test of "the drop is at least `drop`"."""
    from scipy.special import ndtr

    # The most likely probability to gain, given the drop, is the larger root of a quadratic.
    linear = (2 * examples - lost + gained) * drop - lost - gained
    discriminant = linear**2 + 8 * examples * gained * drop * (1 - drop)
    gain = (math.sqrt(max(discriminant, 0.0)) - linear) / (4 * examples)
    variance = examples * (2 * gain + drop * (1 - drop))
    distance = lost - gained - examples * drop
    if variance <= 0:  # the hypothesis leaves one outcome only
        return 0.5 + 0.5 * float(np.sign(distance))
    return float(ndtr(distance / math.sqrt(variance)))


def _bootstrap_bound(
    columns: Sequence[np.ndarray], statistic: Metric, confidence: float, seed: int, resamples: int
) -> float:
    """Return the upper BCa bound of a statistic of the sums of paired columns."""
    # Not scipy.stats.bootstrap: it copies all clusters once for each that it leaves out, which takes minutes from
    # 50,000 on. Of sums, one cluster is subtracted.
    from scipy.special import ndtr, ndtri

    _check_between("confidence", confidence, 0.5, 1)
    seed, resamples = _count("seed", seed), _count("resamples", resamples, least=1)
    rows, count = np.stack(columns, axis=1), len(columns[0])
    if count < 2:
        return math.inf
    with np.errstate(all="ignore"):
        resampled, observed = statistic(_resampled(rows, seed, resamples)), float(statistic(rows.sum(0)))
        if not (math.isfinite(observed) and np.isfinite(resampled).all()):
            raise DataError("the statistic of a resample is not finite; it must be defined also where counts are 0.")
        left_out = statistic(rows.sum(0) - rows)
        influence = left_out.mean() - left_out
        acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
        bias = ndtri(((resampled < observed).mean() + (resampled <= observed).mean()) / 2)
        shifted = bias + ndtri(confidence)
        level = float(ndtr(bias + shifted / (1 - acceleration * shifted)))
    # BCa has no answer where all resamples agree, or all lie on one side of the observed value.
    return float(np.quantile(resampled, level)) if math.isfinite(level) else max(observed, float(resampled.max()))


def _resampled(rows: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Return the sums of rows that are drawn with replacement, as many as there are.  # shape: (resamples, …)."""
    generator, count, sums = np.random.default_rng(seed), len(rows), []
    at_once = max(DRAWN_AT_ONCE // count, 1)
    for first in range(0, resamples, at_once):
        drawn = generator.integers(count, size=(min(at_once, resamples - first), count))
        drawn += count * np.arange(len(drawn))[:, None]  # each resample counts in bins of its own
        times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        sums.append(times @ rows)
    return np.concatenate(sums)


def _clusters(differences: ArrayLike, units: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Check the sums of clusters, and leave out those without a unit."""
    d, u = _arrays(1, differences=differences, units=units)
    _check_range("units", u, 0)
    if not u.any() or d[u == 0].any():
        raise DataError("units must not be 0 in all clusters, nor in one whose difference is not 0.")
    return d[u > 0], u[u > 0]


def _arrays(dimensions: int, low: float = -math.inf, high: float = math.inf, **inputs: ArrayLike) -> list[np.ndarray]:
    """Return arrays of one shape, not empty, of finite values from `low` to `high`."""
    arrays = [np.asarray(values, dtype=np.float64) for values in inputs.values()]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != dimensions or 0 in shapes[0]:
        names, found = " and ".join(inputs), " and ".join(map(str, shapes))
        raise DataError(f"{names} must have one shape of {dimensions} dimensions, not empty, but have {found}.")
    for name, array in zip(inputs, arrays, strict=True):
        _check_range(name, array, low, high)
    return arrays


def _check_range(name: str, values: ArrayLike, low: float = -math.inf, high: float = math.inf) -> None:
    array = np.asarray(values, dtype=np.float64)
    wrong = array[~(np.isfinite(array) & (array >= low) & (array <= high))]
    if wrong.size:
        raise DataError(f"{name} must be finite and from {low} to {high}, not {wrong[0]}.")


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise DataError(f"{name} must lie between {low} and {high}, not {value}.")


def _count(name: str, value: int, least: int = 0) -> int:
    """Return a number as an int, if it is whole and not too small."""
    if not math.isfinite(value) or value != int(value) or value < least:
        raise DataError(f"{name} must be a whole number of at least {least}, not {value}.")
    return int(value)


def _table(lost: int, gained: int, examples: int) -> tuple[int, int, int]:
    lost, gained, examples = _count("lost", lost), _count("gained", gained), _count("examples", examples, least=1)
    if lost + gained > examples:
        raise DataError(f"lost ({lost}) and gained ({gained}) are together more than the examples ({examples}).")
    return lost, gained, examples
