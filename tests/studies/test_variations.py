"""What else was tried: forms that layers could share, and corrections of a compressed model."""

import sys

import pytest
import torch
from support.tiny_models import TINY_MODELS, as_examples, llama, split_batch

SIZES = {"o": (12, 16), "q": (16, 12), "k": (8, 12), "v": (8, 12)}
HEADS = (4, 2)


def layer(out, size, seed):
    generator = torch.Generator().manual_seed(seed)

    def moments(features):
        rows = torch.randn(3 * features, features, generator=generator).double()
        return rows.T @ rows / len(rows)

    return torch.randn(out, size, generator=generator).double(), moments(size), moments(out)


@pytest.fixture
def forms(study):
    return study("joint_forms")


@pytest.mark.parametrize("budget", [100, 250, 400, 700])
def test_the_least_cost_is_that_of_the_hull(forms, budget):
    """Against all pairs of ranks: no pair below it, and pairs above and below it within a step of the hull."""
    curves = [forms.curve(layer(*SIZES[name], seed), "two-factor") for seed, name in enumerate("ov")]
    found = forms.least_cost(curves, budget)
    ranks = [[*range(1, curve.break_even_rank + 1), None] for curve in curves]
    parts = [
        ([curve.parameters(rank) for rank in each], [curve.predicted_loss(rank) for rank in each])
        for curve, each in zip(curves, ranks, strict=True)
    ]
    pairs = [(a + b, x + y) for a, x in zip(*parts[0], strict=True) for b, y in zip(*parts[1], strict=True)]
    assert found <= min((cost for size, cost in pairs if size <= budget), default=float("inf")) + 1e-9
    _, costs = zip(*pairs, strict=True)
    lower = max(
        min(cost + multiplier * (size - budget) for size, cost in pairs) for multiplier in torch.logspace(-5, 1, 400)
    )
    assert found == pytest.approx(float(lower), rel=0.05, abs=1e-3 * max(costs))


def test_layers_that_share_are_one_whose_changes_cost_what_those_of_each_cost(forms):
    read = [layer(*SIZES[name], 5) for name in "qkv"]
    read = [(weight, read[0][1], B) for weight, _, B in read]
    weight, A, B = forms.shared(read)
    assert weight.shape == (32, 12)
    change = torch.randn(32, 12).double()
    parts = change.split([16, 8, 8])
    alone = sum((B * (part @ A @ part.T)).sum() for part, (_, _, B) in zip(parts, read, strict=True))
    torch.testing.assert_close((B * (change @ A @ change.T)).sum(), alone)


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_fewer_dimensions_are_fewer_and_cost_what_the_quadratic_form_says(forms, share):
    v, o = layer(*SIZES["v"], 6), layer(*SIZES["o"], 7)
    narrow_v, narrow_o, cost = forms.narrowed(v, o, HEADS, share)
    dimensions = round(share * len(v[0]))
    assert narrow_v[0].shape == (dimensions, 12)
    assert narrow_o[0].shape == (12, HEADS[0] // HEADS[1] * dimensions)
    assert cost > 0
    *_, fewer = forms.narrowed(v, o, HEADS, share - 0.25)
    assert fewer > cost
    assert forms.narrowed(v, o, HEADS, 1.0) == (v, o, 0.0)


def place(module, name):
    if "llama" in name:
        model, batch = llama(96)
        parts = split_batch(batch, 8)
        return module.Place(model, parts[:6], parts[6:], None)
    model, batch = TINY_MODELS["bert-sequence-classification"](160)
    examples = as_examples(batch)
    return module.Place(model, examples[:80], examples[80:], None)


@pytest.mark.parametrize(
    "variation", ["clamped ranks", "singular values", "blocks", "curvature", "rounding", "removal", "dimensions"]
)
def test_a_variation_is_measured_once(study, variation, monkeypatch, tmp_path, capsys):
    module, file = study("variations"), tmp_path / "records.jsonl"
    monkeypatch.setattr(module, "place", lambda name, _: place(module, name))
    monkeypatch.setattr(module, "STEPS", 4)
    monkeypatch.setattr(module, "RIDGES", (1e12,))
    run, models, _ = module.VARIATIONS[variation]
    monkeypatch.setattr(module, "VARIATIONS", {variation: (run, models[-1:], (0.4,))})
    monkeypatch.setattr(sys, "argv", ["variations.py", "--testbed", "", "--records", str(file)])
    module.main()
    records = study("records").read_records(file)
    assert len({record["setting"] for record in records}) == len(records) >= 2
    if variation == "singular values":  # so large a ridge leaves all as it is
        assert records[0]["divergence"] == pytest.approx(records[1]["divergence"], rel=1e-6)
    monkeypatch.setattr(module, "VARIATIONS", {variation: (None, models[-1:], (0.4,))})
    module.main()
    assert study("records").read_records(file) == records
    assert capsys.readouterr().out.count(f"| {variation} |") == 2 * len(records)


def test_singular_values_are_corrected_towards_the_dense_answers(study, monkeypatch):
    """On the calibration data, which the step is for, the divergence falls."""
    module = study("variations")
    here = place(module, "bert")
    here = here._replace(others=here.calibration)
    monkeypatch.setattr(module, "RIDGES", (3.0,))
    model, _ = module.compressed(here._replace(others=place(module, "bert").others), 0.4)
    monkeypatch.setattr(module, "compressed", lambda *_: (model, None))
    before, after = module.singular_values(here, 0.4)
    assert after["divergence"] < 0.9 * before["divergence"]
