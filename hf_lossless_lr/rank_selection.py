r"""Which rank each layer gets: pure functions of the loss curves, deterministic.

`ranks` maps a layer to its rank, or to None where it stays dense.

The allocation over the whole model minimizes `Σ cost_l(k_l) + λ Σ parameters_l(k_l)`: for a fixed multiplier `λ`
each layer answers alone, with a vertex of the lower convex hull of its points `(parameters, cost)`. As `λ` grows,
layers step along their hulls, one edge at a time in the order of the edges' slopes. `CompressionPath` is that list of
steps: it leads from the dense model to the smallest one, and each prefix of it is a model nested in the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .curves import LossCurve, break_even_rank
from .errors import ConfigurationError

Ranks = dict[str, int | None]
Curves = Mapping[str, LossCurve]


@dataclass(frozen=True)
class Step:
    """One step along the path: a layer goes to a lower rank.

    Attributes:
        layer: name of the layer.
        rank: its new rank.
        saved: parameters saved by the step.
        cost: predicted cost added by the step, in nats.
    """

    layer: str
    rank: int
    saved: int
    cost: float


@dataclass(frozen=True)
class CompressionPath:
    """Models from dense to smallest, one step a layer, cheapest steps first.

    Attributes:
        layers: names of all layers.
        steps: the steps in order.
    """

    layers: tuple[str, ...]
    steps: tuple[Step, ...]

    def ranks_after(self, count: int) -> Ranks:
        """Return the ranks after the first `count` steps."""
        ranks: Ranks = dict.fromkeys(self.layers)
        for step in self.steps[:count]:
            ranks[step.layer] = step.rank
        return ranks


def allowed_ranks(curve: LossCurve, multiple: int) -> list[int]:
    """Return the ranks worth having: multiples of `multiple` that compress, and no higher one in fewer parameters.

    (With `auto` storage a slightly higher rank can take less, where the storage changes.)
    """
    ranks: list[int] = []
    for rank in reversed(range(multiple, curve.break_even_rank + 1, multiple)):
        if curve.parameters(rank) < (curve.parameters(ranks[-1]) if ranks else curve.dense_parameters):
            ranks.append(rank)
    return ranks[::-1]


def _hull(points: list[tuple[int, float, int | None]]) -> list[tuple[int, float, int | None]]:
    """Return the lower convex hull of `(parameters, cost, rank)`, from the dense point (most parameters) downwards."""
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, int | None], b: tuple[int, float, int | None]) -> float:
    """Return the cost of each parameter saved between two points."""
    return (b[1] - a[1]) / (a[0] - b[0])


def compression_path(
    curves: Curves, cost: Callable[[LossCurve], np.ndarray], rank_multiple: int = 1
) -> CompressionPath:
    """Build the path of models from dense to the smallest.

    Args:
        curves: a loss curve for each layer.
        cost: predicted cost of a layer for every rank, in nats; the dense layer costs 0.
        rank_multiple: multiple that ranks are restricted to.

    Returns:
        The path; ties are broken by the order of the layers.
    """
    steps: list[tuple[float, int, int, Step]] = []
    for order, (name, curve) in enumerate(curves.items()):
        costs = cost(curve)
        ranks = allowed_ranks(curve, rank_multiple)[::-1]
        points = [(curve.parameters(rank), float(costs[rank]), rank) for rank in ranks]
        hull = _hull([(curve.dense_parameters, 0.0, None), *points])
        slope = -math.inf
        for position, (a, b) in enumerate(pairwise(hull)):
            if b[2] is not None:  # always, behind the dense point; the type checker cannot know
                slope = max(slope, _slope(a, b))  # rounding must not reorder the steps of one layer
                steps.append((slope, order, position, Step(name, b[2], a[0] - b[0], b[1] - a[1])))
    steps.sort(key=lambda entry: entry[:3])
    return CompressionPath(tuple(curves), tuple(entry[3] for entry in steps))


def second_order_cost(curve: LossCurve) -> np.ndarray:
    """Return the second-order term in nats: the cost that `budget` minimizes.  # shape: (m + 1,)."""
    return curve.second_order


def kept_parameters(curves: Curves, ranks: Mapping[str, int | None]) -> int:
    """Return the parameters of all layers' weights at the given ranks."""
    return sum(curve.parameters(ranks[name]) for name, curve in curves.items())


def select_budget(curves: Curves, keep_ratio: float, rank_multiple: int = 1) -> Ranks:
    """Choose the ranks with the lowest predicted loss that keep at most a share of the parameters.

    Walks the path until the budget is met; the last layer then takes the cheapest rank that still fits: the largest
    one, where its cost falls with the rank.

    Args:
        curves: a loss curve for each layer.
        keep_ratio: parameters kept divided by original parameters, in (0, 1].
        rank_multiple: multiple that ranks are restricted to.

    Returns:
        The ranks.

    Raises:
        ConfigurationError: if even the smallest model is larger than the budget.
    """
    dense = sum(curve.dense_parameters for curve in curves.values())
    budget = keep_ratio * dense
    path = compression_path(curves, second_order_cost, rank_multiple)
    kept, count = dense, 0
    while kept > budget and count < len(path.steps):
        kept -= path.steps[count].saved
        count += 1
    if kept > budget:
        raise ConfigurationError(
            f"keep_ratio={keep_ratio} cannot be reached: with rank_multiple={rank_multiple} the smallest model keeps "
            f"{kept / dense:.4f} of the targeted parameters."
        )
    ranks = path.ranks_after(count)
    if count:
        last = path.steps[count - 1].layer
        curve, spare = curves[last], budget - kept
        base = curve.parameters(ranks[last])
        fits = [k for k in allowed_ranks(curve, rank_multiple) if curve.parameters(k) - base <= spare]
        ranks[last] = min(fits, key=lambda k: (curve.second_order[k], -k))
    return ranks


