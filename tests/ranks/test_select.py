"""Which rank each layer gets, against exhaustive search over tiny instances."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from support.choices import kept_parameters, ranks_after, ranks_of, select_budget, select_uniform
from support.tolerances import ROUNDING, TIE

from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.factors.curves import LossCurve
from hf_lossless_lr.layers.storage import STORAGES, factorized_parameters
from hf_lossless_lr.ranks.paper import select_paper
from hf_lossless_lr.ranks.path import allowed_ranks, compression_path, second_order_cost
from hf_lossless_lr.ranks.select import select_given
from hf_lossless_lr.ranks.sizes import Choice, LayerSize, parameter_size, parameter_sizes

pytestmark = pytest.mark.numerical

SEEDS = range(4)
KINDS = ["convex", "falling", "rough"]
RATIOS = [0.25, 0.4, 0.5, 0.61, 0.75, 0.9, 0.999]

on_seeds = pytest.mark.parametrize("seed", SEEDS)
on_kinds = pytest.mark.parametrize("kind", KINDS)
on_storages = pytest.mark.parametrize("storage", STORAGES)
on_multiples = pytest.mark.parametrize("multiple", [1, 2, 3])


def make_curve(out, in_, seed=0, kind="falling", storage="pivoted", scale=1.0, gain=0.5):
    """A curve; `convex` and `falling` in the rank as for the Kronecker metric, `rough` as another metric may be."""
    rng = np.random.default_rng(seed)
    m = min(out, in_)
    second = rng.exponential(size=m)
    if kind != "rough":
        drops = np.sort(second)[::-1] if kind == "convex" else second
        second = drops[::-1].cumsum()[::-1]
    second = scale * np.append(second, 0.0)
    first = gain * scale * np.append(rng.standard_normal(m), 0.0)
    noise = np.append(rng.uniform(0.1, 1.0, size=m), 0.0)
    return LossCurve(out, in_, storage, first, second, noise)


def make_curves(seed, kind="falling", storage="pivoted", layers=3, **options):
    rng = np.random.default_rng(1000 + seed)
    shapes = rng.integers(4, 9, size=(layers, 2))
    scales = 10.0 ** rng.uniform(-1, 1, size=layers)
    return {
        f"layer{n}": make_curve(int(out), int(in_), 10 * seed + n, kind, storage, scale=scales[n], **options)
        for n, (out, in_) in enumerate(shapes)
    }


def candidates(curve, multiple=1):
    """Dense, and each rank that compresses, by counting."""
    dense = curve.out_features * curve.in_features
    ranks = [k for k in range(1, min(curve.out_features, curve.in_features) + 1) if k % multiple == 0]
    counts = {k: factorized_parameters(curve.out_features, curve.in_features, k, curve.storage) for k in ranks}
    if curve.storage != "two-factor":
        counts.pop(min(curve.out_features, curve.in_features), None)
    return [(None, dense, 0.0), *((k, n, float(curve.second_order[k])) for k, n in counts.items() if n < dense)]


def cost_of(curves, ranks):
    return sum(0.0 if ranks[name] is None else float(c.second_order[ranks[name]]) for name, c in curves.items())


def cheapest(curves, budget, multiple=1):
    """Lowest cost within the budget over every combination of ranks; None if nothing fits."""
    combinations = itertools.product(*(candidates(curve, multiple) for curve in curves.values()))
    costs = [sum(c[2] for c in chosen) for chosen in combinations if sum(c[1] for c in chosen) <= budget]
    return min(costs, default=None)


def dense_size(curves):
    return sum(curve.out_features * curve.in_features for curve in curves.values())


# --- the path -------------------------------------------------------------------------------------------------------


@on_multiples
@on_storages
@pytest.mark.parametrize("shape", [(1, 5), (2, 2), (3, 7), (8, 8), (12, 5)], ids=str)
def test_allowed_ranks_are_the_multiples_that_compress(shape, storage, multiple):
    curve = make_curve(*shape, storage=storage)
    assert allowed_ranks(curve, multiple) == [rank for rank, _, _ in candidates(curve, multiple)[1:]]


@on_kinds
@on_storages
@on_multiples
@on_seeds
def test_each_point_of_the_path_is_the_best_answer_to_its_multiplier(kind, storage, multiple, seed):
    """For each λ, the steps below it lead to the brute-force `argmin cost + λ parameters` of every layer."""
    curves = make_curves(seed, kind, storage)
    path = compression_path(curves, second_order_cost, multiple)
    slopes = [step.cost / step.saved for step in path.steps]
    for multiplier in np.random.default_rng(seed).choice([1, -1], 40, p=[0.9, 0.1]) * np.logspace(-4, 2, 40):
        best = {
            name: min(candidates(curve, multiple), key=lambda c: c[2] + multiplier * c[1])[0]
            for name, curve in curves.items()
        }
        assert ranks_after(path, sum(slope < multiplier for slope in slopes)) == best


@on_kinds
@on_seeds
def test_the_path_is_nested_and_gets_smaller_with_each_step(kind, seed):
    curves = make_curves(seed, kind)
    path = compression_path(curves, second_order_cost)
    points = [ranks_after(path, count) for count in range(len(path.steps) + 1)]
    assert points[0] == dict.fromkeys(curves)
    for before, after, step in zip(points, points[1:], path.steps, strict=False):
        assert [name for name in curves if before[name] != after[name]] == [step.layer]
        assert before[step.layer] is None or after[step.layer] < before[step.layer]
        assert kept_parameters(curves, before) - kept_parameters(curves, after) == step.saved > 0
        assert cost_of(curves, after) - cost_of(curves, before) == pytest.approx(step.cost, rel=ROUNDING, abs=TIE)


@on_kinds
@on_seeds
def test_the_path_takes_the_cheapest_parameters_first(kind, seed):
    steps = compression_path(make_curves(seed, kind), second_order_cost).steps
    slopes = [step.cost / step.saved for step in steps]
    assert slopes == sorted(slopes)


@on_kinds
@on_multiples
@on_seeds
def test_the_path_ends_at_the_smallest_model(kind, multiple, seed):
    curves = make_curves(seed, kind)
    path = compression_path(curves, second_order_cost, multiple)
    smallest = {name: min(candidates(curve, multiple), key=lambda c: c[1])[0] for name, curve in curves.items()}
    assert ranks_after(path, len(path.steps)) == smallest


def auto_curves(seed):
    """Layers so large that `auto` storage changes where a higher rank then takes fewer numbers."""
    return {
        name: make_curve(*shape, seed + n, storage="auto", scale=10.0**n)
        for n, (name, shape) in enumerate({"square": (300, 280), "wide": (60, 900), "tall": (500, 210)}.items())
    }


@on_multiples
@on_seeds
def test_allowed_ranks_leave_out_a_rank_that_a_higher_one_undercuts(multiple, seed):
    left_out = 0
    for curve in auto_curves(seed).values():
        counts = {rank: count for rank, count, _ in candidates(curve, multiple)[1:]}
        expected = [r for r, count in counts.items() if all(counts[s] > count for s in counts if s > r)]
        assert allowed_ranks(curve, multiple) == expected
        left_out += len(counts) - len(expected)
    assert left_out > 0 or multiple > 1


@on_multiples
@on_seeds
def test_auto_storage_keeps_the_path_optimal_nested_and_within_the_budget(multiple, seed):
    curves = auto_curves(seed)
    path = compression_path(curves, second_order_cost, multiple)
    slopes = [step.cost / step.saved for step in path.steps]
    assert all(step.saved > 0 for step in path.steps)
    for multiplier in np.logspace(-4, 2, 12):
        best = {
            name: min(candidates(curve, multiple), key=lambda c: c[2] + multiplier * c[1])[0]
            for name, curve in curves.items()
        }
        assert ranks_after(path, sum(slope < multiplier for slope in slopes)) == best
    for ratio, select in itertools.product(RATIOS, (select_budget, select_uniform)):
        stored = sum(
            c.out_features * c.in_features
            if rank is None
            else factorized_parameters(c.out_features, c.in_features, rank, "auto")
            for c, rank in zip(curves.values(), select(curves, ratio, multiple).values(), strict=True)
        )
        assert stored <= ratio * dense_size(curves)


def test_rounding_does_not_reorder_the_steps_of_a_layer():
    """Costs on a straight line: all slopes are equal but for rounding."""
    reordered = []
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        out, in_ = (int(size) for size in rng.integers(3, 13, size=2))
        storage, slope = STORAGES[seed % 2], rng.uniform()
        sizes = [factorized_parameters(out, in_, k, storage) for k in range(min(out, in_) + 1)]
        costs = slope * (out * in_ - np.array(sizes, dtype=float))
        path = compression_path({"a": LossCurve(out, in_, storage, costs, costs)}, second_order_cost)
        ranks = [step.choice.rank for step in path.steps]
        if ranks != sorted(ranks, reverse=True):
            reordered.append(seed)
    assert reordered == []


def test_a_layer_that_cannot_be_compressed_has_no_steps():
    curves = {"thin": make_curve(1, 8), "wide": make_curve(6, 8)}
    path = compression_path(curves, second_order_cost)
    assert {step.layer for step in path.steps} == {"wide"}
    assert ranks_after(path, len(path.steps)) == {"thin": None, "wide": 1}


def test_a_layer_that_costs_nothing_goes_to_rank_1_at_once_and_first():
    free = make_curve(6, 8, scale=0.0)
    path = compression_path({"dear": make_curve(6, 8), "free": free}, second_order_cost)
    assert (path.steps[0].layer, path.steps[0].choice.rank, path.steps[0].cost) == ("free", 1, 0.0)
    assert [step.layer for step in path.steps].count("free") == 1


# --- budget ---------------------------------------------------------------------------------------------------------


@on_kinds
@on_storages
@on_seeds
def test_the_budget_is_never_exceeded(kind, storage, seed):
    curves = make_curves(seed, kind, storage)
    smallest = sum(min(c[1] for c in candidates(curve)) for curve in curves.values()) / dense_size(curves)
    for ratio in [*RATIOS, smallest]:
        if ratio >= smallest:
            assert kept_parameters(curves, select_budget(curves, ratio)) <= ratio * dense_size(curves)


@on_kinds
@on_storages
@on_multiples
@on_seeds
def test_budget_is_the_exhaustive_optimum_up_to_one_step_of_the_path(kind, storage, multiple, seed):
    curves = make_curves(seed, kind, storage)
    steps = compression_path(curves, second_order_cost, multiple).steps
    for ratio in RATIOS:
        budget = ratio * dense_size(curves)
        optimum = cheapest(curves, budget, multiple)
        if optimum is None:
            continue
        found = cost_of(curves, select_budget(curves, ratio, multiple))
        # The step that meets the budget; its share of cost for the parameters saved beyond the budget is the gap.
        kept = dense_size(curves)
        for step in steps:
            kept -= step.saved
            if kept <= budget:
                break
        gap = step.cost * (budget - kept) / step.saved
        assert optimum - TIE <= found <= optimum + max(gap, 0.0) + TIE


@on_kinds
@on_seeds
def test_budget_is_the_exhaustive_optimum_at_every_size_on_the_path(kind, seed):
    curves = make_curves(seed, kind)
    path = compression_path(curves, second_order_cost)
    for count in range(len(path.steps) + 1):
        ranks = ranks_after(path, count)
        kept = kept_parameters(curves, ranks)
        if cost_of(curves, ranks) > 0:  # else a smaller model costs less than the dense one
            found = select_budget(curves, (kept + 0.5) / dense_size(curves))
            assert cost_of(curves, found) == pytest.approx(cheapest(curves, kept + 0.5), abs=TIE)


@pytest.mark.parametrize("kind", ["convex", "falling"])
@on_seeds
def test_no_layer_on_the_last_step_could_be_larger(kind, seed):
    """Costs fall with the rank here, so spare parameters are used."""
    curves = make_curves(seed, kind, layers=1)
    for ratio in [0.5, 0.6, 0.75, 0.9, 0.99]:
        ranks = select_budget(curves, ratio)
        fitting = [k for k, count, _ in candidates(curves["layer0"]) if count <= ratio * dense_size(curves)]
        assert ranks == {"layer0": max(fitting)}


@on_kinds
@on_storages
@on_seeds
def test_nothing_that_lowers_the_cost_of_a_layer_would_still_fit(kind, storage, seed):
    """What is left of the budget is spent in all layers, not in the last one of the path alone."""
    curves = make_curves(seed, kind, storage)
    for ratio in RATIOS:
        try:
            ranks = select_budget(curves, ratio)
        except ConfigurationError:
            continue
        spare = ratio * dense_size(curves) - kept_parameters(curves, ranks)
        for name, curve in curves.items():
            points = {rank: (count, cost) for rank, count, cost in candidates(curve)}
            count, cost = points[ranks[name]]
            assert not [rank for rank, (n, c) in points.items() if n - count <= spare - TIE and c < cost - TIE]


def test_spare_parameters_are_not_spent_on_a_rank_that_costs_more():
    """In a metric other than the Kronecker one, a higher rank may be predicted to cost more."""
    second = np.array([9.0, 1.0, 5.0, 6.0, 5.0, 0.0])
    curves = {"a": LossCurve(5, 6, "pivoted", 0 * second, second)}
    assert select_budget(curves, 0.9) == {"a": 1}


@on_seeds
def test_a_keep_ratio_of_1_leaves_everything_dense(seed):
    curves = make_curves(seed)
    assert select_budget(curves, 1.0) == select_uniform(curves, 1.0) == dict.fromkeys(curves)


@on_multiples
@on_seeds
def test_budget_and_uniform_ranks_are_multiples(multiple, seed):
    curves = {"a": make_curve(9, 12, seed), "b": make_curve(11, 10, seed + 100)}
    for ratio, select in itertools.product([0.6, 0.8], (select_budget, select_uniform)):
        ranks = [rank for rank in select(curves, ratio, multiple).values() if rank is not None]
        assert ranks
        assert all(rank % multiple == 0 for rank in ranks)


def test_budget_compresses_the_insensitive_layer():
    sensitive, robust = make_curve(8, 8, scale=100.0), make_curve(8, 8, scale=0.01)
    ranks = select_budget({"sensitive": sensitive, "robust": robust}, 0.7)
    assert ranks["sensitive"] is None
    assert ranks["robust"] <= 2


def test_a_budget_below_the_smallest_model_is_an_error_that_says_how_small_it_can_get():
    curves = {"a": make_curve(4, 4), "b": make_curve(4, 4)}  # rank 1 pivoted: 7 of 16
    text = "keep_ratio=0.4 cannot be reached: with rank_multiple=1 the smallest model keeps 0.4375 of the targeted"
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        select_budget(curves, 0.4)
    assert select_budget(curves, 0.4375) == {"a": 1, "b": 1}
    with pytest.raises(ConfigurationError, match=r"with rank_multiple=2 the smallest model keeps 0\.7500"):
        select_budget(curves, 0.5, 2)


# --- uniform --------------------------------------------------------------------------------------------------------


@on_storages
@on_multiples
@on_seeds
def test_uniform_takes_the_largest_rank_within_the_share_of_each_layer(storage, multiple, seed):
    curves = make_curves(seed, storage=storage)
    for ratio in RATIOS:
        expected = {
            name: max(
                (k for k, count, _ in candidates(c, multiple) if k and count <= ratio * c.dense_parameters), default=0
            )
            for name, c in curves.items()
        }
        if all(expected.values()):
            assert select_uniform(curves, ratio, multiple) == expected
        else:
            with pytest.raises(ConfigurationError, match=f"keep_ratio={ratio} cannot be reached in 'layer"):
                select_uniform(curves, ratio, multiple)


def test_a_layer_that_cannot_reach_its_share_is_an_error_that_says_what_to_do():
    text = (
        "keep_ratio=0.3 cannot be reached in 'small' (4 x 4) with rank_multiple=1; add the layer to "
        "`ignore`, or use objective='budget'."
    )
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        select_uniform({"large": make_curve(20, 20), "small": make_curve(4, 4)}, 0.3)


# --- budgets in other sizes -----------------------------------------------------------------------------------------

SIZE_KINDS = ["parameters", "flops", "latency"]
FIXED = [0.0, 37.0]
on_size_kinds = pytest.mark.parametrize("sized", SIZE_KINDS)
on_monotone_kinds = pytest.mark.parametrize("kind", ["convex", "falling"])


def make_sizes(sized, curves, seed):
    """Whole numbers, so that sums are exact. Latency: flat in places, rising or not, at high ranks above dense."""
    rng = np.random.default_rng(2000 + seed)
    sizes = {}
    for name, curve in curves.items():
        m = min(curve.out_features, curve.in_features)
        counts = [factorized_parameters(curve.out_features, curve.in_features, k, curve.storage) for k in range(m + 1)]
        scale = {"parameters": 1, "flops": 2 * int(rng.integers(1, 60))}.get(sized)
        if scale is not None:
            sizes[name] = LayerSize(scale * np.array(counts, dtype=float), float(scale * curve.dense_parameters))
        else:
            sizes[name] = LayerSize(rng.integers(2, 14, size=m + 1).astype(float), float(rng.integers(3, 14)))
    return sizes


def sized_candidates(curve, size, multiple=1):
    """Dense, and each rank that stores less and is smaller, by counting."""
    ranks = [k for k, _, _ in candidates(curve, multiple)[1:]]
    smaller = [k for k in ranks if size.by_rank[k] < size.dense]
    return [(None, size.dense, 0.0), *((k, size.by_rank[k], float(curve.second_order[k])) for k in smaller)]


def sized_choices(curves, sizes, multiple=1):
    return [sized_candidates(curve, sizes[name], multiple) for name, curve in curves.items()]


def size_of(sizes, ranks):
    """Kept size, written out."""
    return sum(sizes[n].dense if rank is None else sizes[n].by_rank[rank] for n, rank in ranks.items())


@on_monotone_kinds
@on_size_kinds
@on_multiples
@on_seeds
def test_allowed_ranks_are_those_whose_size_no_higher_rank_and_not_dense_undercuts(kind, sized, multiple, seed):
    curves = make_curves(seed, kind)
    for name, size in make_sizes(sized, curves, seed).items():
        counts = {k: n for k, n, _ in sized_candidates(curves[name], size, multiple)[1:]}
        expected = [k for k in counts if all(counts[other] > counts[k] for other in counts if other > k)]
        assert allowed_ranks(curves[name], multiple, size) == expected


def test_a_rank_that_stores_more_than_dense_is_not_allowed_however_fast_it_is():
    curve = make_curve(6, 6, storage="two-factor")  # ranks 1 and 2 compress
    assert allowed_ranks(curve, 1, LayerSize(np.arange(7.0), 100.0)) == [1, 2]


@on_monotone_kinds
@on_size_kinds
@on_multiples
@on_seeds
def test_each_point_of_the_path_is_the_best_answer_to_its_multiplier_in_each_size(kind, sized, multiple, seed):
    curves = make_curves(seed, kind)
    sizes = make_sizes(sized, curves, seed)
    path = compression_path(curves, second_order_cost, multiple, sizes)
    slopes = [step.cost / step.saved for step in path.steps]
    for multiplier in np.logspace(-5, 2, 40):
        best = {
            name: min(sized_candidates(curve, sizes[name], multiple), key=lambda c: c[2] + multiplier * c[1])[0]
            for name, curve in curves.items()
        }
        assert ranks_after(path, sum(slope < multiplier for slope in slopes)) == best


@on_monotone_kinds
@on_size_kinds
@on_seeds
def test_in_each_size_the_path_is_nested_and_gets_smaller_with_each_step(kind, sized, seed):
    curves = make_curves(seed, kind)
    sizes = make_sizes(sized, curves, seed)
    path = compression_path(curves, second_order_cost, 1, sizes)
    points = [ranks_after(path, count) for count in range(len(path) + 1)]
    for before, after, step in zip(points, points[1:], path.steps, strict=False):
        assert [name for name in curves if before[name] != after[name]] == [step.layer]
        assert before[step.layer] is None or after[step.layer] < before[step.layer]
        assert size_of(sizes, before) - size_of(sizes, after) == step.saved > 0


@on_size_kinds
@on_seeds
@pytest.mark.parametrize("fixed", FIXED)
def test_the_path_knows_the_kept_ratio_and_the_predicted_cost_of_each_point(sized, seed, fixed):
    curves = make_curves(seed)
    sizes = make_sizes(sized, curves, seed)
    path = compression_path(curves, second_order_cost, 1, sizes, fixed)
    dense = size_of(sizes, dict.fromkeys(curves)) + fixed
    assert len(path) == len(path.steps)
    for count in range(len(path) + 1):
        ranks = ranks_after(path, count)
        assert path.kept_after(count) == pytest.approx((size_of(sizes, ranks) + fixed) / dense, rel=ROUNDING)
        assert path.predicted_cost_after(count) == pytest.approx(cost_of(curves, ranks), rel=ROUNDING, abs=TIE)


@on_monotone_kinds
@on_size_kinds
@on_seeds
@pytest.mark.parametrize("fixed", FIXED)
def test_in_each_size_the_budget_is_met_at_the_exhaustive_optimum_up_to_one_step(kind, sized, seed, fixed):
    """Up to the last step's share of cost for what it saves beyond the budget; and an error where nothing fits."""
    curves = make_curves(seed, kind)
    sizes = make_sizes(sized, curves, seed)
    total = size_of(sizes, dict.fromkeys(curves)) + fixed
    path = compression_path(curves, second_order_cost, 1, sizes)
    for ratio in RATIOS:
        budget = ratio * total - fixed
        combinations = itertools.product(*sized_choices(curves, sizes))
        costs = [sum(c[2] for c in chosen) for chosen in combinations if sum(c[1] for c in chosen) <= budget]
        if not costs:
            with pytest.raises(ConfigurationError, match=f"keep_ratio={ratio} cannot be reached"):
                select_budget(curves, ratio, 1, sizes, fixed)
            continue
        ranks = select_budget(curves, ratio, 1, sizes, fixed)
        assert (size_of(sizes, ranks) + fixed) / total <= ratio
        kept, gap = total - fixed, 0.0
        for step in path.steps:
            if kept <= budget:
                break
            kept -= step.saved
            gap = step.cost * (budget - kept) / step.saved
        assert min(costs) - TIE <= cost_of(curves, ranks) <= min(costs) + gap + TIE


