"""From weight and statistics to factors and a loss curve, against brute force in float64."""

import itertools
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from support.tolerances import EXACT, FLOAT32, ROUNDING

from hf_lossless_lr.errors import ConfigurationError, NumericalError
from hf_lossless_lr.factors.factorize import factorize, loss_curve
from hf_lossless_lr.factors.metrics import METRICS
from hf_lossless_lr.layers.storage import STORAGES, choose_storage, factorized_parameters
from hf_lossless_lr.statistics.records import LayerStatistics

pytestmark = pytest.mark.numerical

SHAPES = [(5, 9), (7, 7), (9, 5), (2, 6), (6, 2)]
SEEDS = [0, 1]
DAMPING = 0.5  # far more than anyone uses, so that leaving it out shows

on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_seeds = pytest.mark.parametrize("seed", SEEDS)
on_metrics = pytest.mark.parametrize("metric", METRICS)
on_storages = pytest.mark.parametrize("storage", STORAGES)


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def statistics(shape, seed=0, units=50):
    def second_moment(size, offset):
        rows = random(seed + offset, 3 * size, size) * torch.linspace(0.3, 2.0, size, dtype=torch.float64)
        return rows.T @ rows / len(rows)

    out, in_ = shape
    return LayerStatistics(random(seed + 7, out, in_), second_moment(in_, 8), second_moment(out, 9), 5 * units, units)


def case(shape, metric="kronecker", seed=0, damping=DAMPING, **options):
    """A weight, its statistics and its factorization."""
    weight, stats = random(seed, *shape), statistics(shape, seed, **options)
    return weight, stats, factorize(weight, stats, metric, damping)


def rebuilt(tensors, pivot_inputs=False):
    """The matrix that `FactorTensors` stand for."""
    product = tensors.up @ tensors.down
    if tensors.permutation is not None and pivot_inputs:
        matrix = torch.empty(tensors.up.shape[0], len(tensors.permutation)).double()
        matrix[:, tensors.permutation] = torch.cat([tensors.up, product], dim=1)
        return matrix
    return product if tensors.permutation is None else torch.cat([tensors.down, product])[tensors.permutation]


# --- factorize ------------------------------------------------------------------------------------------------------


def metric_by_hand(metric, stats):
    """The metric (A, B) of the table in the docstring as numpy matrices, with the damping written out."""
    A, B = stats.input_covariance.numpy(), stats.grad_covariance.numpy()
    I_in, I_out = np.eye(len(A)), np.eye(len(B))
    A_damped = A + DAMPING * A * I_in
    B_damped = B + DAMPING * B * I_out
    return {
        "identity": (I_in, I_out),
        "fisher": (I_in, B_damped * I_out),
        "activation-diagonal": (A_damped * I_in, I_out),
        "activation": (A_damped, I_out),
        "kronecker": (A_damped, B_damped),
    }[metric]


@on_metrics
@on_shapes
@on_seeds
def test_weight_is_the_best_approximation_in_the_damped_metric(metric, shape, seed):
    weight, stats, factorization = case(shape, metric, seed)
    Q, P = (scipy.linalg.sqrtm(side) for side in metric_by_hand(metric, stats))
    U, S, Vt = np.linalg.svd(P @ weight.numpy() @ Q, full_matrices=False)
    for k in range(min(shape) + 1):
        best = np.linalg.inv(P) @ (U[:, :k] * S[:k]) @ Vt[:k] @ np.linalg.inv(Q)
        np.testing.assert_allclose(factorization.weight(k).numpy(), best, rtol=0, atol=ROUNDING * S[0])


def test_the_metrics_are_those_of_the_config():
    assert set(METRICS) == set(METRICS)


@on_shapes
def test_metrics_differ(shape):
    """Otherwise a test of one would pass for another."""
    weights = [case(shape, metric)[2].weight(1) for metric in METRICS]
    for one, other in itertools.combinations(weights, 2):
        assert (one - other).norm() > 1e-3 * one.norm()


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones():
    text = "metric: 'euclid' is unknown; choose one of kronecker, activation, activation-diagonal, fisher, identity."
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        factorize(torch.ones(2, 3), statistics((2, 3)), "euclid", DAMPING)


@pytest.mark.parametrize("name", ["input_covariance", "grad_covariance"])
def test_statistics_that_are_not_finite_are_an_error(name):
    stats = statistics((2, 3))
    getattr(stats, name)[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"^metric_svd: [AB] has entries that are not finite"):
        factorize(torch.ones(2, 3), stats, "kronecker", DAMPING)


def test_a_weight_that_is_not_finite_is_an_error():
    with pytest.raises(NumericalError, match=r"^metric_svd: W has entries that are not finite"):
        factorize(torch.full((2, 3), float("nan")), statistics((2, 3)), "kronecker", DAMPING)