def select_uniform(curves: Curves, keep_ratio: float, rank_multiple: int = 1) -> Ranks:
    """Give each layer the largest rank that keeps at most a share of its own parameters; the usual baseline.

    Args:
        curves: a loss curve for each layer.
        keep_ratio: parameters kept divided by original parameters, in (0, 1].
        rank_multiple: multiple that ranks are restricted to.

    Returns:
        The ranks.

    Raises:
        ConfigurationError: if a layer is larger than its share even at the lowest rank.
    """
    ranks: Ranks = {}
    for name, curve in curves.items():
        budget = keep_ratio * curve.dense_parameters
        fits = [k for k in allowed_ranks(curve, rank_multiple) if curve.parameters(k) <= budget]
        if not fits and budget < curve.dense_parameters:
            raise ConfigurationError(
                f"keep_ratio={keep_ratio} cannot be reached in {name!r} ({curve.out_features} x {curve.in_features}) "
                f"with rank_multiple={rank_multiple}; use objective='budget', or add the layer to `ignore`."
            )
        ranks[name] = max(fits, default=None) if keep_ratio < 1 else None
    return ranks


def select_lossless(curves: Curves, z: float, rank_multiple: int = 1) -> Ranks:
    """Choose for each layer the compressing rank with the lowest upper confidence bound of the predicted loss.

    A layer whose bound is above 0 at every rank stays dense, unless all do: then the cheapest step of the path is
    taken, since the result has to be smaller than the dense model.

    Args:
        curves: a loss curve for each layer.
        z: quantile of the bound `first + second + z * standard_error`.
        rank_multiple: multiple that ranks are restricted to.

    Returns:
        The ranks.
    """
    ranks: Ranks = {}
    for name, curve in curves.items():
        bounds = curve.upper_bound(z)
        best = min(allowed_ranks(curve, rank_multiple), key=lambda k: (bounds[k], k), default=None)
        ranks[name] = best if best is not None and bounds[best] < 0 else None
    if all(rank is None for rank in ranks.values()):
        ranks = compression_path(curves, lambda curve: curve.upper_bound(z), rank_multiple).ranks_after(1)
    return ranks


def select_compact(curves: Curves, z: float, loss_margin: float, rank_multiple: int = 1) -> Ranks:
    """Choose the smallest model of the path whose predicted loss increase stays within a margin.

    The bound of the sum is `Σ (first + second) + z * sqrt(Σ standard_error²)`: layers err independently.

    Args:
        curves: a loss curve for each layer.
        z: quantile of the bound.
        loss_margin: largest acceptable loss increase in nats.
        rank_multiple: multiple that ranks are restricted to.

    Returns:
        The ranks; all None if no step fits.
    """
    path = compression_path(curves, second_order_cost, rank_multiple)
    ranks: Ranks = dict.fromkeys(path.layers)
    means, variances = dict.fromkeys(ranks, 0.0), dict.fromkeys(ranks, 0.0)
    accepted = 0
    for count, step in enumerate(path.steps, start=1):
        curve = curves[step.layer]
        means[step.layer] = float(curve.first_order[step.rank] + curve.second_order[step.rank])
        variances[step.layer] = float(curve.standard_error[step.rank] ** 2)
        if sum(means.values()) + z * sum(variances.values()) ** 0.5 <= loss_margin:
            accepted = count
    return path.ranks_after(accepted)


def select_paper(curves: Curves, epsilon: Mapping[str, float], compact: bool) -> Ranks:
    """Apply Algorithm 1 (lossless) or 2 (compact) of arXiv 2412.06867 to each layer.

    Candidates are ranks `0 < k < NM / (N + M)` whose noise stays in the neighbourhood, `max |Ŵ_k − W| ≤ ε`, and whose
    first-order change `⟨G, Ŵ_k − W⟩` is negative. Algorithm 1 takes the candidate with the lowest predicted loss,
    Algorithm 2 the smallest rank; a layer without candidates stays dense.

    Args:
        curves: a loss curve for each layer, with `max_noise`.
        epsilon: elementwise noise bound of each layer.
        compact: whether to apply Algorithm 2.

    Returns:
        The ranks.

    Raises:
        ConfigurationError: if a curve has no `max_noise`.
    """
    ranks: Ranks = {}
    for name, curve in curves.items():
        if curve.max_noise is None:
            raise ConfigurationError(f"the curve of {name!r} has no max_noise, which the paper's rules need.")
        limit = break_even_rank(curve.out_features, curve.in_features, "two-factor")
        fits = [k for k in range(1, limit + 1) if curve.max_noise[k] <= epsilon[name] and curve.first_order[k] < 0]
        ranks[name] = min(fits, key=lambda k: k if compact else curve.first_order[k], default=None)
    return ranks