@on_storages
@on_seeds
def test_parameters_are_the_default_size(storage, seed):
    curves = make_curves(seed, storage=storage)
    sizes = parameter_sizes(curves)
    assert compression_path(curves, second_order_cost) == compression_path(curves, second_order_cost, 1, sizes)
    assert select_budget(curves, 0.75) == select_budget(curves, 0.75, 1, sizes)
    assert select_uniform(curves, 0.9) == select_uniform(curves, 0.9, 1, sizes)


@on_seeds
@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20], ids=["small", "large"])
def test_the_unit_of_size_does_not_matter(seed, unit):
    curves = make_curves(seed)
    sizes = {n: LayerSize(unit * size.by_rank, unit * size.dense) for n, size in parameter_sizes(curves).items()}
    for ratio in [0.6, 0.8]:
        assert select_budget(curves, ratio, 1, sizes) == select_budget(curves, ratio)


def test_a_budget_compresses_the_layer_that_weighs_more_in_its_size():
    curves = {"often": make_curve(8, 8), "seldom": make_curve(8, 8)}
    busy, idle = (LayerSize(rows * parameter_size(curves["often"]).by_rank, rows * 64.0) for rows in (100, 1))
    assert select_budget(curves, 0.7, 1, {"often": busy, "seldom": idle})["seldom"] is None
    assert select_budget(curves, 0.7, 1, {"often": idle, "seldom": busy})["often"] is None