def test_a_product_that_overflows_is_an_error():
    with pytest.raises((NumericalError, torch.linalg.LinAlgError), match=r"not finite|non-finite|converge"):
        factorize(torch.full((2, 3), 1e300, dtype=torch.float64), statistics((2, 3)), "identity", DAMPING)


def test_statistics_of_another_shape_are_an_error():
    with pytest.raises(NumericalError, match=re.escape("W is (3, 2), so A must be (2, 2) and B (3, 3)")):
        factorize(torch.ones(3, 2), statistics((2, 3)), "kronecker", DAMPING)


# --- truncate -------------------------------------------------------------------------------------------------------


on_pivots = pytest.mark.parametrize("pivot_inputs", [False, True], ids=["rows", "columns"])


@on_storages
@on_pivots
@on_metrics
@on_shapes
def test_truncate_gives_the_weight_of_the_rank(storage, pivot_inputs, metric, shape):
    weight, _, factorization = case(shape, metric)
    for rank in range(1, min(shape) + (storage == "two-factor")):
        found = rebuilt(factorization.truncate(rank, storage, pivot_inputs), pivot_inputs)
        torch.testing.assert_close(found, factorization.weight(rank), rtol=0, atol=ROUNDING * weight.norm().item())


@on_storages
@on_pivots
@on_shapes
def test_truncate_returns_the_numbers_that_the_curve_counts(storage, pivot_inputs, shape):
    factorization = case(shape)[2]
    for rank in range(1, min(shape)):
        tensors = factorization.truncate(rank, storage, pivot_inputs)
        assert tensors.down.numel() + tensors.up.numel() == factorized_parameters(*shape, rank, storage)
        assert len(tensors.down) == tensors.up.shape[1] == rank
        assert (tensors.permutation is None) == (storage == "two-factor")


@on_shapes
def test_two_factors_share_the_size_of_each_component_equally(shape):
    stats = statistics(shape)
    stats.grad_covariance.mul_(1e-12)  # output gradients of a trained model are that small
    tensors = factorize(random(0, *shape), stats, "kronecker", DAMPING).truncate(min(shape), "two-factor")
    torch.testing.assert_close(tensors.up.norm(dim=0), tensors.down.norm(dim=1), rtol=ROUNDING, atol=0)


