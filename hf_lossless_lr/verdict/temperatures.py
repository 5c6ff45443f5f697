"""Losses at fitted temperatures: what is left of a difference once both models are as sure as suits them best."""

from __future__ import annotations

import numpy as np

from .outcomes import TEMPERATURES, PairedOutcomes


def at_fitted_temperatures(outcomes: PairedOutcomes) -> tuple[tuple[float, float] | None, np.ndarray | None]:
    """Return the temperature that minimizes each model's loss, and the loss increase of each cluster at these.

    A temperature divides the logits, so it changes how sure a model is, and none of its answers.

    Args:
        outcomes: the outcomes.

    Returns:
        The temperatures (dense, compressed), and the increase.  # shape: (clusters,)
        None for both where the losses were not taken at several temperatures.
    """
    if outcomes.tempered is None:
        return None, None
    (dense, before), (compressed, after) = map(_fitted, outcomes.tempered)
    return (dense, compressed), after - before


def _fitted(losses: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the best temperature and the losses there, interpolated by a parabola in the logarithm.

    Args:
        losses: summed losses.  # shape: (temperatures, clusters)

    Returns:
        The temperature, and the summed loss of each cluster.
    """
    totals = losses.sum(1)
    best = int(np.clip(totals.argmin(), 1, len(totals) - 2))
    left, middle, right = totals[best - 1 : best + 2]
    curvature = left - 2 * middle + right
    x = float(np.clip((left - right) / (2 * curvature) if curvature > 0 else np.sign(left - right), -1, 1))
    weights = np.array([x * (x - 1) / 2, 1 - x * x, x * (x + 1) / 2])
    step = np.log(TEMPERATURES[1] / TEMPERATURES[0])
    return float(TEMPERATURES[best] * np.exp(x * step)), weights @ losses[best - 1 : best + 2]


def temperature_doubt(temperatures: tuple[float, float] | None) -> str | None:
    """Return a complaint if the dense model's best temperature is not inside the range where losses are taken.

    Then its loss there is too high, and a compressed model with smaller or larger logits would seem better than it.
    """
    low, high = TEMPERATURES[0], TEMPERATURES[-1]
    if temperatures is None or low * 1.001 < temperatures[0] < high / 1.001:
        return None
    return (
        f"the dense model's best temperature is not between {low:g} and {high:g}, so the losses at fitted "
        "temperatures cannot be compared"
    )
