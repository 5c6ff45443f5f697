"""Forms that two layers take together: which pairs take which, at a size.

A pair is a layer whose curve has `paired` forms, and the one that has the same. For a multiplier `λ`, each layer
minimizes `cost + λ · size` alone in each form, and each pair takes the form with the least sum. The multiplier is the
smallest one at which all of it fits into the budget. What pairs take just below it may be better still, for ranks can
make up for what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from ..factors import LossCurve
from ..layers import CHANNEL
from .path import points_of, second_order_cost
from .sizes import LayerSize, Sizes

STEPS = 80  # of a bisection of the logarithm of the multiplier
LARGEST, SMALLEST = 1e6, 1e-30  # nats for each unit of size


Forms = dict[str, str]
"""Name of a layer to its form, for layers that take one together with another; both have the same one."""


def forms_of_pairs(curves: Mapping[str, LossCurve], budget: float, rank_multiple: int, sizes: Sizes) -> list[Forms]:
    """Return forms of the pairs that may have the least predicted cost within a budget.

    Args:
        curves: a loss curve for each layer.
        budget: size that all layers may have together.
        rank_multiple: multiple that ranks are restricted to.
        sizes: what the budget counts.

    Returns:
        Forms to compare: none at all, and those on both sides of the multiplier.
    """
    units = [_Unit(names, curves, rank_multiple, sizes) for names in _units(curves)]
    if all(len(unit.names) == 1 for unit in units):
        return [{}]
    low, high = np.log(SMALLEST), np.log(LARGEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = sum(unit.size_at(np.exp(middle)) for unit in units) <= budget
        low, high = (low, middle) if fits else (middle, high)
    found: list[Forms] = [{}]
    for multiplier in np.exp([low, high]):
        forms = {unit.names: unit.form_at(multiplier) for unit in units}
        found.append({name: form for names, form in forms.items() for name in names if form != CHANNEL})
    return [forms for n, forms in enumerate(found) if forms not in found[:n]]


def in_forms(
    curves: Mapping[str, LossCurve], sizes: Sizes, forms: Mapping[str, str]
) -> tuple[dict[str, LossCurve], dict[str, LayerSize]]:
    """Return curves and sizes of layers that take no other form than a given one, where there is one."""
    settled = {name: curve.in_form(forms[name]) if name in forms else curve for name, curve in curves.items()}
    own = dict(sizes)
    for name, form in forms.items():
        size = sizes[name].in_form(form)
        own[name] = replace(size, others={form: size})
    return settled, own


def _units(curves: Mapping[str, LossCurve]) -> Iterable[tuple[str, ...]]:
    """Return the layers, those of a pair together."""
    return dict.fromkeys((name,) if not curve.pair else curve.pair for name, curve in curves.items())


class _Unit:
    """What a layer, or a pair of layers, may become: the arrays of sizes and costs by form."""

    def __init__(
        self, names: tuple[str, ...], curves: Mapping[str, LossCurve], rank_multiple: int, sizes: Sizes
    ) -> None:
        self.names = names
        forms = [CHANNEL, *curves[names[0]].paired] if len(names) > 1 else [CHANNEL]
        self.forms: dict[str, list[np.ndarray]] = {}
        for form in forms:
            chosen = {} if form == CHANNEL else dict.fromkeys(names, form)
            settled, own = in_forms({n: curves[n] for n in names}, {n: sizes[n] for n in names}, chosen)
            points = [points_of(settled[n], second_order_cost, rank_multiple, own[n]) for n in names]
            self.forms[form] = [np.array([(p.size, p.cost) for p in each]).T for each in points]

    def size_at(self, multiplier: float) -> float:
        """Return the size of what the layers become."""
        parts = self.forms[self.form_at(multiplier)]
        return sum(float(sizes[np.argmin(costs + multiplier * sizes)]) for sizes, costs in parts)

    def form_at(self, multiplier: float) -> str:
        """Return the form with the least cost and size."""
        totals = {
            form: sum(float((costs + multiplier * sizes).min()) for sizes, costs in parts)
            for form, parts in self.forms.items()
        }
        return min(totals, key=totals.__getitem__)
