"""What each layer becomes: pure functions of the loss curves, deterministic.

`choices` maps a layer to its rank, or to None where it stays dense, and its number format. `sizes`, `fixed` and
`whole` say what a ratio is a ratio of; see `path`, which also holds the allocation over the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import ConfigurationError
from ..factors import LossCurve
from .pairs import forms_of_pairs, in_forms
from .path import CompressionPath, Point, compression_path, points_of, second_order_cost, whole_size
from .sizes import Budget, Choice, Choices, Curves, LayerSize, Sizes, sizes_of

ROUNDING = 1e-9  # of a size, in which sums of seconds may differ from what they are a share of


def kept_parameters(curves: Curves, choices: Mapping[str, Choice]) -> int:
    """Return the parameters of all layers' weights at the ranks of the given choices."""
    return sum(
        curve.in_form(choices[name].form).parameters(choices[name].rank, choices[name].format)
        for name, curve in curves.items()
    )


def kept_share(curves: Curves, choices: Mapping[str, Choice]) -> float:
    """Return the parameters of all layers' weights at the given choices, divided by the original ones."""
    return kept_parameters(curves, choices) / sum(curve.dense_parameters for curve in curves.values())


def share_of_budget(curves: Curves, choices: Mapping[str, Choice], budget: Budget) -> float:
    """Return what the given choices for all layers keep, as a ratio that is asked for counts it."""
    kept = budget.fixed + sum(budget.sizes[name].of(choices[name]) for name in curves)
    return kept / whole_size(curves, *budget)


def select_budget(
    curves: Curves,
    keep_ratio: float,
    rank_multiple: int = 1,
    sizes: Sizes | None = None,
    fixed: float = 0.0,
    whole: float | None = None,
) -> Choices:
    """Choose the ranks and formats with the lowest predicted loss that keep at most a share of the size.

    Pairs of layers take their forms first. Walks the path until the budget is met. What is left of the budget then
    goes to the layers that gain most by it, first to the one that took the last step.

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
    whole = whole_size(curves, sizes, fixed, whole)
    budget = (keep_ratio + ROUNDING) * whole - fixed
    paths = []
    for forms in forms_of_pairs(curves, budget, rank_multiple, sizes):
        settled = in_forms(curves, sizes, forms)
        paths.append(compression_path(settled[0], second_order_cost, rank_multiple, settled[1], fixed, whole))
    fitting = [_within(path, budget) for path in paths if path.targeted[-1] <= budget]
    if not fitting:
        least = min(path.kept_after(len(path)) for path in paths)
        smallest = math.ceil(least * 1e4) / 1e4  # rounded up: the ratio named can be reached
        outside = fixed / whole
        multiple = max(curve.multiple(rank_multiple) for curve in curves.values())
        part = (
            f"whole model's {kind} ({outside:.4f} lies outside the targeted layers)" if fixed else f"targeted {kind}"
        )
        raise ConfigurationError(
            f"keep_ratio={keep_ratio} cannot be reached: with rank_multiple={multiple} the smallest model keeps "
            f"{smallest:.4f} of the {part}."
        )
    return min(fitting, key=lambda each: each[0])[1]


def _within(path: CompressionPath, budget: float) -> tuple[float, Choices]:
    """Return the predicted cost, and the choices, of the model with the lowest one that a path has in a budget."""
    count = int(np.argmax(path.targeted <= budget))
    spend = _Spender(path.points, path.choices_after(count))
    if count:
        spare = spend.on(path.steps[count - 1].layer, budget - path.targeted[count])
        while (layer := spend.best(spare)) is not None:
            spare = spend.on(layer, spare)
    return sum(point.cost for point in spend.now.values()), spend.choices


class _Spender:
    """Gives layers choices that cost less, within what is left of a budget."""

    def __init__(self, points: Mapping[str, Sequence[Point]], choices: Choices) -> None:
        self.points, self.choices = points, choices
        self.now = {name: next(p for p in points[name] if p.choice == choice) for name, choice in choices.items()}
        self.arrays = {name: np.array([(p.size, p.cost) for p in each]).T for name, each in points.items()}

    def on(self, layer: str, spare: float) -> float:
        """Take the cheapest choice of a layer that fits, and return what is left."""
        now = self.now[layer]
        chosen = min((p for p in self.points[layer] if p.size - now.size <= spare), key=_cheapest)
        self.now[layer], self.choices[layer] = chosen, chosen.choice
        return spare - (chosen.size - now.size)

    def best(self, spare: float) -> str | None:
        """Return the layer whose cost falls most within what is left; None if none does."""
        gains = {name: self._gain(name, spare) for name in self.points}
        name = max(gains, key=gains.__getitem__)
        return name if gains[name] > 0 else None

    def _gain(self, name: str, spare: float) -> float:
        now, (sizes, costs) = self.now[name], self.arrays[name]
        return float(now.cost - costs[sizes - now.size <= spare].min(initial=now.cost))


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
                f"with rank_multiple={curve.multiple(rank_multiple)}; add the layer to `ignore`, or use "
                "objective='budget'."
            )
        choices[name] = point.choice
    return choices


def select_given(curves: Curves, ranks: Mapping[str, int]) -> Choices:
    """Give layers the ranks that are asked for; others stay dense. All are stored in the finest of their formats.

    Args:
        curves: a loss curve for each layer.
        ranks: ranks by layer.

    Returns:
        The choices.

    Raises:
        ConfigurationError: if a rank stores as much as the dense layer.
    """
    choices: Choices = {}
    for name, curve in curves.items():
        finest, rank = next(iter(curve.rounding)), ranks.get(name)
        most = curve.break_even_rank_in(finest)
        if rank is not None and rank > most:
            raise ConfigurationError(
                f"ranks: {name!r} ({curve.out_features} x {curve.in_features}) is smaller than dense up to rank "
                f"{most}, got {rank}. Give it less, or leave it out, and it stays dense."
            )
        choices[name] = Choice(rank, finest)
    return choices


def _largest(curve: LossCurve, size: LayerSize, multiple: int, share: float) -> Point | None:
    """Return the largest choice within a share of a layer's size, of each format and form; of these the cheapest."""
    points = points_of(curve, second_order_cost, multiple, size)
    largest: dict[tuple[str, str], Point] = {}
    for point in points:  # by falling rank
        dense = point.choice == Choice()
        if share >= 1 - ROUNDING if dense else point.size <= share * size.dense:
            largest.setdefault((point.choice.format, point.choice.form), point)
    return min(largest.values(), key=_cheapest, default=None)