@pytest.mark.parametrize("select", [select_budget, select_uniform])
def test_the_whole_model_keeps_the_ratio_together_with_what_is_fixed(select):
    # 64 numbers targeted and 36 fixed: three quarters of 100 leave 39 to the layer. Pivoted ranks 3 and 4: 39 and 48.
    curves = {"a": make_curve(8, 8)}
    assert select(curves, 0.75, 1, None, 36.0) == {"a": 3}
    assert select(curves, 0.74, 1, None, 36.0) == {"a": 2}
    assert select(curves, 0.75) == {"a": 4}
    assert select(curves, 1.0, 1, None, 36.0) == {"a": None}


def test_a_ratio_of_the_whole_model_that_what_is_fixed_forbids_is_an_error():
    curves = {"a": make_curve(4, 4)}  # rank 1 pivoted: 7 of 16
    text = (
        "keep_ratio=0.9 cannot be reached: with rank_multiple=1 the smallest model keeps 0.9100 of the whole model's "
        "parameters (0.8400 lies outside the targeted layers)."
    )
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        select_budget(curves, 0.9, fixed=84.0)
    with pytest.raises(ConfigurationError, match=re.escape("keeps 0.9100 of the whole model's size (0.84")):
        select_budget(curves, 0.5, 1, parameter_sizes(curves), 84.0)
    with pytest.raises(ConfigurationError, match=re.escape("keeps 0.4375 of the targeted size.")):
        select_budget(curves, 0.4, 1, parameter_sizes(curves))
    with pytest.raises(ConfigurationError, match=re.escape("keep_ratio=0.9 cannot be reached in 'a' (4 x 4)")):
        select_uniform(curves, 0.9, fixed=84.0)


