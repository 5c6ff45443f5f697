"""A layer of several matrices: each is treated as if alone, all have one rank, and their costs add up."""

import numpy as np
import pytest
import torch
from support.tolerances import ROUNDING

from hf_lossless_lr.factors.decomposition import MetricFactors
from hf_lossless_lr.factors.factorize import Factorization, factorize, loss_curve
from hf_lossless_lr.factors.linalg import damped, damped_diagonal, quadratic_tails, shifted_weight
from hf_lossless_lr.factors.metrics import METRICS
from hf_lossless_lr.ranks.sizes import parameter_size
from hf_lossless_lr.statistics.records import LayerStatistics
from hf_lossless_lr.statistics.rows import gram, real_rows

pytestmark = pytest.mark.numerical

GROUPS = 3
DAMPING = 0.03
SHAPES = [(4, 7), (7, 4), (5, 5)]

on_shapes = pytest.mark.parametrize("shape", SHAPES)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(seed, size):
    rows = random(seed, GROUPS, 4 * size, size)
    return rows.mT @ rows / rows.shape[-2]


def layer(shape):
    out, in_ = shape
    statistics = LayerStatistics(random(1, GROUPS, *shape), moments(2, in_), moments(3, out), 100, 100)
    return random(4, GROUPS, *shape), statistics


def part(statistics, index):
    matrices = (statistics.weight_grad, statistics.input_covariance, statistics.grad_covariance)
    return LayerStatistics(*(matrix[index] for matrix in matrices), statistics.tokens, statistics.units)


def check(got, expected):
    torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


@on_shapes
@pytest.mark.parametrize("metric", METRICS)
class TestEachMatrix:
    def test_has_the_factors_that_it_has_alone(self, shape, metric):
        weight, statistics = layer(shape)
        together = factorize(weight, statistics, metric, DAMPING)
        for index in range(GROUPS):
            alone = factorize(weight[index], part(statistics, index), metric, DAMPING)
            check(together.factors.singular_values[index], alone.factors.singular_values)
            for rank in (1, 2, min(shape)):
                check(together.weight(rank)[index], alone.weight(rank))

    def test_adds_its_cost_to_that_of_the_layer(self, shape, metric):
        weight, statistics = layer(shape)
        together = loss_curve(weight, factorize(weight, statistics, metric, DAMPING), statistics, with_noise=True)
        curves = []
        for index in range(GROUPS):
            alone = weight[index], part(statistics, index)
            curves.append(loss_curve(alone[0], factorize(*alone, metric, DAMPING), alone[1], with_noise=True))
        for name, combine in (("first_order", sum), ("second_order", sum), ("max_noise", np.maximum.reduce)):
            expected = combine([getattr(curve, name) for curve in curves])
            np.testing.assert_allclose(getattr(together, name), expected, rtol=ROUNDING, atol=ROUNDING)
        size, sizes = parameter_size(together), [parameter_size(curve) for curve in curves]
        assert size.dense == sum(one.dense for one in sizes) == weight.numel()
        np.testing.assert_array_equal(size.by_rank, sum(one.by_rank for one in sizes))
        assert together.break_even_rank == curves[0].break_even_rank


@on_shapes
@pytest.mark.parametrize("storage", ["pivoted", "two-factor"])
@pytest.mark.parametrize("pivot_inputs", [False, True])
def test_stored_factors_are_those_of_each_matrix(shape, storage, pivot_inputs):
    weight, statistics = layer(shape)
    together = factorize(weight, statistics, "kronecker", DAMPING)
    down, up, order = together.truncate(2, storage, pivot_inputs)
    for index in range(GROUPS):
        alone = Factorization(MetricFactors(*(factor[index] for factor in together.factors)))
        expected = alone.truncate(2, storage, pivot_inputs)
        check(down[index], expected.down)
        check(up[index], expected.up)
        assert (order is None) == (expected.permutation is None) == (storage == "two-factor")
        assert order is None or torch.equal(order[index], expected.permutation)


@on_shapes
def test_formulas_take_several_matrices_at_once_also_one_that_saw_nothing(shape):
    weight, statistics = layer(shape)
    A, B = statistics.input_covariance.clone(), statistics.grad_covariance
    A[1] = 0.0
    cross = random(5, GROUPS, *shape)
    factors = factorize(weight, statistics, "activation", DAMPING).factors
    for index in range(GROUPS):
        check(damped(A, DAMPING)[index], damped(A[index], DAMPING))
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        check(damped_diagonal(diagonal, DAMPING)[index], damped_diagonal(diagonal[index], DAMPING))
        check(shifted_weight(weight, cross, A, 0.1)[index], shifted_weight(weight[index], cross[index], A[index], 0.1))
        one = MetricFactors(*(factor[index] for factor in factors))
        check(quadratic_tails(factors, A, B)[index], quadratic_tails(one, A[index], B[index]))
    check(shifted_weight(weight, cross, A, 0.1)[1], weight[1])


@pytest.mark.parametrize("masked", [False, True])
def test_rows_and_products_are_kept_apart(masked):
    x = random(6, 2, 5, GROUPS, 4).float()
    mask = torch.tensor([True, False] * 5) if masked else None
    rows = real_rows(x, mask)
    assert rows.shape == (GROUPS, 5 if masked else 10, 4)
    product = gram(rows)
    for index in range(GROUPS):
        kept = x[:, :, index].reshape(-1, 4)
        kept = kept[mask] if masked else kept
        assert torch.equal(rows[index], kept)
        torch.testing.assert_close(product[index], kept.T @ kept, rtol=1e-5, atol=1e-5)
        assert torch.equal(product[index], product[index].T)
