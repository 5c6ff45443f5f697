"""The path from the dense model to the smallest one: which layer to compress next, and how far.

`sizes` maps a layer to what the budget counts of it: its parameters by default, or its bytes, FLOPs or latency (see
`sizes`). `fixed` is the size of everything outside the targeted layers, for ratios of the whole model.

A choice `c_l` for a layer is a rank, or none, a number format, and a form. The allocation minimizes
`Σ cost_l(c_l) + λ Σ size_l(c_l)`: for a fixed multiplier `λ` each layer answers alone, with a vertex of the lower
convex hull of its points `(size, cost)`. As `λ` grows, layers step along their hulls, one edge at
a time in the order of the edges' slopes. `CompressionPath` is that list of steps: it leads from the dense model to the
smallest one, and each prefix of it is a model nested in the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..factors import LossCurve
from ..formats import FLOAT
from .sizes import Choice, Choices, Curves, LayerSize, Sizes, parameter_size, sizes_of

ROUNDING_SHARE = 1 / 3  # truncation costs about three times its prediction, rounding about as much: docs/method.md


class Point(NamedTuple):
    """What a layer may become: with which size and, in nats, at which predicted cost."""

    size: float
    cost: float
    choice: Choice


def second_order_cost(curve: LossCurve) -> np.ndarray:
    """Return the second-order term in nats: the cost that `budget` minimizes.  # shape: (m + 1,)."""
    return curve.second_order


@dataclass(frozen=True)
class Step:
    """One step along the path: a layer goes to a lower rank, or to a coarser format.

    Attributes:
        layer: name of the layer.
        choice: its new rank and format.
        saved: size saved by the step, above 0.
        cost: predicted cost added by the step, in nats.
    """

    layer: str
    choice: Choice
    saved: float
    cost: float