@on_size_kinds
@on_seeds
@pytest.mark.parametrize("fixed", FIXED)
def test_the_ratio_that_the_error_names_can_be_reached(sized, seed, fixed):
    curves = make_curves(seed)
    sizes = make_sizes(sized, curves, seed)
    with pytest.raises(ConfigurationError, match="cannot be reached") as error:
        select_budget(curves, 1e-6, 1, sizes, fixed)
    named = float(re.search(r"keeps ([\d.]+) of", str(error.value))[1])
    kept = size_of(sizes, select_budget(curves, named, 1, sizes, fixed)) + fixed
    assert kept / (size_of(sizes, dict.fromkeys(curves)) + fixed) == pytest.approx(named, abs=1e-4)


@on_size_kinds
@on_seeds
def test_uniform_takes_the_largest_rank_within_the_share_of_each_layers_size(sized, seed):
    curves = make_curves(seed)
    sizes = make_sizes(sized, curves, seed)
    for ratio in RATIOS:
        fitting = {
            name: [k for k, n, _ in sized_candidates(curve, sizes[name])[1:] if n <= ratio * sizes[name].dense]
            for name, curve in curves.items()
        }
        if all(fitting.values()):
            assert select_uniform(curves, ratio, 1, sizes) == {name: max(ranks) for name, ranks in fitting.items()}
        else:
            with pytest.raises(ConfigurationError, match=f"keep_ratio={ratio} cannot be reached in 'layer"):
                select_uniform(curves, ratio, 1, sizes)


