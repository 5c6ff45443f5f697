"""Which rank each layer gets: pure functions of the loss curves, deterministic.

`ranks` maps a layer to its rank, or to None where it stays dense. `sizes` and `fixed` say what a ratio is a ratio of;
see `allocation`, which also holds the allocation over the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import ConfigurationError
from .path import Curves, Ranks, allowed_ranks, compression_path, second_order_cost
from .sizes import Sizes, sizes_of


def kept_parameters(curves: Curves, ranks: Mapping[str, int | None]) -> int:
    """Return the parameters of all layers' weights at the given ranks."""
    return sum(curve.parameters(ranks[name]) for name, curve in curves.items())


def kept_share(curves: Curves, ranks: Mapping[str, int | None]) -> float:
    """Return the parameters of all layers' weights at the given ranks, divided by the original ones."""
    return kept_parameters(curves, ranks) / sum(curve.dense_parameters for curve in curves.values())


def _targeted_ratio(keep_ratio: float, dense: float, fixed: float) -> float:
    """Return what the layers may keep of their own size, so that with the fixed part `keep_ratio` is kept."""
    return keep_ratio - (1 - keep_ratio) * fixed / dense if fixed else keep_ratio


def select_budget(
    curves: Curves, keep_ratio: float, rank_multiple: int = 1, sizes: Sizes | None = None, fixed: float = 0.0
) -> Ranks:
    """Choose the ranks with the lowest predicted loss that keep at most a share of the size.

    Walks the path until the budget is met; the last layer then takes the cheapest rank that still fits: the largest
    one, where its cost falls with the rank.

    Args:
        curves: a loss curve for each layer.
        keep_ratio: size kept divided by dense size, in (0, 1].
        rank_multiple: multiple that ranks are restricted to.
        sizes: what the budget counts; default the parameters.
        fixed: size of everything outside the layers: the ratio is that of `fixed + Σ size`.

    Returns:
        The ranks.

    Raises:
        ConfigurationError: if even the smallest model is larger than the budget, or a layer has no size.
    """
    kind = "parameters" if sizes is None else "size"
    sizes = sizes_of(curves, sizes)
    path = compression_path(curves, second_order_cost, rank_multiple, sizes, fixed)
    budget = _targeted_ratio(keep_ratio, path.dense, fixed) * path.dense
    if path.targeted[-1] > budget:
        smallest = math.ceil(path.kept_after(len(path)) * 1e4) / 1e4  # rounded up: the ratio named can be reached
        outside = fixed / (fixed + path.dense)
        part = (
            f"whole model's {kind} ({outside:.4f} lies outside the targeted layers)" if fixed else f"targeted {kind}"
        )
        raise ConfigurationError(
            f"keep_ratio={keep_ratio} cannot be reached: with rank_multiple={rank_multiple} the smallest model keeps "
            f"{smallest:.4f} of the {part}."
        )
    count = int(np.argmax(path.targeted <= budget))
    ranks = path.ranks_after(count)
    if count:
        last = path.steps[count - 1].layer
        curve, size, spare = curves[last], sizes[last], budget - path.targeted[count]
        base = size.at(ranks[last])
        fits = [k for k in allowed_ranks(curve, rank_multiple, size) if size.at(k) - base <= spare]
        ranks[last] = min(fits, key=lambda k: (curve.second_order[k], -k))
    return ranks


def select_uniform(
    curves: Curves, keep_ratio: float, rank_multiple: int = 1, sizes: Sizes | None = None, fixed: float = 0.0
) -> Ranks:
    """Give each layer the largest rank that keeps at most a share of its own size; the usual baseline.

    Args:
        curves: a loss curve for each layer.
        keep_ratio: size kept divided by dense size, in (0, 1].
        rank_multiple: multiple that ranks are restricted to.
        sizes: what the budget counts; default the parameters.
        fixed: size of everything outside the layers: the ratio is that of `fixed + Σ size`, and the share smaller.

    Returns:
        The ranks.

    Raises:
        ConfigurationError: if a layer is larger than its share even at the lowest rank, or has no size.
    """
    sizes = sizes_of(curves, sizes)
    share = _targeted_ratio(keep_ratio, sum(sizes[name].dense for name in curves), fixed)
    ranks: Ranks = {}
    for name, curve in curves.items():
        size = sizes[name]
        fits = [k for k in allowed_ranks(curve, rank_multiple, size) if size.at(k) <= share * size.dense]
        if not fits and share < 1:
            raise ConfigurationError(
                f"keep_ratio={keep_ratio} cannot be reached in {name!r} ({curve.out_features} x {curve.in_features}) "
                f"with rank_multiple={rank_multiple}; use objective='budget', or add the layer to `ignore`."
            )
        ranks[name] = max(fits, default=None) if share < 1 else None
    return ranks
