"""Scores of a model on a task: counts of each example that add up, and the metrics of their sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from ..report import Difference, finite
from ..verdict import proportion_upper_bound, statistic_upper_bound


@dataclass(frozen=True)
class Score:
    """A metric of summed counts, such as accuracy or F1.

    Attributes:
        name: its usual name.
        of_sums: from summed counts, (..., counts), to values, (...).
        higher_is_better: whether a larger value is better (not so for a perplexity).
        right: where the metric is the share of all examples that are right, from the counts of each example,
            (..., counts), to 1 or 0, (...).
    """

    name: str
    of_sums: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool = True
    right: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Scores:
    """What a model scored, example by example.

    Attributes:
        counts: what each example (or document) adds to the counts.  # shape: (examples, counts)
        metrics: the task's metrics of their sums, the main one first.
    """

    counts: np.ndarray
    metrics: tuple[Score, ...]

    def values(self) -> dict[str, tuple[float, float]]:
        """Return each metric and its standard error.

        The error is the jackknife's, `sqrt((n − 1)/n Σ (θ_i − mean θ)²)`, with `θ_i` the metric without example `i`.

        Returns:
            Name of the metric to its value and error; the error of a single example is not a number.
        """
        total, count = self.counts.sum(0), len(self.counts)
        result = {}
        for metric in self.metrics:
            error = np.nan
            if count > 1:
                left_out = metric.of_sums(total - self.counts)
                error = np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
            result[metric.name] = (float(metric.of_sums(total)), float(error))
        return result


def compare(dense: Scores, compressed: Scores, confidence: float) -> dict[str, Difference]:
    """Compare two models on the same examples.

    The bounds are those of Tango's score test where a metric is the share of right examples, as in the certificate,
    and of the paired BCa bootstrap elsewhere.

    Args:
        dense: scores of the dense model.
        compressed: scores of the compressed model.
        confidence: level of each one-sided bound.

    Returns:
        Name of the metric to its difference, positive where the compressed model is worse.

    Raises:
        DataError: if the two are not scores of the same task and examples.
    """
    if dense.counts.shape != compressed.counts.shape:
        raise DataError("the two models were not scored on the same examples, so they cannot be compared.")
    return {metric.name: _difference(metric, dense.counts, compressed.counts, confidence) for metric in dense.metrics}


def _difference(metric: Score, dense: np.ndarray, compressed: np.ndarray, confidence: float) -> Difference:
    sign = 1 if metric.higher_is_better else -1

    def worth(sums: np.ndarray) -> np.ndarray:
        return sign * metric.of_sums(sums)

    drop = float(worth(dense.sum(0)) - worth(compressed.sum(0)))
    if metric.right is not None:
        change = metric.right(dense) - metric.right(compressed)
        lost, gained = int((change > 0).sum()), int((change < 0).sum())
        upper = proportion_upper_bound(lost, gained, len(change), confidence)
        return Difference(drop, -proportion_upper_bound(gained, lost, len(change), confidence), upper)
    lower = 0.0 - statistic_upper_bound(worth, compressed, dense, confidence)  # never -0.0
    return Difference(drop, lower, statistic_upper_bound(worth, dense, compressed, confidence))


def summarize(models: Sequence[Scores], confidence: float) -> dict[str, dict[str, Any]]:
    """Return the metrics of a model, or of a dense and a compressed one, as plain data.

    Args:
        models: scores of one or two models on the same examples.
        confidence: level of each one-sided bound.

    Returns:
        Name of the metric to `values`, each a `value` and a `standard_error`; for two models also to their `drop`, the
        `mean`, `lower` and `upper` of `compare`. What is not finite, such as a bound from one example, is None.

    Raises:
        DataError: if the two are not scores of the same task and examples.
    """
    found = [scores.values() for scores in models]
    summary: dict[str, dict[str, Any]] = {
        name: {"values": [{"value": values[name][0], "standard_error": values[name][1]} for values in found]}
        for name in found[0]
    }
    if len(models) == 2:
        for name, drop in compare(models[0], models[1], confidence).items():
            summary[name]["drop"] = asdict(drop)
    return dict(finite(summary))