def test_a_layer_that_is_nowhere_faster_stays_dense():
    curves = {"slow": make_curve(6, 6, gain=50.0), "fast": make_curve(6, 6, 1, gain=50.0)}
    faster, slower = LayerSize(np.arange(7.0), 6.0), LayerSize(np.arange(7.0) + 6, 6.0)
    sizes = {"slow": slower, "fast": faster}
    ranks = select_budget(curves, 0.9, 1, sizes)
    assert ranks["slow"] is None
    assert ranks["fast"] is not None
    sizes["fast"] = slower
    with pytest.raises(ConfigurationError, match=r"the smallest model keeps 1\.0000 of the targeted size"):
        select_budget(curves, 0.9, 1, sizes)


def test_of_ranks_that_are_equally_fast_the_highest_is_taken():
    size = LayerSize(np.array([1, 2, 2, 2, 3, 3, 9, 9, 9.0]), 6.0)
    assert allowed_ranks(make_curve(8, 8), 1, size) == [3, 5]
    assert select_budget({"a": make_curve(8, 8)}, 0.4, 1, {"a": size}) == {"a": 3}


def test_a_layer_without_a_size_is_an_error():
    curves = make_curves(0)
    sizes = parameter_sizes(curves)
    del sizes["layer1"]
    for select in (select_budget, select_uniform):
        with pytest.raises(ConfigurationError, match="sizes: there is none for the layer 'layer1'; give one for each"):
            select(curves, 0.5, 1, sizes)


