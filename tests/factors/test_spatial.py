"""The spatial form of a kernel against a slow oracle: costs, second filters, rounding, the shelf."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_lossless_lr.factors import (
    ShelvedFactorizations,
    damped,
    factorize_spatially,
    fill,
    loss_curve,
    rounding_costs,
    spatial_curve,
    spatial_matrix,
    spatial_metric,
)
from hf_lossless_lr.factors.factorize import Factorization, factorize
from hf_lossless_lr.factors.spatial import has_spatial_candidates
from hf_lossless_lr.formats import FORMATS
from hf_lossless_lr.layers import grid_of, layout_of, weight_matrices
from hf_lossless_lr.statistics import LayerStatistics, Shelf

pytestmark = pytest.mark.numerical


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


CASES = [
    ((6, 4, 3, 3), 1),
    ((4, 5, 3, 2), 1),
    ((8, 3, 2, 5), 2),
    ((5, 1, 7, 7), 1),
]  # (out, in of a group, kh, kw), groups
on_cases = pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
on_seeds = pytest.mark.parametrize("seed", [0, 1])
DAMPING = 0.03
RIDGE_SHARE = 5e-3  # by which a ridge of 1e-4 of each channel adds to a cost: a bias, not rounding


def problem(shape, groups, seed):
    """A convolution, and second moments of patches and of gradients as pictures have them: neighbours are alike."""
    out, inputs, kh, kw = shape
    torch.manual_seed(seed)
    dense = nn.Conv2d(inputs * groups, out * groups, (kh, kw), groups=groups)
    x = torch.randn(40, inputs * groups, kh + 4, kw + 4)
    x = x + x.roll(1, 2) + x.roll(1, 3)
    layout = layout_of(dense)
    rows = layout.input_rows(dense, x).flatten(0, 1).double().movedim(1, 0)
    A = rows.mT @ rows / rows.shape[1]
    g = torch.randn(groups, 3 * out, out, dtype=torch.float64)
    return dense, A, g.mT @ g / (3 * out)


def kernel_of(dense, factorization, rank):
    layer = layout_of(dense).factorized(dense, rank, "two-factor", "spatial").double()
    layer.load_factors(*factorization.truncate(rank))
    return layer.dense_weight().reshape(weight_matrices(dense).shape)


def cost(difference, A, B):
    return 0.5 * float(torch.einsum("gop,goi,gij,gpj->", B, difference, A, difference))


@on_cases
@on_seeds
def test_the_predicted_cost_is_that_of_the_kernel_at_every_rank(shape, groups, seed):
    dense, A, B = problem(shape, groups, seed)
    W = weight_matrices(dense).double()
    found = factorize_spatially(W, A, B, shape[2:], DAMPING)
    curve = spatial_curve(W, found, A, B)
    whole = cost(W, A, B)
    assert curve.second_order[0] == pytest.approx(whole)
    assert len(curve.second_order) == curve.break_even_rank + 1
    for rank in range(1, curve.break_even_rank + 1):
        expected = cost(kernel_of(dense, found, rank) - W, A, B)
        assert curve.second_order[rank] == pytest.approx(expected, abs=RIDGE_SHARE * whole)
        numbers = sum(p.numel() for n, p in layer_of(dense, rank).named_parameters() if n != "bias")
        assert curve.parameters(rank) == numbers < W.numel()
    assert (np.diff(curve.second_order) <= 1e-9 * whole).all()


def layer_of(dense, rank):
    return layout_of(dense).factorized(dense, rank, "two-factor", "spatial")


@on_cases
def test_no_other_second_filters_are_better(shape, groups):
    dense, A, B = problem(shape, groups, 3)
    W = weight_matrices(dense).double()
    found = factorize_spatially(W, A, B, shape[2:], DAMPING)
    down, up, _ = found.truncate(2)
    kw = shape[3]

    def cost_with(second):
        by_column = second.unflatten(-1, (2, kw))
        kernel = torch.einsum("gokw,gkp->gopw", by_column, down).flatten(2)
        return cost(kernel - W, A, B)

    best = cost_with(up)
    for seed in range(5):
        torch.manual_seed(seed)
        assert cost_with(up + 0.05 * up.std() * torch.randn_like(up)) > best


def test_the_metric_is_the_exact_one_where_patches_have_independent_rows_and_columns():
    """With `A = A_v ⊗ A_h` the spatial metric is exact, and so is the best first filter: no rank 1 is better."""
    dense, _, B = problem((6, 4, 3, 3), 1, 0)
    vertical, horizontal = (torch.randn(n, 3 * n, dtype=torch.float64) for n in (12, 3))
    vertical, horizontal = vertical @ vertical.T, horizontal @ horizontal.T
    A = torch.einsum("pq,ij->piqj", vertical, horizontal).reshape(1, 36, 36)
    W = weight_matrices(dense).double()
    found = spatial_metric(A, B, (3, 3))
    matrix = spatial_matrix(W, (3, 3))
    assert cost(matrix, *found) == pytest.approx(cost(W, A, B))
    curve = spatial_curve(W, factorize_spatially(W, A, B, (3, 3), 0.0), A, B)
    tails = np.linalg.svd(
        np.linalg.cholesky(found[1][0].numpy()).T @ matrix[0].numpy() @ np.linalg.cholesky(found[0][0].numpy()),
        compute_uv=False,
    )
    for rank in range(len(curve.second_order)):
        assert curve.second_order[rank] == pytest.approx(
            0.5 * (tails[rank:] ** 2).sum(), rel=RIDGE_SHARE, abs=1e-6 * curve.second_order[0]
        )


@pytest.mark.parametrize("number_format", ["int8", "int4"])
@pytest.mark.parametrize("groups", [1, 2])
def test_rounded_filters_lie_on_grids_and_cost_about_what_is_predicted(number_format, groups):
    dense, A, B = problem((16, 8, 3, 3), groups, 0)
    W, rank = weight_matrices(dense).double(), 8
    found = factorize_spatially(W, A, B, (3, 3), DAMPING)
    layer = layer_of(dense, rank)
    fill(layer, W, found, damped(A, DAMPING), number_format)
    for factor in (layer.down, layer.up):
        grid, matrix = grid_of(factor), factor.weight.reshape(len(factor.weight), -1)
        assert grid.kind == FORMATS[number_format]
        torch.testing.assert_close(grid.columns(matrix.shape[1]).nearest(matrix), matrix.float(), rtol=0, atol=1e-6)
    rounded = cost(layer.dense_weight().double().reshape(W.shape) - W, A, B)
    plain = cost(kernel_of(dense, found, rank) - W, A, B)
    seen = LayerStatistics(None, *spatial_metric(A, B, (3, 3)), 1, 1)
    predicted = rounding_costs(
        spatial_matrix(W, (3, 3)), Factorization(found.factors), seen, DAMPING, [number_format]
    )[number_format].by_rank[rank]
    assert 0 < rounded - plain < 4 * predicted
    assert rounded - plain > predicted / 8


def test_a_shelf_gives_back_what_it_got(tmp_path):
    dense, A, B = problem((6, 4, 3, 3), 2, 0)
    W, stats = weight_matrices(dense).double(), LayerStatistics(None, A, B, 1, 1)
    channel, spatial = factorize(W, stats, "kronecker", DAMPING), factorize_spatially(W, A, B, (3, 3), DAMPING)
    from dataclasses import replace

    curve = replace(loss_curve(W, channel, stats), others={"spatial": spatial_curve(W, spatial, A, B)})
    shelf = ShelvedFactorizations(Shelf(tmp_path), torch.device("cpu"))
    shelf.put("a", {"channel": channel, "spatial": spatial}, curve)
    found = shelf.take("a")
    np.testing.assert_array_equal(found.second_order, curve.second_order)
    np.testing.assert_array_equal(found.in_form("spatial").second_order, curve.in_form("spatial").second_order)
    assert found.in_form("spatial").width == 3
    for rank in (1, 3):
        for got, expected in zip(shelf["a"]["spatial"].truncate(rank)[:2], spatial.truncate(rank)[:2], strict=True):
            assert torch.equal(got, expected)


def test_kernels_whose_matrix_is_large_have_no_spatial_candidates():
    assert has_spatial_candidates((1, 512, 4608), (3, 3))
    assert not has_spatial_candidates((1, 768, 768), (16, 16))  # of a patch embedding: 12,288 rows
