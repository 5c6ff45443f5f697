"""Fewer dimensions between values and output, against attention computed with the layers themselves, in float64."""

from dataclasses import replace

import pytest
import torch

from hf_lossless_lr.factors import DenseLayer, dimension_counts, fewer_dimensions
from hf_lossless_lr.statistics import LayerStatistics

pytestmark = pytest.mark.numerical

HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]
SIZE, FEATURES, TOKENS = 4, 10, 60
on_heads = pytest.mark.parametrize("heads", HEADS)


class Attention:
    """Layers of random numbers, the contexts between them, and the statistics of both; attention has any weights."""

    def __init__(self, heads, seed):
        draw = torch.Generator().manual_seed(seed)
        queries, keys = self.heads = heads
        rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
        self.W_v, self.W_o = rand(keys * SIZE, FEATURES), rand(FEATURES, queries * SIZE)
        self.x, self.weights = rand(TOKENS, FEATURES), rand(queries, TOKENS, TOKENS).softmax(-1)
        g_o, g_v = rand(3 * FEATURES, FEATURES), rand(3 * FEATURES, keys * SIZE)
        contexts = self.contexts(self.x @ self.W_v.T, [SIZE] * keys)
        self.values = DenseLayer(self.W_v[None], self.statistics(self.x, g_v))
        self.output = DenseLayer(self.W_o[None], self.statistics(contexts, g_o))

    @staticmethod
    def statistics(rows, gradients):
        return LayerStatistics(None, (rows.T @ rows / len(rows))[None], (gradients.T @ gradients)[None], len(rows), 1)

    def contexts(self, values, sizes):
        """What the output projection receives, where the heads of the values have so many dimensions."""
        queries, keys = self.heads
        heads = [head for head in values.split(sizes, dim=-1) for _ in range(queries // keys)]
        return torch.cat([w @ head for w, head in zip(self.weights, heads, strict=True)], dim=-1)

    def fewer(self, count, damping=1e-9):
        return fewer_dimensions(self.values, self.output, self.heads, count, damping)

    def sizes(self, places):
        return [int((places // SIZE == head).sum()) for head in range(self.heads[1])]


def moments_of(layer):
    return layer.statistics.input_covariance, layer.statistics.grad_covariance


def definite(moments):
    """Moments with as much of each channel more as rounding may have taken away."""
    return moments + len(moments) * torch.finfo(torch.float32).eps * moments.diagonal().diag()


def blocks(dense, values):
    """What is kept of the contexts of each head that has queries: a matrix each."""
    kept, (queries, keys) = dense.sizes(values.places), dense.heads
    for head, rows in enumerate(torch.split(values.rows, kept)):
        for _ in range(queries // keys):
            yield rows[:, head * SIZE : (head + 1) * SIZE]


@on_heads
def test_all_dimensions_are_the_same_attention(heads):
    dense = Attention(heads, 0)
    values, output, cost = dense.fewer(len(dense.W_v))
    assert cost == pytest.approx(0.0, abs=1e-12)
    contexts = dense.contexts(dense.x @ values.weight[0].T, [SIZE] * heads[1])
    expected = dense.contexts(dense.x @ dense.W_v.T, [SIZE] * heads[1]) @ dense.W_o.T
    torch.testing.assert_close(contexts @ output.weight[0].T, expected)


@on_heads
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_the_cost_is_that_of_the_outputs_and_no_other_output_projection_costs_less(heads, share):
    dense = Attention(heads, 1)
    count = round(share * len(dense.W_v))
    values, output, cost = dense.fewer(count)
    assert values.weight.shape == (1, count, FEATURES)
    contexts = dense.contexts(dense.x @ values.weight[0].T, dense.sizes(values.places))
    expected = dense.contexts(dense.x @ dense.W_v.T, [SIZE] * heads[1]) @ dense.W_o.T
    A, B = (definite(each[0]) for each in moments_of(dense.output))

    def cost_of(weight):
        rows = torch.block_diag(*blocks(dense, values))
        change = weight @ rows - dense.W_o
        return 0.5 * float(((change @ A @ change.T) * B).sum())

    errors = contexts @ output.weight[0].T - expected
    heard = 0.5 * float((errors @ moments_of(dense.output)[1][0] * errors).sum() / TOKENS)
    assert cost == pytest.approx(heard, rel=1e-3)
    assert cost == pytest.approx(cost_of(output.weight[0]), rel=1e-6)
    for seed in range(3):
        change = torch.randn(output.weight[0].shape, generator=torch.Generator().manual_seed(seed)).double()
        assert cost_of(output.weight[0] + 0.01 * change) > cost


@on_heads
def test_the_statistics_are_those_of_the_new_layers(heads):
    dense = Attention(heads, 2)
    values, output, _ = dense.fewer(max(heads[1], len(dense.W_v) // 2))
    contexts = dense.contexts(dense.x @ values.weight[0].T, dense.sizes(values.places))
    noise = 4 * len(dense.W_o[0]) * torch.finfo(torch.float32).eps  # which is added: float32 would leave it there
    expected = contexts.T @ contexts / TOKENS
    torch.testing.assert_close(output.statistics.input_covariance[0], expected, rtol=noise, atol=noise)
    assert values.statistics.input_covariance is dense.values.statistics.input_covariance
    assert output.statistics.grad_covariance is dense.output.statistics.grad_covariance
    old = torch.zeros(len(dense.W_v), dtype=torch.float64)
    old[values.places] = 1.0
    torch.testing.assert_close(values.rows @ torch.linalg.pinv(values.rows), torch.eye(len(values.rows)).double())
    assert values.statistics.grad_covariance.shape[-1] == len(values.places)


def test_a_change_of_new_values_is_heard_as_the_same_change_of_old_ones():
    """With all dimensions: `P D` in the new metric costs what `D` costs in the old one."""
    dense = Attention((4, 2), 3)
    values, _, _ = dense.fewer(len(dense.W_v))
    change = torch.randn(dense.W_v.shape, generator=torch.Generator().manual_seed(4)).double()
    new, old = values.statistics.grad_covariance[0], dense.values.statistics.grad_covariance[0]
    turned = values.rows @ change
    torch.testing.assert_close((turned * (new @ turned)).sum(), (change * (old @ change)).sum())


def test_a_refit_sees_the_products_of_the_new_layers():
    dense = Attention((4, 2), 5)
    values, output, _ = dense.fewer(5)
    cross, moments = torch.randn(1, len(dense.W_v), FEATURES).double(), torch.randn(1, FEATURES, FEATURES).double()
    seen, same = values.seen(cross, moments)
    torch.testing.assert_close(seen[0], values.rows @ cross[0])
    assert same is moments
    rows = torch.zeros(7, 4 * SIZE).double()
    rows[:, output.places] = torch.randn(7, len(output.places)).double()
    cross, moments = output.seen((rows[:, :FEATURES].T @ rows)[None], (rows.T @ rows)[None])
    used = rows[:, output.places]
    torch.testing.assert_close(cross[0], rows[:, :FEATURES].T @ used)
    torch.testing.assert_close(moments[0], used.T @ used)


@on_heads
def test_moments_of_float32_stay_moments_where_contexts_hardly_change(heads):
    """Their small directions are rounding errors, which the new layers see enlarged."""
    dense = Attention(heads, 7)
    contexts = 1 + 1e-4 * torch.randn(TOKENS, len(dense.W_o[0]), generator=torch.Generator().manual_seed(8))
    moments = (contexts.T @ contexts / TOKENS)[None]
    dense.output = DenseLayer(dense.output.weight, replace(dense.output.statistics, input_covariance=moments))
    _, output, _ = dense.fewer(len(dense.W_v), damping=1e-3)
    A = output.statistics.input_covariance[0].double()
    scale = A.diagonal().rsqrt()
    assert torch.linalg.eigvalsh(scale[:, None] * A * scale).min() > 0


@on_heads
def test_a_large_constant_that_nobody_hears_stays(heads):
    """Behind a layer norm, nothing is heard along what all outputs have in common; float32 knows that to rounding."""
    dense = Attention(heads, 9)
    constant = 1e3 * torch.randn(heads[1], SIZE, generator=torch.Generator().manual_seed(10)).double()
    constant = constant.repeat_interleave(heads[0] // heads[1], dim=0).flatten()
    along = dense.W_o @ constant
    contexts = 1e-3 * dense.contexts(dense.x @ dense.W_v.T, [SIZE] * heads[1]) + constant
    gradients = torch.randn(3 * FEATURES, FEATURES, generator=torch.Generator().manual_seed(11)).double()
    gradients -= (gradients @ along)[:, None] * along / (along @ along)
    found = dense.statistics(contexts, gradients)
    noise = 1e-9 * torch.outer(along, along) / (along @ along)  # what it leaves may be less than nothing
    B = (found.grad_covariance - noise * found.grad_covariance.diagonal(dim1=-2, dim2=-1).mean()).float()
    found = replace(found, input_covariance=found.input_covariance.float(), grad_covariance=B)
    dense.output = DenseLayer(dense.output.weight, found)
    values, output, cost = dense.fewer(max(heads[1], len(dense.W_v) // 2), damping=1e-3)
    lost = output.weight[0] @ (torch.block_diag(*blocks(dense, values)) @ constant) - along
    assert lost.norm() < 0.01 * along.norm() or cost > 1.0  # in nats, so that nobody would choose it
    assert cost > 0.0


def test_a_head_that_nobody_hears_keeps_one_dimension():
    dense = Attention((4, 4), 6)
    dense.W_o[:, SIZE : 2 * SIZE] = 0.0
    values, output, _ = dense.fewer(8)
    assert dense.sizes(values.places)[1] == 1
    assert sum(dense.sizes(values.places)) == 8
    assert output.places.tolist() == values.places.tolist()


@pytest.mark.parametrize(("features", "heads"), [(16, 2), (64, 8), (384, 12), (2048, 32), (8, 8), (2, 1)])
def test_counts_are_fewer_than_all_and_one_a_head_at_least(features, heads):
    counts = dimension_counts(features, heads)
    assert counts == sorted(set(counts), reverse=True)
    assert all(heads <= count < features for count in counts)
    assert features < 128 or all(count % 8 == 0 for count in counts)