# --- the paper's algorithms -----------------------------------------------------------------------------------------


def algorithm_1(curve, epsilon):
    """Algorithm 1 of arXiv 2412.06867, line by line; the loss of a candidate is its first-order prediction."""
    N, M = curve.out_features, curve.in_features
    found = []
    c = 1
    while c < N * M / (N + M):  # the compression condition
        if curve.max_noise[c] <= epsilon:  # noise stays in the neighbourhood
            derivative = curve.first_order[c]
            if derivative < 0:  # noise points against the gradient
                found.append((derivative, c))
        c += 1
    if not found:
        return None
    lowest = found[0]
    for candidate in found:
        if candidate[0] < lowest[0]:
            lowest = candidate
    return lowest[1]


def algorithm_2(curve, epsilon):
    """Algorithm 2: the first rank that passes."""
    N, M = curve.out_features, curve.in_features
    c = 1
    while c < N * M / (N + M):
        if curve.max_noise[c] <= epsilon and curve.first_order[c] < 0:
            return c
        c += 1
    return None


@on_storages
@pytest.mark.parametrize("compact", [False, True], ids=["lossless", "compact"])
@on_seeds
def test_paper_objectives_are_its_algorithms(storage, compact, seed):
    """In pivoted storage too the paper's own condition bounds the rank."""
    curves = make_curves(seed, "rough", storage, layers=6)
    curves["square"] = make_curve(6, 6, seed, "rough", storage)  # NM / (N + M) = 3 exactly, which is not below itself
    algorithm = algorithm_2 if compact else algorithm_1
    for epsilon in [0.05, 0.3, 0.6, 1.0]:
        bounds = {name: epsilon * (0.5 + n / 6) for n, name in enumerate(curves)}
        expected = {name: algorithm(curve, bounds[name]) for name, curve in curves.items()}
        assert ranks_of(select_paper(curves, bounds, compact)) == expected