@dataclass(frozen=True)
class CompressionPath:
    """Models from dense to smallest, one step a layer, cheapest steps first.

    Attributes:
        start: the choices for all layers that predict no loss, or the least: dense, in the finest format.
        steps: the steps in order.
        largest: size of all layers at the start.
        whole: size that ratios are of.
        fixed: size of everything outside the layers.
        cost: predicted cost at the start, in nats.
        points: what each layer may become.
    """

    start: Choices
    steps: tuple[Step, ...]
    largest: float
    whole: float
    fixed: float = 0.0
    cost: float = 0.0
    points: Mapping[str, Sequence[Point]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of steps; there is one model more."""
        return len(self.steps)

    @cached_property
    def targeted(self) -> np.ndarray:
        """Size of the layers after each number of steps, strictly decreasing.  # shape: (steps + 1,)."""
        return self.largest - np.cumsum([0.0, *(step.saved for step in self.steps)])

    @cached_property
    def _costs(self) -> np.ndarray:
        return np.cumsum([self.cost, *(step.cost for step in self.steps)])

    def kept_after(self, count: int) -> float:
        """Return the size after the first `count` steps, divided by the dense size; `fixed` counts in both."""
        return float((self.fixed + self.targeted[count]) / self.whole)

    def predicted_cost_after(self, count: int) -> float:
        """Return the predicted cost of the model after the first `count` steps, in nats."""
        return float(self._costs[count])

    def choices_after(self, count: int) -> Choices:
        """Return the choices after the first `count` steps."""
        return self.start | {step.layer: step.choice for step in self.steps[:count]}


def allowed_ranks(
    curve: LossCurve, multiple: int, size: LayerSize | None = None, number_format: str = FLOAT
) -> list[int]:
    """Return the ranks worth having: multiples of `multiple` that compress, and no higher one has a smaller size.

    (With `auto` storage a slightly higher rank can take less, where the storage changes; a measured latency is flat in
    places.) A rank must store less than the dense weight in any case, and be smaller than dense in the given size.

    Args:
        curve: the loss curve.
        multiple: what ranks are a multiple of, unless the layer has a larger one.
        size: what the budget counts; default the parameters.
        number_format: the format, in which a rank must be smaller than dense.

    Returns:
        The ranks, ascending; their sizes ascend strictly as well.
    """
    size = (parameter_size(curve) if size is None else size).in_format(number_format)
    ranks: list[int] = []
    multiple = curve.multiple(multiple)
    for rank in reversed(range(multiple, curve.break_even_rank_in(number_format) + 1, multiple)):
        if size.at(rank) < size.at(ranks[-1] if ranks else None):
            ranks.append(rank)
    return ranks[::-1]


def points_of(
    curve: LossCurve, cost: Callable[[LossCurve], np.ndarray], multiple: int, size: LayerSize
) -> list[Point]:
    """Return what a layer may become: dense and every rank worth having, in each of its formats and forms.

    Args:
        curve: its loss curve.
        cost: gives the predicted cost of every rank without the rounding, in nats.  # shape: (m + 1,)
        multiple: what ranks are a multiple of.
        size: what the budget counts.

    Returns:
        The points: format by format, dense first, and then form by form, by falling rank.
    """
    points = []
    for name in curve.rounding:
        for form in (curve, *curve.others.values()):
            costs, rounding = cost(form), form.rounding[name]
            ranks = reversed(allowed_ranks(form, multiple, size.in_form(form.form), name))
            for rank in (*([None] if form is curve else []), *ranks):
                choice, total = Choice(rank, name, form.form), form.base if rank is None else float(costs[rank])
                total += 0.0 if rounding is None else ROUNDING_SHARE * rounding.at(rank)
                points.append(Point(size.of(choice), total, choice))
    return points


def _hull(points: list[Point]) -> list[Point]:
    """Return the lower convex hull of the points, from the first one (dense in the finest format) downwards."""
    hull: list[Point] = []
    below = sorted((p for p in points[1:] if p.size < points[0].size), key=lambda p: (-p.size, p.cost))
    for point in (points[0], *below):
        if hull and point.size == hull[-1].size:
            continue  # as large, and no better
        while len(hull) >= 2 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    """Return the cost of each unit of size saved between two points."""
    return (b.cost - a.cost) / (a.size - b.size)


def compression_path(
    curves: Curves,
    cost: Callable[[LossCurve], np.ndarray],
    rank_multiple: int = 1,
    sizes: Sizes | None = None,
    fixed: float = 0.0,
    whole: float | None = None,
) -> CompressionPath:
    """Build the path of models from dense to the smallest.

    Args:
        curves: a loss curve for each layer.
        cost: predicted cost of a layer for every rank, in nats; the dense layer costs 0. Rounding adds to it.
        rank_multiple: multiple that ranks are restricted to.
        sizes: what the budget counts; default the parameters.
        fixed: size of everything outside the layers.
        whole: size that ratios are of; default that of the layers while they are dense, and `fixed`.

    Returns:
        The path; ties are broken by the order of the layers.

    Raises:
        ConfigurationError: if a layer has no size.
    """
    sizes = sizes_of(curves, sizes)
    start: dict[str, Point] = {}
    steps: list[tuple[float, int, int, Step]] = []
    points = {name: points_of(curve, cost, rank_multiple, sizes[name]) for name, curve in curves.items()}
    for order, name in enumerate(curves):
        hull = _hull(points[name])
        start[name], slope = hull[0], -math.inf
        for position, (a, b) in enumerate(pairwise(hull)):
            slope = max(slope, _slope(a, b))  # rounding must not reorder the steps of one layer
            steps.append((slope, order, position, Step(name, b.choice, a.size - b.size, b.cost - a.cost)))
    steps.sort(key=lambda entry: entry[:3])
    return CompressionPath(
        start={name: point.choice for name, point in start.items()},
        steps=tuple(entry[3] for entry in steps),
        largest=sum(point.size for point in start.values()),
        whole=whole_size(curves, sizes, fixed, whole),
        fixed=fixed,
        cost=sum(point.cost for point in start.values()),
        points=points,
    )


def whole_size(curves: Curves, sizes: Sizes, fixed: float, whole: float | None) -> float:
    """Return the size that ratios are of: the given one, or else that of the dense layers and `fixed`."""
    return fixed + sum(sizes[name].dense for name in curves) if whole is None else whole
