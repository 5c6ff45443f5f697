"""The objectives by name: how each chooses the ranks, and what it needs for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from .paper import select_paper
from .search import Measure, T, lowest_loss, most_compressed
from .select import select_budget, select_given, select_uniform
from .sizes import Budget, Choices, Curves

LOSSLESS_SHARES = (0.95, 0.9, 0.8, 0.7, 0.6)  # kept shares that the objective `lossless` measures


class Limits(NamedTuple):
    """What bounds a choice of ranks.

    Attributes:
        keep_ratio: size kept divided by dense size, in (0, 1].
        rank_multiple: multiple that ranks are restricted to.
        budget: what the size counts.
        epsilon: elementwise noise bound of each layer, for the objectives that need it.
        ranks: ranks of layers that are given.
    """

    keep_ratio: float
    rank_multiple: int
    budget: Budget
    epsilon: Mapping[str, float]
    ranks: Mapping[str, int] = MappingProxyType({})


Found = tuple[int, T] | None
Search = Callable[[Sequence[float], Sequence[float], Measure[T], Callable[[T], bool], float], Found[T]]


class Objective(NamedTuple):
    """How an objective chooses: by arithmetic (`select`), or by measuring points of the path (`search`).

    Attributes:
        select: from curves and limits to choices; None where it measures.
        search: from the predicted costs and the kept shares of the path's points, what makes and measures a point,
            whether a measured point passes, and the loss margin, to a point and its trial; None where it does not.
        default_metric: metric of the factorization that it takes by default.
        sized: whether it takes a `keep_ratio`.
        needs_noise: whether it needs the elementwise noise of every rank and a bound `epsilon` for it.
    """

    select: Callable[[Curves, Limits], Choices] | None = None
    search: Search | None = None
    default_metric: str = "kronecker"
    sized: bool = False
    needs_noise: bool = False


def _budget(curves: Curves, limits: Limits) -> Choices:
    return select_budget(curves, limits.keep_ratio, limits.rank_multiple, *limits.budget)


def _uniform(curves: Curves, limits: Limits) -> Choices:
    return select_uniform(curves, limits.keep_ratio, limits.rank_multiple, *limits.budget)


def _given(curves: Curves, limits: Limits) -> Choices:
    return select_given(curves, limits.ranks)


def _paper_lossless(curves: Curves, limits: Limits) -> Choices:
    return select_paper(curves, limits.epsilon, compact=False)


def _paper_compact(curves: Curves, limits: Limits) -> Choices:
    return select_paper(curves, limits.epsilon, compact=True)


def _lossless(
    costs: Sequence[float], kept: Sequence[float], measure: Measure[T], accept: Callable[[T], bool], margin: float
) -> Found[T]:
    return lowest_loss(kept, measure, LOSSLESS_SHARES)


OBJECTIVES: dict[str, Objective] = {
    "budget": Objective(_budget, sized=True),
    "uniform": Objective(_uniform, sized=True),
    "ranks": Objective(_given),
    "lossless": Objective(search=_lossless),
    "compact": Objective(search=most_compressed),
    "paper-lossless": Objective(_paper_lossless, default_metric="identity", needs_noise=True),
    "paper-compact": Objective(_paper_compact, default_metric="identity", needs_noise=True),
}
"""Name of an objective to how it chooses."""
