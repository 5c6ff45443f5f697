"""Dense linear algebra, against slow float64 oracles. Products are compared, never singular vectors."""

import itertools
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from support.tolerances import ALMOST_NO_RIDGE, EXACT, FLOAT32, ITERATIVE, ROOT_OF_ROUNDING, ROUNDING

from hf_lossless_lr.errors import NumericalError
from hf_lossless_lr.factors.decomposition import MetricFactors, metric_svd
from hf_lossless_lr.factors.linalg import (
    FAINT,
    damped,
    damped_diagonal,
    pivoted_form,
    quadratic_tails,
    shifted_weight,
)
from hf_lossless_lr.statistics.rows import gram

pytestmark = pytest.mark.numerical

SHAPES = [(5, 9), (7, 7), (9, 5), (1, 4), (4, 1), (1, 1)]
SEEDS = [0, 1]
METRICS = ["identity", "fisher", "activation-diagonal", "activation", "kronecker"]

on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_seeds = pytest.mark.parametrize("seed", SEEDS)
on_metrics = pytest.mark.parametrize("metric", METRICS)


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(seed, size, samples=None):
    """A second moment; singular if there are fewer samples than features."""
    rows = random(seed + 500, samples or 3 * size, size) * torch.linspace(0.3, 2.0, size, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def sides(metric, shape, seed):
    """The metric `(A, B)` as `metric_svd` takes it, and as two full matrices."""
    out, in_ = shape
    A, B = covariance(seed, in_), covariance(seed + 1, out)
    eye_in, eye_out = torch.eye(in_).double(), torch.eye(out).double()
    return {
        "identity": ((None, None), (eye_in, eye_out)),
        "fisher": ((None, B.diagonal()), (eye_in, B.diagonal().diag())),
        "activation-diagonal": ((A.diagonal(), None), (A.diagonal().diag(), eye_out)),
        "activation": ((A, None), (A, eye_out)),
        "kronecker": ((A, B), (A, B)),
    }[metric]


def truncations(factors):
    """The approximations of rank 0 … m."""
    ranks = range(len(factors.singular_values) + 1)
    return [factors.left[:, :k] @ factors.right[:k] for k in ranks]


def squared_norm(change, A, B):
    """`tr(B D A Dᵀ)` by its definition, one entry at a time."""
    change, A, B = change.numpy(), A.numpy(), B.numpy()
    out, in_ = change.shape
    total = 0.0
    for i, j, p, q in itertools.product(range(out), range(out), range(in_), range(in_)):
        total += B[i, j] * change[j, p] * A[p, q] * change[i, q]
    return total


def oracle(weight, A, B):
    """Best approximations of every rank, and their squared errors, by a full SVD between roots from `sqrtm`."""
    P, Q = (np.atleast_2d(scipy.linalg.sqrtm(M.numpy())) for M in (B, A))
    U, S, Vt = np.linalg.svd(P @ weight.numpy() @ Q, full_matrices=False)
    best = [np.linalg.solve(P, (U[:, :k] * S[:k]) @ Vt[:k]) @ np.linalg.inv(Q) for k in range(len(S) + 1)]
    return [torch.from_numpy(W) for W in best], [float((S[k:] ** 2).sum()) for k in range(len(S) + 1)], S


# --- metric_svd -----------------------------------------------------------------------------------------------------


@on_metrics
@on_shapes
@on_seeds
def test_truncation_is_the_best_approximation_in_the_metric(metric, shape, seed):
    weight = random(seed, *shape)
    given, (A, B) = sides(metric, shape, seed)
    best, errors, _ = oracle(weight, A, B)
    for k, approximation in enumerate(truncations(metric_svd(weight, *given))):
        torch.testing.assert_close(approximation, best[k], rtol=ROUNDING, atol=ROUNDING * weight.norm().item())
        assert squared_norm(approximation - weight, A, B) == pytest.approx(errors[k], rel=ROUNDING, abs=ROUNDING)


@on_metrics
@on_seeds
def test_alternating_least_squares_finds_nothing_better(metric, seed):
    shape, rank = (5, 7), 2
    weight = random(seed, *shape)
    given, (A, B) = sides(metric, shape, seed)
    ours = squared_norm(truncations(metric_svd(weight, *given))[rank] - weight, A, B)
    left = random(seed + 9, 5, rank)
    for _ in range(400):
        right = torch.linalg.solve(left.T @ B @ left, left.T @ B @ weight)
        left = torch.linalg.solve(right @ A @ right.T, right @ A @ weight.T).T
    theirs = squared_norm(left @ right - weight, A, B)
    assert ours <= theirs * (1 + ROUNDING)
    assert theirs == pytest.approx(ours, rel=1e3 * ITERATIVE)  # the iteration has no other minimum


@on_metrics
@on_shapes
def test_full_rank_gives_the_weight_back(metric, shape):
    weight = random(3, *shape)
    factors = metric_svd(weight, *sides(metric, shape, 3)[0])
    torch.testing.assert_close(truncations(factors)[-1], weight, rtol=ROUNDING, atol=ROUNDING)


@on_metrics
@on_shapes
def test_singular_values_are_those_of_the_weight_between_the_roots(metric, shape):
    weight = random(4, *shape)
    given, (A, B) = sides(metric, shape, 4)
    found = metric_svd(weight, *given).singular_values
    expected = oracle(weight, A, B)[2]
    np.testing.assert_allclose(found.numpy(), expected, rtol=ROOT_OF_ROUNDING, atol=ROOT_OF_ROUNDING * expected[0])
    assert (found.diff() <= 0).all()


@on_metrics
@on_shapes
def test_half_the_squared_tail_of_singular_values_is_half_the_squared_metric_error(metric, shape):
    weight = random(5, *shape)
    given, (A, B) = sides(metric, shape, 5)
    factors = metric_svd(weight, *given)
    for k, approximation in enumerate(truncations(factors)):
        tail = 0.5 * float((factors.singular_values[k:] ** 2).sum())
        assert tail == pytest.approx(0.5 * squared_norm(approximation - weight, A, B), rel=ROUNDING, abs=ROUNDING)


@on_shapes
@on_seeds
@pytest.mark.parametrize("written_as", ["none", "ones", "eye"])
def test_an_identity_metric_is_the_plain_svd(shape, seed, written_as):
    weight = random(seed, *shape)
    write = {"none": lambda n: None, "ones": torch.ones, "eye": torch.eye}[written_as]
    factors = metric_svd(weight, write(shape[1]), write(shape[0]))
    U, S, Vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    np.testing.assert_allclose(factors.singular_values.numpy(), S, rtol=ROOT_OF_ROUNDING, atol=ROOT_OF_ROUNDING * S[0])
    for k, approximation in enumerate(truncations(factors)):
        np.testing.assert_allclose(approximation.numpy(), (U[:, :k] * S[:k]) @ Vt[:k], rtol=0, atol=ROUNDING * S[0])


@on_shapes
def test_a_vector_is_the_diagonal_matrix(shape):
    weight, (A, B) = random(6, *shape), sides("kronecker", shape, 6)[1]
    vectors = truncations(metric_svd(weight, A.diagonal(), B.diagonal()))
    matrices = truncations(metric_svd(weight, A.diagonal().diag(), B.diagonal().diag()))
    for one, other in zip(vectors, matrices, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING)


def test_a_diagonal_matrix_keeps_its_entries_of_largest_weighted_size():
    # Closed form: sizes after weighting are sqrt(b) * |w| * sqrt(a) = 3 * 4, 1 * 20, 2 * 1.
    weight = torch.diag(torch.tensor([4.0, 20.0, 1.0]))
    approximation = truncations(metric_svd(weight, torch.ones(3), torch.tensor([9.0, 1.0, 4.0])))
    for rank, kept in enumerate([[], [20.0], [20.0, 4.0], [20.0, 4.0, 1.0]]):
        expected = torch.tensor([value if value in kept else 0.0 for value in (4.0, 20.0, 1.0)]).double()
        torch.testing.assert_close(approximation[rank], expected.diag(), rtol=ROUNDING, atol=ROUNDING)


@on_metrics
@on_shapes
def test_lower_ranks_are_slices_of_higher_ones(metric, shape):
    """A truncation of rank k, factorized again in the same metric, has the same truncations below k."""
    weight = random(7, *shape)
    given, _ = sides(metric, shape, 7)
    first = truncations(metric_svd(weight, *given))
    for k in range(1, len(first)):
        again = truncations(metric_svd(first[k], *given))
        for j in range(k + 1):
            torch.testing.assert_close(again[j], first[j], rtol=0, atol=1e3 * ROUNDING)


@on_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float64(shape, dtype):
    weight, (A, B) = random(8, *shape).to(dtype), sides("kronecker", shape, 8)[1]
    narrow = metric_svd(weight, A.float(), B.float())
    wide = metric_svd(weight.double(), A.float().double(), B.float().double())
    for one, other in zip(narrow, wide, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


@on_shapes
def test_arguments_of_metric_svd_are_not_changed(shape):
    weight, (A, B) = random(9, *shape), sides("kronecker", shape, 9)[1]
    copies = [tensor.clone() for tensor in (weight, A, B)]
    metric_svd(weight, A, B)
    assert all(torch.equal(*pair) for pair in zip((weight, A, B), copies, strict=True))


# --- singular metrics -----------------------------------------------------------------------------------------------


def singular(kind, size, seed):
    if kind == "few tokens":
        return covariance(seed, size, samples=max(1, size // 2))
    if kind == "all zero":
        return torch.zeros(size, size).double()
    alive = (torch.arange(size) % 3 != 1).double()  # "dead": every third feature is never active
    return covariance(seed, size) * alive[:, None] * alive


def psd_root(matrix):
    values, vectors = np.linalg.eigh(matrix.numpy())
    return torch.from_numpy((vectors * np.sqrt(values.clip(0))) @ vectors.T)


@on_shapes
@pytest.mark.parametrize("kind", ["dead", "few tokens", "all zero"])
@pytest.mark.parametrize("where", ["A", "B", "both"])
def test_a_singular_metric_is_still_met_optimally(shape, kind, where):
    weight = random(10, *shape)
    out, in_ = shape
    A = singular(kind, in_, 10) if where != "B" else torch.eye(in_).double()
    B = singular(kind, out, 11) if where != "A" else torch.eye(out).double()
    factors = metric_svd(weight, A, B)
    assert all(torch.isfinite(factor).all() for factor in factors)
    P, Q = psd_root(B), psd_root(A)
    S = torch.linalg.svdvals(P @ weight @ Q)
    for k, approximation in enumerate(truncations(factors)):
        error = float((P @ (approximation - weight) @ Q).square().sum())
        assert error == pytest.approx(float((S[k:] ** 2).sum()), rel=ROUNDING, abs=ROUNDING)


@on_shapes
@pytest.mark.parametrize("kind", ["dead", "few tokens"])
def test_damping_makes_a_singular_metric_reproduce_the_weight(shape, kind):
    weight = random(12, *shape)
    A, B = damped(singular(kind, shape[1], 12), 0.03), damped(singular(kind, shape[0], 13), 0.03)
    torch.testing.assert_close(truncations(metric_svd(weight, A, B))[-1], weight, rtol=ROUNDING, atol=10 * ROUNDING)


@on_shapes
def test_statistics_that_are_all_zero_give_the_plain_svd_once_damped(shape):
    weight = random(14, *shape)
    A, B = (damped(torch.zeros(size, size), 0.03) for size in (shape[1], shape[0]))
    for one, other in zip(truncations(metric_svd(weight, A, B)), truncations(metric_svd(weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING)


@on_metrics
def test_a_zero_weight_has_zero_factors_products(metric):
    factors = metric_svd(torch.zeros(4, 6), *sides(metric, (4, 6), 0)[0])
    assert all((approximation == 0).all() for approximation in truncations(factors))


# --- damped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
def test_damping_adds_its_share_of_each_diagonal_entry(damping):
    matrix = torch.tensor([[1.0, 2.0], [2.0, 5.0]])
    expected = torch.tensor([[1.0 + damping, 2.0], [2.0, 5.0 * (1 + damping)]], dtype=torch.float64)
    torch.testing.assert_close(damped(matrix, damping), expected, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(damped_diagonal(matrix.diagonal(), damping), expected.diagonal(), rtol=ROUNDING, atol=0)


def test_damping_follows_a_rescaling_of_the_channels():
    matrix, scale = covariance(0, 5), torch.tensor([1e-9, 1.0, 1e6, 0.3, 2.0]).double()
    scales = scale[:, None] * scale
    torch.testing.assert_close(damped(scales * matrix, 0.03), scales * damped(matrix, 0.03), rtol=ROUNDING, atol=0)


def test_damping_bounds_the_condition_of_a_singular_matrix_with_unit_diagonal():
    matrix = singular("few tokens", 8, 0)
    scale = matrix.diagonal().rsqrt()
    matrix = damped(scale[:, None] * matrix * scale, 0.03)
    assert torch.linalg.cond(matrix) <= 8 / 0.03 + 1 + ROUNDING  # the largest eigenvalue is at most the trace


def test_a_channel_without_signal_gets_the_damping_of_the_smallest_other():
    matrix = torch.diag(torch.tensor([4.0, 0.0, 0.5]))
    expected = torch.diag(torch.tensor([4.0 * 1.1, 0.5 * 0.1, 0.5 * 1.1]).double())
    torch.testing.assert_close(damped(matrix, 0.1), expected, rtol=FLOAT32, atol=0)
    assert damped(matrix, 0.0)[1, 1] == 0


def test_a_matrix_without_signal_becomes_the_identity():
    assert torch.equal(damped(torch.zeros(3, 3), 0.03), torch.eye(3).double())
    assert torch.equal(damped_diagonal(torch.zeros(3), 0.03), torch.ones(3).double())


def test_damping_does_not_change_its_argument():
    matrix = torch.eye(3).double()
    damped(matrix, 0.5)
    assert torch.equal(matrix, torch.eye(3).double())


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("A", "B", "found"),
    [
        ((3, 3), None, "A is (3, 3)"),
        (None, (5, 5), "B is (5, 5)"),
        ((3,), None, "A is (3,)"),
        (None, (5,), "B is (5,)"),
        ((5, 3), None, "A is (5, 3)"),
        ((5, 1), None, "A is (5, 1)"),
        ((3, 3), (5, 5), "A is (3, 3)"),  # both swapped, as for a Conv1D whose weight was not transposed
    ],
)
def test_a_metric_of_the_wrong_shape_is_an_error_that_says_what_to_do(A, B, found):
    given = [None if shape is None else torch.ones(shape) for shape in (A, B)]
    text = f"metric_svd: W is (3, 5), so A must be (5, 5) and B (3, 3) (or their diagonals); {found}. For Conv1D pass"
    with pytest.raises(NumericalError, match=re.escape(text)):
        metric_svd(torch.ones(3, 5), *given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["A", "B", "W"])
def test_an_entry_that_is_not_finite_is_an_error_that_names_the_argument(name, bad):
    arguments = {"W": torch.ones(3, 5), "A": torch.eye(5), "B": torch.eye(3)}
    arguments[name][1, 2] = bad
    with pytest.raises(NumericalError, match=f"^metric_svd: {name} has entries that are not finite"):
        metric_svd(*arguments.values())


# --- quadratic_tails ------------------------------------------------------------------------------------------------


@on_metrics
@on_shapes
@on_seeds
def test_tail_is_the_quadratic_loss(metric, shape, seed):
    """For factors of any metric, in covariances that are not that metric."""
    weight = random(seed, *shape)
    factors = metric_svd(weight, *sides(metric, shape, seed)[0])
    A, B = covariance(seed + 30, shape[1]), covariance(seed + 31, shape[0])
    expected = [0.5 * squared_norm(W - weight, A, B) for W in truncations(factors)]
    tails = quadratic_tails(factors, A, B)
    np.testing.assert_allclose(tails.numpy(), expected, rtol=ROUNDING, atol=ROUNDING * expected[0])
    assert tails[-1] == 0


@on_shapes
def test_tail_of_factors_that_are_not_orthogonal_is_the_quadratic_loss(shape):
    out, in_ = shape
    rank = min(shape)
    factors = MetricFactors(random(1, out, rank), random(2, rank, in_), torch.ones(rank))
    A, B, weight = covariance(3, in_), covariance(4, out), factors.left @ factors.right
    expected = [0.5 * squared_norm(W - weight, A, B) for W in truncations(factors)]
    found = quadratic_tails(factors, A.float(), B.float())  # float32 statistics, float64 sums
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=FLOAT32, atol=FLOAT32 * expected[0])


@on_shapes
@on_seeds
def test_tails_of_the_kronecker_metric_are_half_the_tails_of_its_squared_singular_values(shape, seed):
    (A, B), _ = sides("kronecker", shape, seed)
    factors = metric_svd(random(seed, *shape), A, B)
    squares = factors.singular_values.square().flip(0).cumsum(0).flip(0)
    found = quadratic_tails(factors, A, B)
    torch.testing.assert_close(found[:-1], 0.5 * squares, rtol=ROUNDING, atol=ROUNDING * found[0].item())


@on_shapes
@on_seeds
def test_tails_of_the_kronecker_metric_never_rise_with_the_rank(shape, seed):
    (A, B), _ = sides("kronecker", shape, seed)
    assert (quadratic_tails(metric_svd(random(seed, *shape), A, B), A, B).diff() <= 0).all()


@pytest.mark.parametrize("kind", ["dead", "few tokens", "all zero"])
def test_tails_are_never_negative(kind):
    A, B = singular(kind, 6, 0), singular(kind, 8, 1)
    for metric in METRICS:
        assert (quadratic_tails(metric_svd(random(0, 8, 6), *sides(metric, (8, 6), 0)[0]), A, B) >= 0).all()


# --- pivoted_form ---------------------------------------------------------------------------------------------------

BOUND = 2.0


def swap_needed(rank):
    """Orthonormal columns on which pivoted QR alone leaves a coefficient above 2.

    Rows 0 … rank are a scaled Kahan matrix, whose columns QR takes in their given order although the last one should
    come first; many small rows behind them fill the columns up to an orthonormal set.
    """
    cosine, sine = 0.5, 0.75**0.5
    kahan = np.eye(rank, rank + 1) - cosine * np.triu(np.ones((rank, rank + 1)), 1)
    kahan = sine ** np.arange(rank)[:, None] * kahan * 0.99 ** np.arange(rank + 1)  # decreasing: no ties
    kahan *= 0.9 / np.linalg.norm(kahan, 2)
    values, vectors = np.linalg.eigh(np.eye(rank) - kahan @ kahan.T)
    filling = (vectors * np.sqrt(values)) @ vectors.T @ scipy.linalg.hadamard(512)[1 : rank + 1] / 512**0.5
    return torch.from_numpy(np.hstack([kahan, filling]).T.copy())


def kahan(size, angle=1.2):
    sine, cosine = np.sin(angle), np.cos(angle)
    return torch.from_numpy(
        sine ** np.arange(size)[:, None] * (np.eye(size) - cosine * np.triu(np.ones((size, size)), 1))
    )


def lefts():
    for (rows, rank), seed in itertools.product([(2, 1), (5, 3), (6, 5), (30, 12), (40, 39)], SEEDS):
        yield pytest.param(random(seed, rows, rank), id=f"random {rows}x{rank} {seed}")
    yield pytest.param(random(0, 20, 8) * torch.logspace(0, -12, 8).double(), id="decaying")
    yield pytest.param(random(0, 4, 3).repeat(3, 1), id="repeated rows")
    yield pytest.param(torch.cat([torch.zeros(5, 3).double(), random(0, 4, 3)]), id="zero rows first")
    yield pytest.param(random(0, 9, 2) @ random(1, 2, 4), id="rank deficient")
    yield pytest.param(torch.zeros(6, 3).double(), id="zero")
    yield pytest.param(kahan(20)[:, :12], id="kahan")
    yield pytest.param(kahan(20).T[:, :19].contiguous(), id="kahan transposed")
    yield pytest.param(torch.from_numpy(scipy.linalg.hilbert(16)[:, :8]), id="hilbert")
    for rank in (5, 6, 8):
        yield pytest.param(swap_needed(rank), id=f"swap needed {rank}")


on_lefts = pytest.mark.parametrize("left", list(lefts()))


@pytest.mark.parametrize("rank", [5, 6, 8])
def test_the_adversarial_matrix_defeats_pivoted_qr_alone(rank):
    """Guards the tests below: without swaps, a coefficient exceeds the bound."""
    basis = np.linalg.qr(swap_needed(rank).numpy())[0]
    order = scipy.linalg.qr(basis.T, mode="r", pivoting=True)[1]
    coefficients = np.linalg.solve(basis[order[:rank]].T, basis[order[rank:]].T)
    assert np.abs(coefficients).max() > BOUND


@on_lefts
def test_pivoted_form_is_the_same_map(left):
    right = random(99, left.shape[1], 7)
    form = pivoted_form(left, right)
    rebuilt = torch.cat([form.skeleton, form.coefficients @ form.skeleton])[form.permutation]
    scale = (left.norm() * right.norm()).item()
    torch.testing.assert_close(rebuilt, left @ right, rtol=0, atol=ROUNDING * scale)


@on_lefts
@pytest.mark.parametrize("bound", [BOUND, 1.01])
def test_coefficients_respect_the_bound(left, bound):
    form = pivoted_form(left, random(99, left.shape[1], 7), bound)
    assert form.coefficients.abs().max() <= bound


def test_the_bound_of_coefficients_is_2_unless_given():
    for rank in (5, 6, 8):  # pivoted QR alone leaves 2.4, 3.6 and 7.9
        assert pivoted_form(swap_needed(rank), torch.eye(rank).double()).coefficients.abs().max() <= 2


@on_lefts
def test_the_skeleton_is_rows_of_the_matrix_themselves(left):
    right = random(99, left.shape[1], 7)
    form = pivoted_form(left, right)
    rows, rank = left.shape
    assert torch.equal(form.permutation.sort().values, torch.arange(rows))
    position_of_pivot = [int((form.permutation == pivot).nonzero()) for pivot in range(rank)]
    atol = ROUNDING * (left.norm() * right.norm()).item()
    torch.testing.assert_close(form.skeleton, (left @ right)[position_of_pivot], rtol=0, atol=atol)


@pytest.mark.parametrize(("rows", "rank", "columns"), [(5, 3, 4), (9, 1, 2), (4, 3, 8)])
def test_pivoted_form_stores_rank_times_rank_numbers_less(rows, rank, columns):
    form = pivoted_form(random(0, rows, rank), random(1, rank, columns))
    assert form.skeleton.shape == (rank, columns)
    assert form.coefficients.shape == (rows - rank, rank)
    assert form.skeleton.numel() + form.coefficients.numel() == rank * (rows + columns) - rank**2


@pytest.mark.parametrize("rank", [4, 5])
def test_pivoted_form_needs_a_row_that_is_no_pivot(rank):
    text = f"^pivoted_form: the rank must be below the number of rows, got rank {rank}, rows 4"
    with pytest.raises(NumericalError, match=text):
        pivoted_form(torch.ones(4, rank), torch.ones(rank, 6))


@pytest.mark.parametrize("bound", [1.0, 0.5, float("nan")])
def test_a_bound_that_swaps_could_chase_for_ever_is_an_error(bound):
    with pytest.raises(NumericalError, match=f"the bound of the coefficients must be above 1, got {bound}"):
        pivoted_form(random(0, 4, 2), random(1, 2, 3), bound)


# --- gram -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 7, 8, 33, 130])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_gram_is_the_product_and_symmetric_bit_for_bit(rows, features):
    X = random(30, rows, features)
    result = gram(X)
    torch.testing.assert_close(result, X.T @ X, rtol=0, atol=ROUNDING)
    assert torch.equal(result.triu(), result.T.triu())
    assert gram(X.float()).dtype == torch.float32
    Y = covariance(31, rows) @ X if rows else X
    result = gram(X, Y)
    torch.testing.assert_close(result, X.T @ Y, rtol=ROUNDING, atol=ROUNDING * float(result.abs().max()))
    assert torch.equal(result.triu(), result.T.triu())


# --- shifted_weight -------------------------------------------------------------------------------------------------

ROWS = ["many", "dead", "few", "one"]

on_rows = pytest.mark.parametrize("kind", ROWS)


def shifted_rows(kind, size, seed):
    """Rows before and after a shift that moves, mixes and disturbs them."""
    count = {"many": 4 * size, "dead": 4 * size, "few": max(1, size // 2), "one": 1}[kind]
    before = random(seed + 70, count, size) + 0.5
    after = before @ (torch.eye(size).double() + 0.3 * random(seed + 71, size, size)) + 0.2
    after += 0.3 * random(seed + 72, count, size)
    if kind == "dead":  # every third feature is never active
        alive = torch.arange(size) % 3 != 1
        before, after = before * alive, after * alive
    return before, after


def fitted(weight, before, after, ridge):
    """`shifted_weight` as it is used: from products per row."""
    return shifted_weight(weight, weight @ before.T @ after / len(before), after.T @ after / len(before), ridge)


def channel_sizes(weight, after):
    """The moments that the ridge is relative to: of each channel, and a share of what it would take to add as much to
    the outputs as the others do."""
    moments, squares = after.square().mean(0), weight.square().sum(0)
    return moments + FAINT * (moments * squares).mean() / squares


@on_rows
@on_shapes
@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_shifted_weight_is_the_ridge_regression_of_the_outputs(kind, shape, ridge):
    weight, (before, after) = random(20, *shape), shifted_rows(kind, shape[1], 20)
    levels = torch.sqrt(ridge * len(after) * channel_sizes(weight, after))
    levels = torch.where(levels > 0, levels, 1.0).numpy()  # without any signal there is no other weight
    design = np.vstack([after.numpy(), np.diag(levels)])
    outputs = np.vstack([(before @ weight.T).numpy(), levels[:, None] * weight.T.numpy()])
    expected = np.linalg.lstsq(design, outputs, rcond=None)[0].T
    np.testing.assert_allclose(fitted(weight, before, after, ridge), expected, rtol=0, atol=10 * ROUNDING)


@on_shapes
def test_shifted_weight_undoes_a_linear_shift(shape):
    """Closed form: where `X' = M X`, the outputs `W X` are those of `W M⁻¹`."""
    weight, before = random(21, *shape), random(22, 4 * shape[1], shape[1])
    shift = torch.eye(shape[1]).double() + 0.5 * random(23, shape[1], shape[1]).triu(1)
    found = fitted(weight, before, before @ shift.T, 1e-13)
    torch.testing.assert_close(found, weight @ torch.linalg.inv(shift), rtol=0, atol=ALMOST_NO_RIDGE)


@on_rows
@on_shapes
def test_shifted_weight_of_inputs_that_did_not_shift_is_the_weight(kind, shape):
    weight, (before, _) = random(24, *shape), shifted_rows(kind, shape[1], 24)
    torch.testing.assert_close(fitted(weight, before, before, 1e-2), weight, rtol=0, atol=ROUNDING)


@on_shapes
def test_shifted_weight_without_any_signal_is_the_weight(shape):
    weight, zero = random(25, *shape), torch.zeros(shape[1], shape[1])
    found = shifted_weight(weight.float(), torch.zeros(shape), zero, 1e-2)
    torch.testing.assert_close(found, weight.float().double(), rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("kind", ["dead", "few", "one"])
@on_shapes
def test_shifted_weight_is_the_weight_where_the_inputs_say_nothing(kind, shape):
    weight, (before, after) = random(26, *shape), shifted_rows(kind, shape[1], 26)
    null = torch.from_numpy(scipy.linalg.null_space(after.numpy()))  # shape: (in, directions)
    sizes = channel_sizes(weight, after)  # the ridge measures distances by them
    silent = torch.where(sizes > 0, sizes, 1.0)[:, None] * null
    silent /= silent.norm(dim=0)
    assert silent.shape[1] > 0 or shape[1] == 1
    found = fitted(weight, before, after, 1e-2)
    torch.testing.assert_close(found @ silent, weight @ silent, rtol=0, atol=ROUNDING)
    assert (found - weight).abs().max() > 1e-3  # elsewhere it moves


@on_rows
@on_shapes
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_shifted_weight_is_never_worse_than_the_weight_on_its_inputs(kind, shape, ridge):
    weight, (before, after) = random(27, *shape), shifted_rows(kind, shape[1], 27)
    outputs = before @ weight.T
    errors = [(outputs - after @ W.T).square().sum() for W in (fitted(weight, before, after, ridge), weight)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("shape", [(5, 9), (7, 7), (9, 5), (1, 4)], ids=str)
@on_seeds
def test_shifted_weight_keeps_the_column_of_a_channel_that_was_hardly_ever_active(shape, seed):
    """A unit that was active in one row, and faintly, would get a weight that other inputs make an explosion of."""
    weight, (before, after) = random(35 + seed, *shape), shifted_rows("many", shape[1], 35 + seed)
    before[:, 0] = after[:, 0] = 0.0
    quiet = fitted(weight, before, after, 0.2)
    before[0, 0], after[0, 0] = 1e-3, 1e-4
    found = fitted(weight, before, after, 0.2)
    torch.testing.assert_close(found[:, 0], weight[:, 0], rtol=0, atol=0.1)
    torch.testing.assert_close(found[:, 1:], quiet[:, 1:], rtol=0, atol=1e-3)


@on_shapes
@pytest.mark.parametrize("value", [0.0, 1e-200])  # the square of the latter is zero, too
@pytest.mark.parametrize("pruned", ["one", "all"])
def test_shifted_weight_keeps_columns_that_are_zero(shape, pruned, value):
    weight, (before, after) = random(36, *shape), shifted_rows("many", shape[1], 36)
    columns = slice(None) if pruned == "all" else slice(1)
    weight[:, columns] = value
    found = fitted(weight, before, after, 0.1)
    torch.testing.assert_close(found[:, columns], weight[:, columns], rtol=0, atol=ROUNDING)
    assert shape[1] == 1 or pruned == "all" or (found - weight).abs().max() > 1e-3


def test_the_ridge_leads_from_the_best_fit_to_the_weight():
    weight, (before, after) = random(28, 5, 7), shifted_rows("many", 7, 28)
    found = [fitted(weight, before, after, ridge) for ridge in (1e-9, 1e-3, 1e-1, 10.0, 1e9)]
    errors = [float((before @ weight.T - after @ W.T).square().sum()) for W in found]
    distances = [float((W - weight).norm()) for W in found]
    assert errors == sorted(errors)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < ROOT_OF_ROUNDING


@pytest.mark.parametrize("kind", ROWS)
def test_shifted_weight_follows_a_rescaling_of_the_channels(kind):
    weight, (before, after) = random(29, 5, 7), shifted_rows(kind, 7, 29)
    scale = torch.tensor([1e-9, 1e6, 1.0, 0.3, 1e3, 2.0, 1e-3]).double()
    found = fitted(weight / scale, scale * before, scale * after, 1e-2)
    torch.testing.assert_close(found * scale, fitted(weight, before, after, 1e-2), rtol=0, atol=ROUNDING)


@on_shapes
def test_truncations_follow_a_rescaling_of_the_channels(shape):
    """Inputs and outputs in other units, from 1e-6 to 1e6: the same layer in those units."""
    weight, A, B = random(32, *shape), damped(covariance(32, shape[1]), 0.03), damped(covariance(33, shape[0]), 0.03)
    rows, columns = (torch.logspace(-6, 6, size).double() for size in shape)
    factors = metric_svd(rows[:, None] * weight / columns, columns[:, None] * A * columns, B / rows[:, None] / rows)
    plain = metric_svd(weight, A, B)
    torch.testing.assert_close(factors.singular_values, plain.singular_values, rtol=ROUNDING, atol=ROUNDING)
    for one, other in zip(truncations(factors), truncations(plain), strict=True):
        torch.testing.assert_close(one * columns / rows[:, None], other, rtol=0, atol=100 * ROUNDING)


def test_shifted_weight_of_narrow_dtypes_is_computed_in_float64():
    (before, after), weight = shifted_rows("many", 6, 30), random(30, 4, 6).bfloat16()
    cross, inputs = (weight.double() @ before.T @ after).float(), (after.T @ after).float()
    found = shifted_weight(weight, cross, inputs, 1e-2)
    assert found.dtype == torch.float64
    assert torch.equal(found, shifted_weight(weight.double(), cross.double(), inputs.double(), 1e-2))


@on_rows
@on_shapes
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_large_well_conditioned_systems_are_solved_in_float32(kind, shape, ridge, monkeypatch):
    """The error is that of float32 where inputs vary, and what no row could tell apart stays at the weight."""
    weight, (before, after) = random(33, *shape), shifted_rows(kind, shape[1], 33)
    exact = fitted(weight, before, after, ridge)
    monkeypatch.setattr("hf_lossless_lr.statistics.rows.LARGE", 1)
    found = fitted(weight, before, after, ridge)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.float().double())
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(after @ found.T, after @ exact.T, rtol=0, atol=1e-4)


@on_shapes
def test_large_ill_conditioned_systems_are_solved_in_float64(shape, monkeypatch):
    weight, (before, after) = random(34, *shape), shifted_rows("few", shape[1], 34)
    exact = fitted(weight, before, after, 1e-6)
    monkeypatch.setattr("hf_lossless_lr.statistics.rows.LARGE", 1)
    assert torch.equal(fitted(weight, before, after, 1e-6), exact)


def test_arguments_of_shifted_weight_are_not_changed():
    before, after = shifted_rows("many", 6, 31)
    arguments = (random(31, 4, 6), random(31, 4, 6) @ before.T @ after, after.T @ after)
    copies = [tensor.clone() for tensor in arguments]
    found = shifted_weight(*arguments, 1e-2)
    found.zero_()
    assert all(torch.equal(*pair) for pair in zip(arguments, copies, strict=True))
