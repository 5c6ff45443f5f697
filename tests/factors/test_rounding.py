"""Rounded weights and factors, and what they are predicted to cost, against what they do cost in the metric."""

import itertools

import numpy as np
import pytest
import torch

from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.factors import LossCurve, factorize, loss_curve
from hf_lossless_lr.factors.linalg import damped
from hf_lossless_lr.factors.rounding import round_dense, round_factors, rounding_costs
from hf_lossless_lr.formats import FORMATS, decode, encode
from hf_lossless_lr.layers import FactorizedLinear
from hf_lossless_lr.statistics import LayerStatistics

pytestmark = pytest.mark.numerical

SHAPES = [(96, 130), (130, 96), (128, 128)]
DAMPING = 0.03
PREDICTED = (0.6, 1.6)  # a prediction is right within this factor
cases = pytest.mark.parametrize(
    ("name", "shape", "seed"), list(itertools.product(FORMATS, SHAPES, range(2))), ids=lambda value: str(value)
)


def problem(shape, seed):
    """A weight with falling singular values, correlated inputs and output gradients."""
    out, in_ = shape
    rng = np.random.default_rng(seed)

    def covariance(size):
        rows = rng.standard_normal((4 * size, size)) * np.linspace(1, 0.1, size)
        rows = rows @ np.linalg.qr(rng.standard_normal((size, size)))[0]
        return torch.from_numpy(rows.T @ rows / len(rows))[None]

    weight = rng.standard_normal((out, in_)) @ np.diag(np.linspace(1, 0.05, in_)) / in_
    A, B = covariance(in_), 1e-2 * covariance(out)
    gradient = torch.zeros(1, out, in_, dtype=torch.float64)
    return torch.from_numpy(weight)[None], LayerStatistics(gradient, A, B, 1000, 1000)


def cost(change, stats):
    return 0.5 * float((stats.grad_covariance[0] * (change @ stats.input_covariance[0] @ change.T)).sum())


def rounded(shape, seed, name, rank=None, storage="two-factor"):
    """The rounded weight, its cost apart from what the rank costs, and what that was predicted to be."""
    weight, stats = problem(shape, seed)
    kind = FORMATS[name]
    factorization = factorize(weight, stats, "kronecker", DAMPING)
    predicted = rounding_costs(weight, factorization, stats, DAMPING, [name])[name].at(rank)
    hessian = damped(stats.input_covariance, DAMPING)[0]
    if rank is None:
        matrix = round_dense(weight[0], hessian, kind)[0].double()
        return matrix, cost(matrix - weight[0], stats), predicted
    layer = FactorizedLinear(shape[1], shape[0], rank, bias=False, storage=storage, dtype=torch.float64)
    part = type(factorization)(type(factorization.factors)(*(each[0] for each in factorization.factors)))
    found = round_factors(part, rank, storage, layer.pivots_inputs, weight[0], hessian, kind)
    layer.load_factors(*found.factors)
    for module, grid in ((layer.down, found.down), (layer.up, found.up)):
        stored = encode(module.weight.detach(), grid)
        assert torch.equal(decode(stored, module.weight.shape[1], kind).double(), module.weight)
    truncated = loss_curve(weight, factorization, stats).second_order[rank]
    matrix = layer.dense_weight().detach()
    return matrix, cost(matrix - weight[0], stats) - truncated, predicted


@cases
def test_the_cost_of_a_rounded_weight_is_predicted(name, shape, seed):
    _, measured, predicted = rounded(shape, seed, name)
    assert PREDICTED[0] < measured / predicted < PREDICTED[1]


@pytest.mark.parametrize("rank", [20, 64, 90])
@cases
def test_the_cost_of_rounded_factors_is_predicted(name, shape, seed, rank):
    _, measured, predicted = rounded(shape, seed, name, rank)
    assert PREDICTED[0] < measured / predicted < PREDICTED[1]


@cases
def test_pivoted_factors_are_rounded_or_refused(name, shape, seed):
    kind = FORMATS[name]
    if not kind.pivots:
        with pytest.raises(ConfigurationError, match="pivoted storage does not go with"):
            rounded(shape, seed, name, 40, "pivoted")
        return
    _, measured, predicted = rounded(shape, seed, name, 40, "pivoted")
    assert measured < 10 * predicted  # the pivots' errors pass on


@pytest.mark.parametrize("shape", SHAPES)
def test_up_makes_up_for_the_rounding_of_down(shape, monkeypatch):
    """With `up` as it was before `down` was rounded, the error is larger."""
    _, solved, _ = rounded(shape, 0, "int4", 64)
    monkeypatch.setattr(
        "hf_lossless_lr.factors.rounding.torch.linalg.solve",
        lambda between, cross: torch.linalg.lstsq(between, between @ kept[0].T).solution,
    )
    kept = []
    plain = type(factorization_of(shape)).truncate

    def truncate(self, *args):
        tensors = plain(self, *args)
        kept[:] = [tensors.up / tensors.up.norm(dim=0)]
        return tensors

    monkeypatch.setattr(type(factorization_of(shape)), "truncate", truncate)
    _, unsolved, _ = rounded(shape, 0, "int4", 64)
    assert solved < unsolved


def factorization_of(shape):
    weight, stats = problem(shape, 0)
    return factorize(weight, stats, "kronecker", DAMPING)


def test_a_coarser_format_costs_more_at_every_rank():
    weight, stats = problem((96, 130), 0)
    factorization = factorize(weight, stats, "kronecker", DAMPING)
    costs = list(rounding_costs(weight, factorization, stats, DAMPING, list(FORMATS)).values())
    for finer, coarser in itertools.pairwise(costs):
        assert finer.dense < coarser.dense
        assert (finer.by_rank[1:] < coarser.by_rank[1:]).all()
        assert coarser.by_rank[0] == 0


def test_predicted_losses_add_up():
    weight, stats = problem((96, 130), 0)
    factorization = factorize(weight, stats, "kronecker", DAMPING)
    curve: LossCurve = loss_curve(weight, factorization, stats)
    costs = rounding_costs(weight, factorization, stats, DAMPING, ["int4"])["int4"]
    curve = LossCurve(
        *(getattr(curve, n) for n in ("out_features", "in_features", "storage")),
        curve.first_order,
        curve.second_order,
        rounding={"float": None, "int4": costs},
    )
    assert curve.predicted_loss(None) == 0.0
    assert curve.predicted_loss(30) == curve.second_order[30]
    assert curve.predicted_loss(30, "int4") == pytest.approx(curve.second_order[30] + costs.by_rank[30])
    assert curve.predicted_loss(None, "int4") == costs.dense