def test_paper_objectives_differ_and_respect_sign_noise_and_rank():
    first = np.array([-9.0, 0.5, -1.0, -2.0, -5.0, -7.0, -8.0, -9.0, 0.0])
    noise = np.array([9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0])
    curves = {"a": LossCurve(8, 8, "pivoted", first, np.zeros(9), noise)}  # ranks 1 … 3 compress
    assert ranks_of(select_paper(curves, {"a": 0.1}, compact=True)) == {"a": 2}  # rank 1 has the wrong sign
    assert ranks_of(select_paper(curves, {"a": 0.1}, compact=False)) == {"a": 3}  # rank 4 would be lower still
    assert ranks_of(select_paper(curves, {"a": 0.09}, compact=False)) == {"a": None}


def test_paper_objectives_need_the_noise():
    second = np.zeros(4)
    with pytest.raises(ConfigurationError, match="the curve of 'a' has no max_noise"):
        select_paper({"a": LossCurve(3, 3, "pivoted", second, second)}, {"a": 1.0}, compact=True)


# --- determinism ----------------------------------------------------------------------------------------------------

SELECTIONS = {
    "budget": lambda curves: select_budget(curves, 0.6),
    "uniform": lambda curves: select_uniform(curves, 0.6),
    "paper-lossless": lambda curves: ranks_of(select_paper(curves, dict.fromkeys(curves, 0.5), compact=False)),
    "paper-compact": lambda curves: ranks_of(select_paper(curves, dict.fromkeys(curves, 0.5), compact=True)),
}


