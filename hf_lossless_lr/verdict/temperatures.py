"""Losses at fitted temperatures: what is left of a difference once both models are as sure as suits them best."""

from __future__ import annotations

import numpy as np

from .outcomes import TEMPERATURES, PairedOutcomes

PLACES = 201  # between two steps of the temperatures, among which the best one is looked for
INTERPOLATED = 0.0005
"""Nats by which a loss between two temperatures may be off."""


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
    """Return the best temperature and the losses there, by the polynomial through five points of the logarithm.

    Args:
        losses: summed losses.  # shape: (temperatures, clusters)

    Returns:
        The temperature, and the summed loss of each cluster.
    """
    totals, first, last = losses.sum(1), 1, len(losses) - 2
    best = first + int(totals[first : last + 1].argmin())
    middle = int(np.clip(best, 2, last - 1))
    near = losses[middle - 2 : middle + 3]
    places = np.linspace(max(best - 1, first), min(best + 1, last), PLACES) - middle
    found = _weights(places) @ near.sum(1)
    lowest = int(np.clip(found.argmin(), 1, PLACES - 2))
    left, least, right = found[lowest - 1 : lowest + 2]
    curvature = left - 2 * least + right
    offset = float(np.clip((left - right) / (2 * curvature) if curvature > 0 else np.sign(left - right), -1, 1))
    x = places[lowest] + offset * (places[1] - places[0])
    step = np.log(TEMPERATURES[1] / TEMPERATURES[0])
    return float(TEMPERATURES[middle] * np.exp(x * step)), _weights(x) @ near


def _weights(x: np.ndarray) -> np.ndarray:
    """Return what Lagrange's polynomial through -2 … 2 takes of the values there.  # shape: (..., 5)."""
    nodes = range(-2, 3)
    parts = [np.prod([(x - other) / (node - other) for other in nodes if other != node], axis=0) for node in nodes]
    return np.stack(parts, axis=-1)


def temperature_doubt(temperatures: tuple[float, float] | None) -> str | None:
    """Return a complaint if the dense model's best temperature is not inside the range where losses are taken.

    Then its loss there is too high, and a compressed model with smaller or larger logits would seem better than it.
    """
    low, high = TEMPERATURES[1], TEMPERATURES[-2]
    if temperatures is None or low * 1.001 < temperatures[0] < high / 1.001:
        return None
    return (
        f"the dense model's best temperature is not between {low:g} and {high:g}, so the losses at fitted "
        "temperatures cannot be compared"
    )
