"""Search along a compression path by measurement, in a handful of trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

MAX_TRIALS = 8
RESOLUTION = 0.01  # of the kept share; a bracket narrower than this is not searched further


class Measured(Protocol):
    """What the search needs of a trial."""

    @property
    def increase(self) -> float:
        """Measured mean loss increase, in nats."""


T = TypeVar("T", bound=Measured)
Measure = Callable[[int], T]


def most_compressed(
    costs: Sequence[float],
    kept: Sequence[float],
    measure: Measure[T],
    accept: Callable[[T], bool],
    margin: float,
) -> tuple[int, T] | None:
    """Find the most compressed point of a path that is accepted.

    The predicted costs order the points well but are wrong in scale, so each measurement rescales them, and the next
    point is the one predicted to use half of the margin, kept inside the bracket of accepted and refused points.

    Args:
        costs: predicted cost of each point, in nats, not decreasing; point 0 is the dense model.
        kept: kept share of each point, decreasing.
        measure: makes and measures a point.
        accept: whether a measured point passes.
        margin: loss margin, in nats.

    Returns:
        The point and its trial, or None if no point was accepted.
    """
    best: tuple[int, T] | None = None
    low, high, scale = 0, len(costs), 10.0
    for _ in range(MAX_TRIALS):
        if high - low <= 1 or (high < len(kept) and kept[low] - kept[high] < RESOLUTION):
            break
        wanted = [i for i in range(low + 1, high) if scale * costs[i] <= margin / 2]
        point = wanted[-1] if wanted else low + 1
        # Stay away from the ends of the bracket, so that it shrinks by a tenth at least. If the aim is at an end where
        # both ends are measured, halve the bracket.
        top, bottom = kept[low], kept[min(high, len(kept) - 1)]
        inner = [i for i in range(low + 1, high) if 0.1 <= (top - kept[i]) / max(top - bottom, 1e-12) <= 0.9]
        if inner and low > 0 and high < len(kept) and not inner[0] <= point <= inner[-1]:
            point = min(inner, key=lambda i: abs(kept[i] - (top + bottom) / 2))
        elif inner:
            point = min(max(point, inner[0]), inner[-1])
        trial = measure(point)
        if costs[point] > 0 and trial.increase > 0:
            scale = trial.increase / costs[point]
        if accept(trial):
            low, best = point, (point, trial)
        else:
            high = point
    return best


def lowest_loss(kept: Sequence[float], measure: Measure[T], shares: Sequence[float]) -> tuple[int, T] | None:
    """Find the point with the lowest measured loss among the points next to some kept shares.

    Args:
        kept: kept share of each point, decreasing; point 0 is the dense model.
        measure: makes and measures a point.
        shares: kept shares to try.

    Returns:
        The point and its trial, or None if the path has no point but the dense one.
    """
    points = (
        {min(range(1, len(kept)), key=lambda i: abs(kept[i] - share)) for share in shares} if len(kept) > 1 else set()
    )
    trials = [(point, measure(point)) for point in sorted(points)]
    return min(trials, key=lambda entry: entry[1].increase, default=None)
