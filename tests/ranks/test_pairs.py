"""Forms that two layers take together, against every combination of forms."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hf_lossless_lr.factors.curves import LossCurve
from hf_lossless_lr.ranks.pairs import forms_of_pairs, in_forms
from hf_lossless_lr.ranks.select import kept_parameters, select_budget
from hf_lossless_lr.ranks.sizes import Choice, byte_size, parameter_sizes

pytestmark = pytest.mark.numerical

COUNTS, FEATURES = (32, 24, 12), 40
SEEDS = range(4)
RATIOS = [0.3, 0.5, 0.7, 0.9]


def curve(out, in_, seed, base=0.0, **options):
    drops = np.sort(np.random.default_rng(seed).exponential(size=min(out, in_)))[::-1] ** 3
    second = np.append(drops[::-1].cumsum()[::-1], 0.0)
    return LossCurve(out, in_, "two-factor", None, base + second, base=base, **options)


def pair(number, seed):
    """Two layers with fewer dimensions between them in some forms, which cost the more the fewer there are."""
    names = (f"v{number}", f"o{number}")
    scale = np.random.default_rng(seed).uniform(0.2, 3.0)
    bases = {count: scale * (1 - count / FEATURES) ** 3 for count in COUNTS}
    of_v = {f"{n} dimensions": curve(n, FEATURES, seed, base, form=f"{n} dimensions") for n, base in bases.items()}
    of_o = {f"{n} dimensions": curve(FEATURES, n, seed + 50, form=f"{n} dimensions") for n in COUNTS}
    whole = (curve(FEATURES, FEATURES, seed), of_v), (curve(FEATURES, FEATURES, seed + 50), of_o)
    return {name: replace(c, pair=names, paired=p) for name, (c, p) in zip(names, whole, strict=True)}


def curves_of(seed):
    return pair(0, 100 * seed) | {"alone": curve(FEATURES, 30, 100 * seed + 7)} | pair(1, 100 * seed + 13)


def cost_of(curves, choices):
    return sum(curves[name].in_form(c.form).predicted_loss(c.rank) for name, c in choices.items())


def without_pairs(curves):
    return {name: replace(c, pair=(), paired={}) for name, c in curves.items()}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_are_about_the_best_of_all_combinations_and_fit(seed, ratio):
    curves = curves_of(seed)
    choices = select_budget(curves, ratio)
    total = sum(c.dense_parameters for c in curves.values())
    assert kept_parameters(curves, choices) <= ratio * total
    costs = []
    for combination in itertools.product(("channel", *(f"{n} dimensions" for n in COUNTS)), repeat=2):
        forms = {name: form for n, form in enumerate(combination) for name in (f"v{n}", f"o{n}") if form != "channel"}
        settled, sizes = in_forms(curves, parameter_sizes(curves), forms)
        settled = without_pairs(settled)
        smallest = sum(min(sizes[name].of(Choice(1, form=c.form)), c.dense_parameters) for name, c in settled.items())
        if smallest <= ratio * total:
            costs.append(cost_of(curves, select_budget(settled, ratio, sizes=sizes, whole=total)))
    assert cost_of(curves, choices) <= 1.05 * min(costs)
    assert cost_of(curves, choices) <= cost_of(curves, select_budget(without_pairs(curves), ratio)) + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_both_layers_of_a_pair_have_the_same_form(seed):
    curves = curves_of(seed)
    seen = set()
    for ratio in RATIOS:
        choices = select_budget(curves, ratio)
        for n in (0, 1):
            assert choices[f"v{n}"].form == choices[f"o{n}"].form
            seen.add(choices[f"v{n}"].form)
    assert len(seen) > 1


def test_a_form_that_costs_nothing_is_taken_and_one_that_costs_much_is_not():
    curves = curves_of(0)

    def with_base(c, base):
        return replace(c, second_order=c.second_order - c.base + base, base=base)

    for base, taken in ((0.0, True), (1e3, False)):
        changed = dict(curves)
        for n in (0, 1):
            v = curves[f"v{n}"]
            changed[f"v{n}"] = replace(v, paired={form: with_base(c, base) for form, c in v.paired.items()})
        budget = 0.6 * sum(c.dense_parameters for c in curves.values())
        *_, forms = forms_of_pairs(changed, budget, 1, parameter_sizes(changed))
        assert (set(forms) == {"v0", "o0", "v1", "o1"}) is taken
        assert bool(forms) is taken


def test_dense_layers_of_a_form_cost_the_form():
    (v, _), (o, _) = ((c, n) for n, c in pair(0, 1).items())
    form = f"{COUNTS[0]} dimensions"
    assert v.in_form(form).predicted_loss(None) == v.in_form(form).base > 0
    assert o.in_form(form).predicted_loss(None) == 0
    assert v.in_form(form).parameters(None) == COUNTS[0] * FEATURES


def test_bytes_count_where_features_belong():
    c = replace(curve(8, 10, 0), places_bytes=48)
    assert byte_size(c, 4).dense == 8 * 10 * 4 + 48
    assert byte_size(c, 4).at(2) == 2 * 18 * 4 + 48
