"""Parameter counts and the terms of a loss curve, against counting and closed forms."""

import itertools

import numpy as np
import pytest

from hf_lossless_lr.factors.curves import LossCurve
from hf_lossless_lr.layers.storage import (
    MOVED_NUMBER,
    NEGLIGIBLE_SAVING,
    STORAGE_CHOICES,
    STORAGES,
    break_even_rank,
    choose_storage,
    factorized_parameters,
)
from hf_lossless_lr.ranks.sizes import LayerSize, parameter_sizes

pytestmark = pytest.mark.numerical

SIZES = [1, 2, 3, 5, 8, 13]
on_grid = pytest.mark.parametrize("shape", list(itertools.product(SIZES, SIZES)), ids=str)
on_storages = pytest.mark.parametrize("storage", STORAGES)


def stored_numbers(out, in_, rank, storage):
    """Count the numbers by making the arrays."""
    if storage == "two-factor":
        return np.empty((out, rank)).size + np.empty((rank, in_)).size
    return np.empty((rank, in_)).size + np.empty((out - rank, rank)).size


def curve(out=4, in_=6, storage="pivoted", seed=0):
    first, second = np.random.default_rng(seed).standard_normal((2, min(out, in_) + 1))
    return LossCurve(out, in_, storage, first, second**2)


@on_grid
@on_storages
def test_parameters_are_the_numbers_in_the_stored_arrays(shape, storage):
    for rank in range(min(shape) + 1):
        assert factorized_parameters(*shape, rank, storage) == stored_numbers(*shape, rank, storage)


@on_grid
@on_storages
def test_break_even_rank_is_the_largest_rank_that_stores_less_than_the_dense_weight(shape, storage):
    dense = shape[0] * shape[1]
    compressing = [k for k in range(1, min(shape) + 1) if stored_numbers(*shape, k, storage) < dense]
    assert break_even_rank(*shape, storage) == max(compressing, default=0)


@on_grid
@on_storages
def test_every_rank_up_to_break_even_compresses(shape, storage):
    """So that no rank below it has to be left out: the count rises with the rank."""
    counts = [factorized_parameters(*shape, k, storage) for k in range(break_even_rank(*shape, storage) + 1)]
    assert all(a < b for a, b in itertools.pairwise([*counts, shape[0] * shape[1]]))


def test_two_factor_break_even_is_the_condition_of_the_paper():
    for N, M in itertools.product(range(1, 20), repeat=2):
        rank = break_even_rank(N, M, "two-factor")
        assert rank < N * M / (N + M) <= rank + 1


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (400, 15), (40, 1000), (210, 200)], ids=str)
def test_auto_storage_counts_one_of_the_two_storages_and_compresses_at_every_rank(shape):
    assert break_even_rank(*shape, "auto") == min(shape) - 1
    for rank in range(1, min(shape)):
        count = factorized_parameters(*shape, rank, "auto")
        assert count in {stored_numbers(*shape, rank, storage) for storage in STORAGES}
        assert count == stored_numbers(*shape, rank, choose_storage(*shape, rank, "auto"))
        assert count < shape[0] * shape[1]


def test_pivoted_storage_saves_the_square_of_the_rank():
    assert factorized_parameters(384, 1536, 192, "two-factor") == 192 * 1920
    assert factorized_parameters(384, 1536, 192, "pivoted") == 192 * 1920 - 192**2


GRID = [(o, i) for o in (4, 40, 64, 384) for i in (4, 40, 384, 1000)]


@on_storages
def test_a_named_storage_is_kept(storage):
    assert all(choose_storage(*shape, 1, storage) == storage for shape in GRID)


@pytest.mark.parametrize("how", ["auto", "fastest"])
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_a_chosen_storage_never_makes_a_layer_larger_than_dense(shape, how):
    for rank in range(1, min(shape)):
        stored = factorized_parameters(*shape, rank, choose_storage(*shape, rank, how))
        assert stored < shape[0] * shape[1]


@pytest.mark.parametrize("shape", GRID, ids=str)
def test_auto_storage_is_at_most_a_negligible_share_above_the_smaller_one(shape):
    for rank in range(1, min(shape)):
        stored = factorized_parameters(*shape, rank, choose_storage(*shape, rank, "auto"))
        smaller = min(factorized_parameters(*shape, rank, storage) for storage in STORAGES)
        assert smaller >= (1 - NEGLIGIBLE_SAVING) * stored


def test_auto_storage_drops_the_pivots_below_a_twentieth_of_both_sides():
    # k² of k (N + M) numbers is 5 % at k = (N + M) / 20.
    assert choose_storage(400, 600, 49, "auto") == "two-factor"
    assert choose_storage(400, 600, 51, "auto") == "pivoted"
    assert choose_storage(600, 400, 49, "auto") == "two-factor"


@pytest.mark.parametrize(
    ("shape", "first"), [((384, 384), 157), ((1536, 384), 157), ((384, 1536), 157), ((2048, 2048), 363)]
)
def test_the_fastest_storage_has_pivots_where_they_save_more_than_moving_numbers_costs(shape, first):
    assert (first - 1) ** 2 < MOVED_NUMBER * min(shape) <= first**2
    assert choose_storage(*shape, first - 1, "fastest") == "two-factor"
    assert choose_storage(*shape, first, "fastest") == "pivoted"


@on_storages
def test_a_curve_counts_as_the_functions_do(storage):
    layer = curve(7, 5, storage)
    assert layer.dense_parameters == layer.parameters(None) == 35
    assert layer.break_even_rank == break_even_rank(7, 5, storage)
    assert [layer.parameters(k) for k in range(6)] == [factorized_parameters(7, 5, k, storage) for k in range(6)]


@pytest.mark.parametrize("storage", STORAGE_CHOICES)
def test_the_default_size_of_a_layer_is_its_parameters_at_every_rank(storage):
    for shape in [(7, 5), (60, 900)]:
        layer = curve(*shape, storage)
        size = parameter_sizes({"a": layer})["a"]
        assert size.by_rank.tolist() == [layer.parameters(k) for k in range(min(shape) + 1)]
        assert size.dense == size.at(None) == shape[0] * shape[1]


def test_a_size_is_looked_up_by_rank_and_dense_is_none():
    size = LayerSize(np.array([0.0, 1.5, 4.0]), 3.0)
    assert (size.at(1), size.at(2), size.at(None)) == (1.5, 4.0, 3.0)


def test_a_curve_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign to field 'storage'"):
        curve().storage = "two-factor"
