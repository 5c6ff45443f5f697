"""Ranks and number formats on one path, against brute force over every combination."""

import itertools

import numpy as np
import pytest
from support.tolerances import ROUNDING

from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.factors.curves import LossCurve, RoundingCost
from hf_lossless_lr.formats import FORMATS
from hf_lossless_lr.layers.storage import choose_storage, storage_in, weight_bytes
from hf_lossless_lr.ranks.path import ROUNDING_SHARE, compression_path, second_order_cost
from hf_lossless_lr.ranks.select import select_budget, select_uniform
from hf_lossless_lr.ranks.sizes import Choice, byte_size

pytestmark = pytest.mark.numerical

ITEMSIZE = 4
on_seeds = pytest.mark.parametrize("seed", range(4))
on_formats = pytest.mark.parametrize(
    "formats", [["float"], ["int8"], ["float", "int8"], ["int8", "int4", "int3"], ["float", *FORMATS]], ids=str
)


def make_curves(seed, formats, layers=3):
    rng = np.random.default_rng(seed)
    curves = {}
    for index in range(layers):
        out, in_ = (int(size) for size in rng.integers(6, 14, size=2))
        m = min(out, in_)
        second = np.append(np.sort(rng.exponential(size=m))[::-1].cumsum()[::-1], 0.0) * 10 ** rng.uniform(-1, 1)
        scale, rounding = second[0] * 10 ** rng.uniform(-2, 0), {}
        for name in formats:
            step = 0.0 if name == "float" else 4.0 ** -FORMATS[name].bits * 64
            by_rank = np.append(0.0, rng.uniform(0.5, 1.5, size=m).cumsum() / m)
            rounding[name] = None if name == "float" else RoundingCost(scale * step * by_rank, scale * step)
        curves[f"layer{index}"] = LossCurve(out, in_, "auto", 0 * second, second, rounding=rounding)
    return curves


def bytes_of(curve, choice):
    shape = curve.out_features, curve.in_features
    if choice.rank is None:
        kind = FORMATS.get(choice.format)
        return shape[0] * shape[1] * ITEMSIZE if kind is None else kind.stored_bytes(*shape)
    storage = choose_storage(*shape, choice.rank, storage_in(choice.format, curve.storage))
    pivots = choice.rank if storage == "pivoted" else 0
    parts = (choice.rank, shape[1]), (shape[0] - pivots, choice.rank)
    kind = FORMATS.get(choice.format)
    stored = [r * c * ITEMSIZE if kind is None else kind.stored_bytes(r, c) for r, c in parts]
    return sum(stored) + (4 * shape[0] if pivots else 0)


def candidates(curve):
    """Every choice, with its bytes and what the path takes for its cost."""
    found = []
    for name, rounding in curve.rounding.items():
        for rank in (None, *range(1, curve.break_even_rank_in(name) + 1)):
            choice = Choice(rank, name)
            cost = 0.0 if rank is None else float(curve.second_order[rank])
            cost += 0.0 if rounding is None else ROUNDING_SHARE * rounding.at(rank)
            found.append((choice, bytes_of(curve, choice), cost))
    return found


def sizes_of(curves):
    return {name: byte_size(curve, ITEMSIZE) for name, curve in curves.items()}


@on_formats
@on_seeds
def test_sizes_are_those_of_the_stored_tensors(seed, formats):
    for curve in make_curves(seed, formats).values():
        size = byte_size(curve, ITEMSIZE)
        for choice, stored, _ in candidates(curve):
            assert size.of(choice) == stored, choice


@on_formats
@on_seeds
def test_each_point_of_the_path_is_the_best_answer_to_its_multiplier(seed, formats):
    curves = make_curves(seed, formats)
    path = compression_path(curves, second_order_cost, 1, sizes_of(curves))
    slopes = [step.cost / step.saved for step in path.steps]
    largest = {name: max(candidates(curve)[:1], key=lambda c: c[1]) for name, curve in curves.items()}
    for multiplier in np.logspace(-6, 1, 40):
        choices = path.choices_after(sum(slope < multiplier for slope in slopes))
        for name, curve in curves.items():
            smaller = [c for c in candidates(curve) if c[1] < largest[name][1]]
            values = {c[0]: c[2] + multiplier * c[1] for c in (largest[name], *smaller)}
            assert values[choices[name]] <= min(values.values()) * (1 + ROUNDING) + 1e-12


@on_formats
@on_seeds
def test_a_budget_is_kept_and_close_to_the_exhaustive_optimum(seed, formats):
    curves = make_curves(seed, formats, layers=2)
    sizes = sizes_of(curves)
    dense = sum(size.dense for size in sizes.values())
    every = list(itertools.product(*(candidates(curve) for curve in curves.values())))
    for ratio in (0.12, 0.2, 0.4, 0.7):
        best = min(
            (sum(c[2] for c in found) for found in every if sum(c[1] for c in found) <= ratio * dense), default=None
        )
        if best is None:
            with pytest.raises(ConfigurationError, match="cannot be reached"):
                select_budget(curves, ratio, 1, sizes)
            continue
        choices = select_budget(curves, ratio, 1, sizes)
        assert sum(sizes[name].of(choice) for name, choice in choices.items()) <= ratio * dense
        costs = {name: {c[0]: c[2] for c in candidates(curve)} for name, curve in curves.items()}
        cost = sum(costs[name][choice] for name, choice in choices.items())
        step = max(size for curve in curves.values() for _, size, _ in candidates(curve)) / dense
        allowed = min(
            (sum(c[2] for c in f) for f in every if sum(c[1] for c in f) <= (ratio - step) * dense), default=np.inf
        )
        assert best * (1 - ROUNDING) <= cost <= max(allowed, best) * (1 + ROUNDING)


@on_seeds
def test_uniform_takes_the_cheapest_format_within_the_share_of_each_layer(seed):
    curves = make_curves(seed, ["int8", "int4"])
    sizes = sizes_of(curves)
    choices = select_uniform(curves, 0.2, 1, sizes)
    for name, choice in choices.items():
        fits = [c for c in candidates(curves[name]) if c[1] <= 0.2 * sizes[name].dense]
        assert sizes[name].of(choice) <= 0.2 * sizes[name].dense
        for number_format in ("int8", "int4"):
            of_format = [c for c in fits if c[0].format == number_format]
            if of_format:
                largest = max(of_format, key=lambda c: (c[0].rank is None, c[0].rank or 0))
                assert {c[0]: c[2] for c in fits}[choice] <= largest[2] * (1 + ROUNDING)


def test_a_path_begins_with_the_finest_format():
    curves = make_curves(0, ["int8", "int4"])
    path = compression_path(curves, second_order_cost, 1, sizes_of(curves))
    assert set(path.choices_after(0).values()) == {Choice(None, "int8")}
    assert 0.2 < path.kept_after(0) < 0.5
    assert path.predicted_cost_after(0) > 0


@pytest.mark.parametrize(("name", "pivots"), [("float", True), ("int8", True), ("int4", False), ("int3", False)])
def test_few_bits_mean_two_factors(name, pivots):
    assert storage_in(name, "pivoted") == ("pivoted" if pivots else "two-factor")
    assert weight_bytes(64, 64, 16, "pivoted", name, 4, False) <= weight_bytes(
        64, 64, 16, "two-factor", name, 4, False
    )
