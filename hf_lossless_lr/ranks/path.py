"""The path from the dense model to the smallest one: which layer to compress next, and how far.

`sizes` maps a layer to what the budget counts of it: its parameters by default, or its FLOPs or its latency (see
`sizes`). `fixed` is the size of everything outside the targeted layers, for ratios of the whole model.

The allocation minimizes `Σ cost_l(k_l) + λ Σ size_l(k_l)`: for a fixed multiplier `λ` each layer answers alone, with a
vertex of the lower convex hull of its points `(size, cost)`. As `λ` grows, layers step along their hulls, one edge at
a time in the order of the edges' slopes. `CompressionPath` is that list of steps: it leads from the dense model to the
smallest one, and each prefix of it is a model nested in the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from ..factors import LossCurve
from .sizes import Curves, LayerSize, Sizes, parameter_size, sizes_of

Ranks = dict[str, int | None]
Point = tuple[float, float, int | None]  # size, cost, rank


def second_order_cost(curve: LossCurve) -> np.ndarray:
    """Return the second-order term in nats: the cost that `budget` minimizes.  # shape: (m + 1,)."""
    return curve.second_order


@dataclass(frozen=True)
class Step:
    """One step along the path: a layer goes to a lower rank.

    Attributes:
        layer: name of the layer.
        rank: its new rank.
        saved: size saved by the step, above 0.
        cost: predicted cost added by the step, in nats.
    """

    layer: str
    rank: int
    saved: float
    cost: float


@dataclass(frozen=True)
class CompressionPath:
    """Models from dense to smallest, one step a layer, cheapest steps first.

    Attributes:
        layers: names of all layers.
        steps: the steps in order.
        dense: size of all layers while they are dense.
        fixed: size of everything outside them.
    """

    layers: tuple[str, ...]
    steps: tuple[Step, ...]
    dense: float
    fixed: float = 0.0

    def __len__(self) -> int:
        """Return the number of steps; there is one model more."""
        return len(self.steps)

    @cached_property
    def targeted(self) -> np.ndarray:
        """Size of the layers after each number of steps, strictly decreasing.  # shape: (steps + 1,)."""
        return self.dense - np.cumsum([0.0, *(step.saved for step in self.steps)])

    @cached_property
    def _costs(self) -> np.ndarray:
        return np.cumsum([0.0, *(step.cost for step in self.steps)])

    def kept_after(self, count: int) -> float:
        """Return the size after the first `count` steps, divided by the dense size; `fixed` counts in both."""
        return float((self.fixed + self.targeted[count]) / (self.fixed + self.dense))

    def predicted_cost_after(self, count: int) -> float:
        """Return the predicted cost of the model after the first `count` steps, in nats."""
        return float(self._costs[count])

    def ranks_after(self, count: int) -> Ranks:
        """Return the ranks after the first `count` steps."""
        ranks: Ranks = dict.fromkeys(self.layers)
        for step in self.steps[:count]:
            ranks[step.layer] = step.rank
        return ranks


def allowed_ranks(curve: LossCurve, multiple: int, size: LayerSize | None = None) -> list[int]:
    """Return the ranks worth having: multiples of `multiple` that compress, and no higher one has a smaller size.

    (With `auto` storage a slightly higher rank can take less, where the storage changes; a measured latency is flat in
    places.) A rank must store less than the dense weight in any case, and be smaller than dense in the given size.

    Args:
        curve: the loss curve.
        multiple: what ranks are a multiple of.
        size: what the budget counts; default the parameters.

    Returns:
        The ranks, ascending; their sizes ascend strictly as well.
    """
    size = parameter_size(curve) if size is None else size
    ranks: list[int] = []
    for rank in reversed(range(multiple, curve.break_even_rank + 1, multiple)):
        if size.at(rank) < size.at(ranks[-1] if ranks else None):
            ranks.append(rank)
    return ranks[::-1]


def _hull(points: list[Point]) -> list[Point]:
    """Return the lower convex hull of the points, from the dense one (the largest) downwards."""
    hull: list[Point] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    """Return the cost of each unit of size saved between two points."""
    return (b[1] - a[1]) / (a[0] - b[0])


def compression_path(
    curves: Curves,
    cost: Callable[[LossCurve], np.ndarray],
    rank_multiple: int = 1,
    sizes: Sizes | None = None,
    fixed: float = 0.0,
) -> CompressionPath:
    """Build the path of models from dense to the smallest.

    Args:
        curves: a loss curve for each layer.
        cost: predicted cost of a layer for every rank, in nats; the dense layer costs 0.
        rank_multiple: multiple that ranks are restricted to.
        sizes: what the budget counts; default the parameters.
        fixed: size of everything outside the layers.

    Returns:
        The path; ties are broken by the order of the layers.

    Raises:
        ConfigurationError: if a layer has no size.
    """
    sizes = sizes_of(curves, sizes)
    steps: list[tuple[float, int, int, Step]] = []
    for order, (name, curve) in enumerate(curves.items()):
        costs, size = cost(curve), sizes[name]
        ranks = allowed_ranks(curve, rank_multiple, size)[::-1]
        hull = _hull([(size.dense, 0.0, None), *((size.at(rank), float(costs[rank]), rank) for rank in ranks)])
        slope = -math.inf
        for position, (a, b) in enumerate(pairwise(hull)):
            if b[2] is not None:  # always, behind the dense point; the type checker cannot know
                slope = max(slope, _slope(a, b))  # rounding must not reorder the steps of one layer
                steps.append((slope, order, position, Step(name, b[2], a[0] - b[0], b[1] - a[1])))
    steps.sort(key=lambda entry: entry[:3])
    dense = sum(sizes[name].dense for name in curves)
    return CompressionPath(tuple(curves), tuple(entry[3] for entry in steps), dense, fixed)
