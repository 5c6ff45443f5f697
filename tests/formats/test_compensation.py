"""Rounding with errors made up for, against a slow oracle, and the variances that its error is predicted from."""

import itertools

import numpy as np
import pytest
import torch

from hf_lossless_lr.errors import NumericalError
from hf_lossless_lr.formats import FORMATS, free_variances, round_matrix, search_grid

pytestmark = pytest.mark.numerical

SHAPES = [(3, 4), (5, 17), (4, 70), (6, 140)]
cases = pytest.mark.parametrize(
    ("name", "shape", "seed"), list(itertools.product(FORMATS, SHAPES, range(3))), ids=lambda value: str(value)
)


def problem(shape, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3 * shape[1], shape[1])) @ rng.standard_normal((shape[1], shape[1]))
    hessian = rows.T @ rows / len(rows)
    return rng.standard_normal(shape), hessian + 0.01 * np.diag(np.diag(hessian))


def slow_round(matrix, hessian, grid):
    """Round the free column that matters most, then move all others to their best places, by solving for them."""
    free, moved = list(np.argsort(-np.diag(hessian), kind="stable")), matrix.copy()
    scale, zero = (part.double().numpy() for part in grid.columns(matrix.shape[1])[1:])
    while free:
        column = free.pop(0)
        codes = np.clip(
            np.round(moved[:, column] / scale[:, column]) + zero[:, column], grid.kind.lowest, grid.kind.highest
        )
        error = scale[:, column] * (codes - zero[:, column]) - moved[:, column]
        moved[:, column] += error
        if free:
            moved[:, free] -= (
                np.linalg.solve(hessian[np.ix_(free, free)], hessian[free, column])[None] * error[:, None]
            )
    return moved


def error_of(rounded, matrix, hessian):
    return float(np.einsum("ij,jk,ik->", rounded - matrix, hessian, rounded - matrix))


@cases
def test_is_as_good_as_the_slow_way(name, shape, seed):
    """Number by number almost always: one on the border between two codes may fall to either side, and move others."""
    matrix, hessian = problem(shape, seed)
    H = torch.from_numpy(hessian)
    grid = search_grid(torch.from_numpy(matrix), H.diagonal(), FORMATS[name])
    got = round_matrix(torch.from_numpy(matrix), H, grid).double().numpy()
    expected = slow_round(matrix, hessian, grid)
    same = np.isclose(got, expected, rtol=1e-4, atol=1e-6).all(1)
    assert same.mean() >= 0.5
    assert error_of(got, matrix, hessian) <= 1.3 * error_of(expected, matrix, hessian)


@cases
def test_the_result_lies_on_the_grid(name, shape, seed):
    matrix, hessian = (torch.from_numpy(part) for part in problem(shape, seed))
    grid = search_grid(matrix, hessian.diagonal(), FORMATS[name])
    rounded, columns = round_matrix(matrix, hessian, grid), grid.columns(shape[1])
    assert torch.equal(columns.values(columns.codes(rounded)), rounded)


@pytest.mark.parametrize("name", FORMATS)
def test_is_better_than_rounding_to_the_nearest(name):
    gains = []
    for seed in range(5):
        matrix, hessian = problem((8, 140), seed)
        H = torch.from_numpy(hessian)
        grid = search_grid(torch.from_numpy(matrix), H.diagonal(), FORMATS[name])
        columns = grid.columns(140)
        nearest = columns.values(columns.codes(torch.from_numpy(matrix).float())).double().numpy()
        compensated = round_matrix(torch.from_numpy(matrix), H, grid).double().numpy()
        gains.append(error_of(compensated, matrix, hessian) / error_of(nearest, matrix, hessian))
    assert max(gains) < 0.8


@pytest.mark.parametrize("seed", range(4))
def test_uncorrelated_columns_are_rounded_to_the_nearest(seed):
    matrix = torch.randn(5, 90, generator=torch.Generator().manual_seed(seed))
    hessian = torch.diag(torch.rand(90, generator=torch.Generator().manual_seed(seed)) + 0.1).double()
    columns = (grid := search_grid(matrix, hessian.diagonal(), FORMATS["int4"])).columns(90)
    assert torch.equal(round_matrix(matrix, hessian, grid), columns.values(columns.codes(matrix)))
    assert torch.allclose(free_variances(hessian), hessian.diagonal())


@pytest.mark.parametrize("seed", range(4))
def test_free_variances_are_what_regressions_on_the_later_columns_leave(seed):
    _, hessian = problem((1, 12), seed)
    order = list(np.argsort(-np.diag(hessian), kind="stable"))
    got = free_variances(torch.from_numpy(hessian)).numpy()
    for place, column in enumerate(order):
        rest = order[place + 1 :]
        known = (
            hessian[rest, column] @ np.linalg.solve(hessian[np.ix_(rest, rest)], hessian[rest, column]) if rest else 0
        )
        assert got[column] == pytest.approx(hessian[column, column] - known, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_what_the_free_variances_predict(seed):
    matrix, hessian = problem((60, 140), seed)
    H = torch.from_numpy(hessian)
    grid = search_grid(torch.from_numpy(matrix), H.diagonal(), FORMATS["int8"])
    rounded = round_matrix(torch.from_numpy(matrix), H, grid).double().numpy()
    predicted = float((grid.scale.double().square() / 12).sum() * free_variances(H).sum())
    assert error_of(rounded, matrix, hessian) == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("name", FORMATS)
def test_fewer_rows_than_columns_are_enough(name):
    rows = torch.randn(20, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian, matrix = rows.T @ rows, torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    grid = search_grid(matrix, hessian.diagonal(), FORMATS[name])
    rounded, columns = round_matrix(matrix, hessian, grid), grid.columns(60)
    nearest = columns.values(columns.codes(matrix))
    errors = [
        error_of(found.double().numpy(), matrix.double().numpy(), hessian.numpy()) for found in (rounded, nearest)
    ]
    assert errors[0] < errors[1]
    assert torch.isfinite(free_variances(hessian)).all()


def test_what_is_no_second_moment_is_an_error():
    with pytest.raises(NumericalError, match="no such moments"):
        free_variances(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
    with pytest.raises(NumericalError, match="no such moments"):
        free_variances(torch.full((3, 3), torch.nan))