@on_storages
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_survive_a_narrow_dtype_whatever_the_scale_of_the_gradients(storage, dtype):
    stats = statistics((8, 6))
    stats.grad_covariance.mul_(1e-16)
    factorization = factorize(random(0, 8, 6), stats, "kronecker", DAMPING)
    down, up, permutation = factorization.truncate(4, storage)
    narrow = rebuilt(type(factorization.truncate(4, storage))(down.to(dtype), up.to(dtype), permutation)).double()
    exact = factorization.weight(4)
    assert (narrow - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


@on_storages
@on_metrics
@pytest.mark.parametrize("zero", ["weight", "a row", "a column", "all but one row"])
@pytest.mark.parametrize("shape", [(6, 8), (8, 6)], ids=str)
def test_truncate_of_a_weight_with_zeros_is_finite_and_exact(storage, metric, zero, shape):
    weight, stats = random(0, *shape), statistics(shape)
    stats.grad_covariance.mul_(1e-6)
    stats.input_covariance.mul_(1e-6)
    {"weight": weight, "a row": weight[1], "a column": weight[:, 1], "all but one row": weight[1:]}[zero].zero_()
    factorization = factorize(weight, stats, metric, DAMPING)
    for rank in range(1, min(shape)):
        tensors = factorization.truncate(rank, storage)
        assert torch.isfinite(tensors.up).all()
        assert torch.isfinite(tensors.down).all()
        torch.testing.assert_close(rebuilt(tensors), factorization.weight(rank), rtol=0, atol=ROUNDING)


# --- loss_curve -----------------------------------------------------------------------------------------------------


@on_metrics
@on_shapes
@on_seeds
def test_first_order_term_is_the_inner_product_of_gradient_and_change(metric, shape, seed):
    weight, stats, factorization = case(shape, metric, seed)
    found = loss_curve(weight, factorization, stats).first_order
    for k in range(min(shape) + 1):
        change = factorization.weight(k) - weight
        expected = sum(float(stats.weight_grad[i, j] * change[i, j]) for i in range(shape[0]) for j in range(shape[1]))
        assert found[k] == pytest.approx(expected, rel=ROUNDING, abs=10 * ROUNDING)


@on_metrics
@on_shapes
@on_seeds
def test_second_order_term_is_half_the_quadratic_form_of_the_undamped_statistics(metric, shape, seed):
    weight, stats, factorization = case(shape, metric, seed)
    found = loss_curve(weight, factorization, stats).second_order
    for k in range(min(shape) + 1):
        D = factorization.weight(k) - weight
        expected = 0.5 * float(torch.trace(stats.grad_covariance @ D @ stats.input_covariance @ D.T))
        assert found[k] == pytest.approx(expected, rel=ROUNDING, abs=10 * ROUNDING)


@on_metrics
def test_the_curve_of_a_quadratic_loss_is_exact(metric):
    shape = (5, 7)
    weight, stats, factorization = case(shape, metric)
    stats = LayerStatistics(
        torch.zeros(shape).double(), stats.input_covariance, stats.grad_covariance, stats.tokens, stats.units
    )
    offset = random(20, *shape)

    def loss(W):
        shift = W - weight + offset
        return 0.5 * torch.trace(stats.grad_covariance @ shift @ stats.input_covariance @ shift.T)

    parameter = weight.clone().requires_grad_()
    stats.weight_grad.copy_(torch.autograd.grad(loss(parameter), parameter)[0])
    curve = loss_curve(weight, factorization, stats)
    expected = [float(loss(factorization.weight(k)) - loss(weight)) for k in range(min(shape) + 1)]
    np.testing.assert_allclose(curve.first_order + curve.second_order, expected, rtol=ROUNDING, atol=10 * ROUNDING)


@on_metrics
@on_shapes
def test_max_noise_is_the_largest_entry_of_the_change(metric, shape):
    weight, stats, factorization = case(shape, metric)
    found = loss_curve(weight, factorization, stats, with_noise=True).max_noise
    for k in range(min(shape) + 1):
        change = (factorization.weight(k) - weight).numpy()
        expected = max(abs(float(entry)) for entry in change.flatten())
        assert found[k] == pytest.approx(expected, rel=ROUNDING, abs=10 * ROUNDING)
    assert found[0] == float(weight.abs().max())


def test_max_noise_is_left_out_unless_asked_for():
    weight, stats, factorization = case((4, 3))
    assert loss_curve(weight, factorization, stats).max_noise is None


@on_metrics
@on_shapes
def test_a_curve_ends_at_zero_and_has_a_value_for_every_rank(metric, shape):
    weight, stats, factorization = case(shape, metric)
    curve = loss_curve(weight, factorization, stats)
    assert len(curve.first_order) == len(curve.second_order) == min(shape) + 1
    assert curve.first_order[-1] == curve.second_order[-1] == 0


@on_shapes
def test_a_kronecker_curve_without_damping_never_rises_with_the_rank(shape):
    weight, stats, factorization = case(shape, damping=0.0)
    assert (np.diff(loss_curve(weight, factorization, stats).second_order) <= 0).all()


@on_metrics
@on_shapes
def test_no_metric_predicts_less_than_the_undamped_kronecker_one(metric, shape):
    weight, stats, factorization = case(shape, metric)
    best = loss_curve(weight, factorize(weight, stats, "kronecker", 0.0), stats).second_order
    assert (loss_curve(weight, factorization, stats).second_order >= best - 10 * ROUNDING).all()


@pytest.mark.parametrize("storage", ["auto", *STORAGES])
def test_a_curve_counts_what_each_rank_will_store(storage):
    weight, stats, factorization = case((40, 60))
    curve = loss_curve(weight, factorization, stats, storage=storage)
    assert (curve.out_features, curve.in_features, curve.storage) == (40, 60, storage)
    for rank in range(1, 40):
        stored = choose_storage(40, 60, rank, storage)
        assert curve.parameters(rank) == factorized_parameters(40, 60, rank, stored)


@on_shapes
def test_a_narrow_weight_gets_a_float64_curve(shape):
    weight, stats, _ = case(shape)
    narrow = loss_curve(weight.float(), factorize(weight.float(), stats, "kronecker", DAMPING), stats, with_noise=True)
    wide = loss_curve(weight, factorize(weight, stats, "kronecker", DAMPING), stats, with_noise=True)
    for name in ("first_order", "second_order", "max_noise"):
        assert getattr(narrow, name).dtype == np.float64
        np.testing.assert_allclose(getattr(narrow, name), getattr(wide, name), rtol=FLOAT32, atol=10 * FLOAT32)


@on_metrics
def test_the_same_input_gives_the_same_numbers(metric):
    first, second = (case((9, 5), metric)[2] for _ in range(2))
    for one, other in zip(first.factors, second.factors, strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


def test_arguments_are_not_changed():
    weight, stats, factorization = case((5, 4))
    before = [t.clone() for t in (weight, stats.weight_grad, stats.input_covariance, stats.grad_covariance)]
    loss_curve(weight, factorization, stats, with_noise=True)
    for storage in STORAGES:
        factorization.truncate(2, storage)
    after = (weight, stats.weight_grad, stats.input_covariance, stats.grad_covariance)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert torch.equal(case((5, 4))[2].weight(4), factorization.weight(4))
