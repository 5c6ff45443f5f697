"""Large matrices are decomposed in float32: as good as in float64, and left to float64 where they would not be."""

import pytest
import torch
from support.tolerances import ROUNDING

import hf_lossless_lr.factors.decomposition as decomposition
from hf_lossless_lr.factors.decomposition import TOLERANCE, MetricFactors, metric_svd
from hf_lossless_lr.factors.linalg import damped, quadratic_tails

pytestmark = pytest.mark.numerical

SHAPES = [(24, 40), (40, 24), (32, 32)]
FLOAT32_COST = 1e-4  # relative, of what a truncation costs


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(shape, seed, spread=2.0):
    """A weight, and moments whose channels differ by some orders of magnitude."""
    out, size = shape
    moments = []
    for n, features in enumerate((size, out)):
        rows = random(10 * seed + n, 1, 4 * features, features) @ random(10 * seed + n + 5, features, features)
        rows = rows * torch.logspace(-spread, spread, features, dtype=torch.float64)
        moments.append(damped(rows.mT @ rows / (4 * features), 0.03))
    return random(seed + 100, 1, *shape) / size**0.5, *moments


def cost(change, A, B):
    return float((B * (change @ A @ change.mT)).sum())


@pytest.fixture
def large(monkeypatch):
    """Take every matrix for a large one, and note in which dtypes they are decomposed."""
    dtypes, inner = [], decomposition._svd_in_dtype
    monkeypatch.setattr(decomposition, "LARGE", 1)

    def noted(W, A, B, *, rank):
        dtypes.append(W.dtype)
        return inner(W, A, B, rank=rank)

    monkeypatch.setattr(decomposition, "_svd_in_dtype", noted)
    return dtypes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_large_matrix_loses_no_more_than_in_float64(shape, seed, monkeypatch):
    weight, A, B = problem(shape, seed)
    exact = metric_svd(weight, A, B)
    monkeypatch.setattr(decomposition, "LARGE", 1)
    found = metric_svd(weight, A, B)
    assert {factor.dtype for factor in found} == {torch.float32}
    whole = cost(weight, A, B)
    for rank in (1, 5, 12, 20):
        wanted, got = (
            cost(f.left.double()[..., :rank] @ f.right.double()[..., :rank, :] - weight, A, B) for f in (exact, found)
        )
        assert got <= wanted * (1 + FLOAT32_COST) + 1e-7 * whole
    assert cost(found.left.double() @ found.right.double() - weight, A, B) <= 1e-9 * whole
    squares, exact_squares = found.singular_values.double().square(), exact.singular_values.square()
    torch.testing.assert_close(squares, exact_squares, rtol=1e-5, atol=1e-6 * float(exact_squares.max()))


@pytest.mark.parametrize("scales", [(1e-20, 1.0, 1.0), (1.0, 1e-30, 1e30), (1e15, 1e20, 1e-40)], ids=str)
def test_sizes_beyond_the_range_of_float32_are_no_reason_for_another_result(scales, large):
    weight, A, B = problem((24, 40), 0)
    plain = metric_svd(weight, A, B)
    scaled = metric_svd(weight * scales[0], A * scales[1], B * scales[2])
    assert set(large) == {torch.float32}
    factor = scales[0] * (scales[1] * scales[2]) ** 0.5
    torch.testing.assert_close(
        scaled.singular_values.double() / factor, plain.singular_values.double(), rtol=1e-3, atol=0
    )


def test_a_residual_that_is_too_large_leaves_it_to_float64(large, monkeypatch):
    weight, A, B = problem((24, 40), 1)
    monkeypatch.setattr(decomposition, "TOLERANCE", 0.0)
    found = metric_svd(weight, A, B)
    assert large == [torch.float32, torch.float64]
    assert found.left.dtype == torch.float64


@pytest.mark.parametrize("rank", [7, None])
@pytest.mark.parametrize("spoil", ["left", "right", "singular_values"])
def test_the_residual_sees_factors_that_are_wrong(spoil, rank):
    weight, A, B = problem((24, 40), 2)
    factors = metric_svd(weight, A, B, rank)
    assert decomposition._residual(factors, weight, A, B) < 1e-9
    wrong = getattr(factors, spoil) * (1 + 1e-2 * random(5, 1, getattr(factors, spoil).shape[-1]))
    assert decomposition._residual(factors._replace(**{spoil: wrong}), weight, A, B) > TOLERANCE
    nothing = factors._replace(left=factors.left * torch.nan)
    assert decomposition._residual(nothing, weight, A, B) == float("inf")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smallest_large", [1, 100])
@pytest.mark.parametrize("rank", [1, 9, 24])
def test_factors_of_a_largest_rank_are_the_first_of_all(shape, smallest_large, rank, monkeypatch):
    weight, A, B = problem(shape, 3, spread=0.3)
    monkeypatch.setattr(decomposition, "LARGE", smallest_large)
    every, first = metric_svd(weight, A, B), metric_svd(weight, A, B, rank)
    wanted = (every.left[..., :rank], every.right[..., :rank, :], every.singular_values[..., :rank])
    tolerance = 1e3 * ROUNDING if smallest_large > 1 else FLOAT32_COST
    for found, expected in zip(first, wanted, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("size", [5, 300])
def test_a_triangular_product_leaves_out_zeros_only(size):
    upper, matrix = random(6, 2, size, size).triu(), random(7, 2, size, 4)
    torch.testing.assert_close(decomposition._upper_times(upper, matrix), upper @ matrix)


@pytest.mark.parametrize("size", [5, 30])
def test_the_triangular_and_the_symmetric_root_give_the_same_truncations(size, monkeypatch):
    weight, A, B = problem((size, size + 7), 3, spread=0.3)
    triangular = metric_svd(weight, A, B)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (matrix, torch.ones(matrix.shape[:-2])))
    symmetric = metric_svd(weight, A, B)
    for rank in range(size + 1):
        one, other = (f.left[..., :rank] @ f.right[..., :rank, :] for f in (triangular, symmetric))
        torch.testing.assert_close(one, other, rtol=1e3 * ROUNDING, atol=1e3 * ROUNDING)


def test_tails_in_float32_are_those_of_float64():
    weight, A, B = problem((24, 40), 4)
    factors = metric_svd(weight, A, B)
    narrow = MetricFactors(*(factor.float() for factor in factors))
    exact, found = (quadratic_tails(each, A.float(), B.float()) for each in (factors, narrow))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6 * float(exact.max()))
