"""What each layer becomes: pure functions of the loss curves, deterministic.

`choices` maps a layer to its rank, or to None where it stays dense, and its number format. `sizes`, `fixed` and
`whole` say what a ratio is a ratio of; see `path`, which also holds the allocation over the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import ConfigurationError
from ..factors import LossCurve
from ..formats import FLOAT
from .path import Point, compression_path, points_of, second_order_cost, whole_size
from .sizes import Choice, Choices, Curves, LayerSize, Sizes, sizes_of


def kept_parameters(curves: Curves, choices: Mapping[str, Choice]) -> int:
    """Return the parameters of all layers' weights at the ranks of the given choices."""
    return sum(curve.parameters(choices[name].rank, choices[name].format) for name, curve in curves.items())


def kept_share(curves: Curves, choices: Mapping[str, Choice]) -> float:
    """Return the parameters of all layers' weights at the given choices, divided by the original ones."""
    return kept_parameters(curves, choices) / sum(curve.dense_parameters for curve in curves.values())


def select_budget(
    curves: Curves,
    keep_ratio: float,
    rank_multiple: int = 1,
    sizes: Sizes | None = None,
    fixed: float = 0.0,
    whole: float | None = None,
) -> Choices:
    """Choose the ranks and formats with the lowest predicted loss that keep at most a share of the size.

    Walks the path until the budget is met; the last layer then takes the cheapest choice that still fits: the largest
    rank, where its cost falls with the rank.

    Args:
        curves: a loss curve for each layer.
        keep_ratio: size kept divided by dense size, in (0, 1].
        rank_multiple: multiple that ranks are restricted to.
        sizes: what the budget counts; default the parameters.
        fixed: size of everything outside the layers: the ratio is that of `fixed + Σ size`.
        whole: size that the ratio is of; default that of the dense layers, and `fixed`.

    Returns:
        The choices.

    Raises:
        ConfigurationError: if even the smallest model is larger than the budget, or a layer has no size.
    """
    kind = "parameters" if sizes is None else "size"
    sizes = sizes_of(curves, sizes)
    path = compression_path(curves, second_order_cost, rank_multiple, sizes, fixed, whole)
    budget = keep_ratio * path.whole - fixed
    if path.targeted[-1] > budget:
        smallest = math.ceil(path.kept_after(len(path)) * 1e4) / 1e4  # rounded up: the ratio named can be reached
        outside = fixed / path.whole
        multiple = max(curve.multiple(rank_multiple) for curve in curves.values())
        part = (
            f"whole model's {kind} ({outside:.4f} lies outside the targeted layers)" if fixed else f"targeted {kind}"
        )
        raise ConfigurationError(
            f"keep_ratio={keep_ratio} cannot be reached: with rank_multiple={multiple} the smallest model keeps "
            f"{smallest:.4f} of the {part}."
        )
    count = int(np.argmax(path.targeted <= budget))
    choices = path.choices_after(count)
    if count:
        last = path.steps[count - 1].layer
        points = points_of(curves[last], second_order_cost(curves[last]), rank_multiple, sizes[last])
        base, spare = sizes[last].of(choices[last]), budget - path.targeted[count]
        choices[last] = min((p for p in points if p.size - base <= spare), key=_cheapest).choice
    return choices


def _cheapest(point: Point) -> tuple[float, float]:
    return point.cost, -point.size


def select_uniform(
    curves: Curves,
    keep_ratio: float,
    rank_multiple: int = 1,
    sizes: Sizes | None = None,
    fixed: float = 0.0,
    whole: float | None = None,
) -> Choices:
    """Give each layer the largest rank that keeps at most a share of its own size; the usual baseline.

    With several number formats it takes the one whose largest rank has the lowest predicted loss.

    Args:
        curves: a loss curve for each layer.
        keep_ratio: size kept divided by dense size, in (0, 1].
        rank_multiple: multiple that ranks are restricted to.
        sizes: what the budget counts; default the parameters.
        fixed: size of everything outside the layers: the ratio is that of `fixed + Σ size`, and the share smaller.
        whole: size that the ratio is of; default that of the dense layers, and `fixed`.

    Returns:
        The choices.

    Raises:
        ConfigurationError: if a layer is larger than its share even at the lowest rank, or has no size.
    """
    sizes = sizes_of(curves, sizes)
    total = sum(sizes[name].dense for name in curves)
    share = keep_ratio
    if fixed or whole is not None:
        share = (keep_ratio * whole_size(curves, sizes, fixed, whole) - fixed) / total
    choices: Choices = {}
    for name, curve in curves.items():
        point = _largest(curve, sizes[name], rank_multiple, share)
        if point is None:
            raise ConfigurationError(
                f"keep_ratio={keep_ratio} cannot be reached in {name!r} ({curve.out_features} x {curve.in_features}) "
                f"with rank_multiple={curve.multiple(rank_multiple)}; use objective='budget', or add the layer to "
                "`ignore`."
            )
        choices[name] = point.choice
    return choices


def _largest(curve: LossCurve, size: LayerSize, multiple: int, share: float) -> Point | None:
    """Return the largest choice within a share of a layer's size: of each format, and of these the cheapest."""
    points = points_of(curve, second_order_cost(curve), multiple, size)
    largest: dict[str, Point] = {}
    for point in points:  # by falling rank
        dense = point.choice == (None, FLOAT)
        if share >= 1 if dense else point.size <= share * size.dense:
            largest.setdefault(point.choice.format, point)
    return min(largest.values(), key=_cheapest, default=None)
