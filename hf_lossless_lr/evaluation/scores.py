"""Scores of a model on a task: counts of each example that add up, and the metrics of their sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..bounds import statistic_upper_bound
from ..errors import DataError
from ..report import Difference


@dataclass(frozen=True)
class Metric:
    """A metric of summed counts, such as accuracy or F1.

    Attributes:
        name: its usual name.
        of_sums: from summed counts, (..., counts), to values, (...).
        higher_is_better: whether a larger value is better (not so for a perplexity).
    """

    name: str
    of_sums: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool = True


@dataclass(frozen=True)
class Scores:
    """What a model scored, example by example.

    Attributes:
        counts: what each example (or document) adds to the counts.  # shape: (examples, counts)
        metrics: the task's metrics of their sums, the main one first.
    """

    counts: np.ndarray
    metrics: tuple[Metric, ...]

    def values(self) -> dict[str, tuple[float, float]]:
        """Return each metric and its standard error.

        The error is the jackknife's, `sqrt((n − 1)/n Σ (θ_i − mean θ)²)`, with `θ_i` the metric without example `i`.

        Returns:
            Name of the metric to its value and error.
        """
        total, count = self.counts.sum(0), len(self.counts)
        result = {}
        for metric in self.metrics:
            left_out = metric.of_sums(total - self.counts)
            error = np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
            result[metric.name] = (float(metric.of_sums(total)), float(error))
        return result


def compare(dense: Scores, compressed: Scores, confidence: float) -> dict[str, Difference]:
    """Compare two models on the same examples, by the paired BCa bootstrap.

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
    result = {}
    for metric in dense.metrics:
        sign = 1 if metric.higher_is_better else -1

        def worth(sums: np.ndarray, metric: Metric = metric, sign: int = sign) -> np.ndarray:
            return sign * metric.of_sums(sums)

        drop = worth(dense.counts.sum(0)) - worth(compressed.counts.sum(0))
        upper = statistic_upper_bound(worth, dense.counts, compressed.counts, confidence)
        lower = -statistic_upper_bound(worth, compressed.counts, dense.counts, confidence)
        result[metric.name] = Difference(float(drop), lower, upper)
    return result


def side_by_side(dense: Scores, compressed: Scores, confidence: float) -> tuple[dict[str, dict[str, Any]], str]:
    """Compare two models for a reader: every metric of both with its standard error, and the bounds of `compare`.

    Args:
        dense: scores of the dense model.
        compressed: scores of the compressed model.
        confidence: level of each one-sided bound.

    Returns:
        Plain data (name of the metric to `dense`, `compressed` and `drop`), and the same as lines of text.
    """
    before, after = dense.values(), compressed.values()
    figures, lines = {}, []
    for name, drop in compare(dense, compressed, confidence).items():
        figures[name] = {"dense": before[name], "compressed": after[name], "drop": asdict(drop)}
        lines += [
            "{}: dense {:.4f} ± {:.4f}, compressed {:.4f} ± {:.4f}".format(name, *before[name], *after[name]),
            f"  worse by {drop.mean:+.4f}; {confidence:.0%} bounds {drop.lower:+.4f} and {drop.upper:+.4f}",
        ]
    return figures, "\n".join(lines)