@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
@on_seeds
def test_the_same_curves_give_the_same_ranks_in_any_order_of_layers(select, seed):
    curves = make_curves(seed, layers=4)
    ranks = select(curves)
    assert select(curves) == ranks
    assert list(ranks) == list(curves)
    for names in itertools.permutations(curves):
        assert select({name: curves[name] for name in names}) == ranks


def test_ties_are_broken_by_the_order_of_the_layers():
    """Identical layers: the first ones are compressed at least as much, whatever their names."""
    for names in (["a", "b", "c"], ["c", "b", "a"]):
        ranks = list(SELECTIONS["budget"](dict.fromkeys(names, make_curve(6, 6, kind="convex"))).values())
        assert ranks == sorted(ranks, key=lambda rank: 7 if rank is None else rank)


def test_given_ranks_are_given_and_other_layers_stay_dense():
    curves = make_curves(0, layers=3)
    curves["layer1"] = replace(curves["layer1"], rounding={"int8": None, "int4": None})
    names = list(curves)
    most = curves[names[0]].break_even_rank
    choices = select_given(curves, {names[0]: most})
    assert choices[names[0]] == Choice(most)
    assert choices[names[1]] == Choice(None, "int8")
    assert choices[names[2]] == Choice()
    with pytest.raises(ConfigurationError, match=f"smaller than dense up to rank {most}, got {most + 1}"):
        select_given(curves, {names[0]: most + 1})
