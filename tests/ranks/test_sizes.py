"""FLOPs against PyTorch's own counter on real layers; the latency table with a made-up clock: nothing is timed."""

import itertools

import numpy as np
import pytest
import torch
from support.choices import select_budget
from support.tiny_models import EXAMPLES, LENGTH, TINY_MODELS, build
from support.tolerances import ROUNDING
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hf_lossless_lr.factors.curves import LossCurve
from hf_lossless_lr.layers.factorized import is_factorized
from hf_lossless_lr.layers.layout import layout_of, weight_matrices
from hf_lossless_lr.layers.replacement import replace_modules
from hf_lossless_lr.layers.storage import STORAGES, choose_storage
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.ranks.flops import flop_sizes, forward_flops
from hf_lossless_lr.ranks.latency import forward_seconds, latency_sizes, run_seconds
from hf_lossless_lr.ranks.path import allowed_ranks

pytestmark = pytest.mark.numerical

LAYERS = {
    "Linear, wide": lambda: nn.Linear(12, 7),
    "Linear, tall": lambda: nn.Linear(7, 12, bias=False),
    "Conv1D": lambda: Conv1D(9, 6),
    "Conv2d": lambda: nn.Conv2d(3, 9, 3, padding=1),
    "Conv2d, uneven": lambda: nn.Conv2d(4, 10, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1), bias=False),
    "Conv2d, pointwise": lambda: nn.Conv2d(6, 9, 1, stride=2, padding=1),
}
on_layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
on_storages = pytest.mark.parametrize("storage", STORAGES)


def kept(sizes, ranks):
    """Size of all layers at the given ranks."""
    return sum(sizes[name].at(rank) for name, rank in ranks.items())


def curve_of(module, storage="pivoted"):
    out, in_ = weight_matrices(module)[0].shape
    second = np.arange(min(out, in_) + 1.0)[::-1]
    return LossCurve(out, in_, storage, 0 * second, second)


def counted(function):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops()


# --- FLOPs ----------------------------------------------------------------------------------------------------------


@on_layers
@on_storages
def test_flops_are_what_pytorch_counts_dense_and_at_every_rank(make, storage):
    dense = make()
    layout, curve = layout_of(dense), curve_of(dense, storage)
    x = layout.random_input(dense, 20)
    rows = layout.row_shape(dense, x).numel()
    size = flop_sizes({"a": curve}, {"a": rows}, {})["a"]
    assert size.dense == counted(lambda: dense(x))
    assert len(size.by_rank) == min(curve.out_features, curve.in_features) + 1
    for rank in range(1, curve.break_even_rank + 1):
        assert size.by_rank[rank] == counted(lambda r=rank: layout.factorized(dense, r, storage)(x))


def test_flops_grow_with_the_rows_and_need_not_be_whole():
    curve = curve_of(nn.Linear(5, 4))
    size = flop_sizes({"a": curve}, {"a": 2.5}, {})["a"]
    assert size.dense == 2 * 20 * 2.5
    assert size.by_rank.tolist() == [2 * k * (9 - k) * 2.5 for k in range(5)]


def test_flops_of_equal_rows_choose_as_parameters_do():
    curves = {"a": curve_of(nn.Linear(9, 8)), "b": curve_of(nn.Linear(6, 12))}
    sizes = flop_sizes(curves, dict.fromkeys(curves, 3.7), {})
    for ratio in [0.5, 0.7, 0.9]:
        assert select_budget(curves, ratio, 1, sizes) == select_budget(curves, ratio)


def test_flops_are_counted_where_a_weight_enters_a_module_as_an_argument():
    """DeBERTa's embeddings of relative positions, which PyTorch's counter cannot follow if they require gradients."""
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = build("DebertaForSequenceClassification", "DebertaConfig", vocab_size=61, **sizes, **options)
    model.classifier.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    targets = find_targets(model, None, None).chosen
    flops = forward_flops(model, targets, {"input_ids": torch.arange(12).view(2, 6)}, 2)
    assert flops.rows.keys() == targets.keys()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def half(model, targets):
    """Each target at about half of its largest rank."""
    layers, ranks = {}, {}
    for name, module in targets.items():
        curve = curve_of(module)
        ranks[name] = max(curve.break_even_rank // 2, 1)
        layers[name] = layout_of(module).factorized(module, ranks[name], "pivoted")
    return layers, ranks


@pytest.mark.parametrize("name", TINY_MODELS)
def test_flops_of_a_model_are_those_of_its_layers_and_the_fixed_part_dense_and_factorized(name):
    model, batch = TINY_MODELS[name]()
    targets = find_targets(model, ["Conv2d"] if name == "resnet" else None, None).chosen
    flops = forward_flops(model, targets, batch, EXAMPLES)
    curves = {target: curve_of(module) for target, module in targets.items()}
    sizes = flop_sizes(curves, flops.rows, flops.widening)
    dense = EXAMPLES * (flops.fixed + kept(sizes, dict.fromkeys(targets)))
    assert dense == pytest.approx(counted(lambda: model(**batch)), rel=ROUNDING)
    layers, ranks = half(model, targets)
    replace_modules(model, layers)
    factorized = EXAMPLES * (flops.fixed + kept(sizes, ranks))
    assert factorized == pytest.approx(counted(lambda: model(**batch)), rel=ROUNDING)
    assert factorized < dense


def test_rows_are_tokens_with_padding_output_positions_and_repeated_calls():
    model, batch = TINY_MODELS["bert-sequence-classification"]()
    targets = find_targets(model, None, None).chosen
    assert set(forward_flops(model, targets, batch, EXAMPLES).rows.values()) == {float(LENGTH)}
    model, batch = TINY_MODELS["resnet"]()
    stem = "resnet.embedder.embedder.convolution"  # 20 x 20 pixels at stride 2
    rows = forward_flops(model, {stem: model.get_submodule(stem)}, batch, EXAMPLES).rows
    assert rows == {stem: 100.0}
    model, batch = TINY_MODELS["albert"]()
    targets = find_targets(model, None, None).chosen
    repeats = model.config.num_hidden_layers * float(LENGTH)
    assert repeats in forward_flops(model, targets, batch, EXAMPLES).rows.values()


def test_attention_is_part_of_what_is_fixed():
    model, batch = TINY_MODELS["bert-sequence-classification"]()
    everything = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    config = model.config
    # Scores and weighted values: 2 products of 2 · length² · hidden in each layer.
    attention = config.num_hidden_layers * 2 * 2 * LENGTH**2 * config.hidden_size
    assert forward_flops(model, everything, batch, EXAMPLES).fixed == attention


def test_a_target_without_a_call_has_no_size_that_a_rank_could_lower():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    targets = dict(model.named_children())
    rows = forward_flops(model, targets, {"x": torch.ones(2, 4)}, 2).rows
    assert rows == {"used": 1.0, "idle": 0.0}
    curves = dict.fromkeys(targets, curve_of(nn.Linear(9, 8)))
    size = flop_sizes(curves, rows, {})["idle"]
    assert size.dense == 0
    assert not np.isfinite(size.by_rank).any()
    assert np.isfinite(flop_sizes(curves, rows, {})["used"].by_rank).any()


@pytest.mark.parametrize("measure", [lambda m, b: forward_flops(m, {}, b, EXAMPLES), forward_seconds])
def test_a_measured_model_is_left_as_it_was(measure):
    model, batch = TINY_MODELS["resnet"]()
    model.train()
    model.resnet.embedder.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, batch)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())  # statistics of norms
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- the clock ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by the rank (0 is dense), as given; notes every call."""

    def __init__(self, seconds=None):
        self.seconds = seconds or (lambda layer, rows: 1e-6 * rows * stored(layer))
        self.calls = []

    def __call__(self, layer, x, calls):
        layer(x)  # it has to fit
        layout_rows = x.shape[0] if x.ndim == 2 else layer(x)[0, 0].numel()
        self.calls.append((rank_of(layer), layout_rows, calls))
        return self.seconds(layer, layout_rows)

    def ranks(self):
        return sorted({rank for rank, _, _ in self.calls if rank})


def rank_of(layer):
    return layer.rank if is_factorized(layer) else 0


def stored(layer):
    if is_factorized(layer):
        return layer.down.weight.numel() + layer.up.weight.numel()
    return layer.weight.numel()


def received(module, rows):
    """One input of so many rows."""
    with torch.random.fork_rng():
        return {tuple(layout_of(module).random_input(module, rows).shape): 1}


def one(module, clock, storage="pivoted", rows=10, **options):
    curves, inputs = {"a": curve_of(module, storage)}, {"a": received(module, rows)}
    return latency_sizes({"a": module}, curves, inputs, timer=clock, **options)["a"]


@pytest.mark.parametrize("calls", [1, 3])
def test_run_seconds_is_the_mean_of_its_calls(calls, monkeypatch):
    now = iter([10.0, 16.0])
    monkeypatch.setattr("hf_lossless_lr.ranks.latency.time.perf_counter", lambda: next(now))
    made = []
    assert run_seconds(made.append, torch.ones(1), calls) == 6.0 / calls
    assert len(made) == calls


def test_forward_seconds_is_the_median_without_the_first_pass(monkeypatch):
    runs = [100.0, 1.0, 5.0, 2.0]  # the median of the last three is 2
    clock = itertools.chain.from_iterable((0.0, seconds) for seconds in runs)
    monkeypatch.setattr("hf_lossless_lr.ranks.latency.time.perf_counter", lambda: next(clock))
    model, batch = TINY_MODELS["bert-sequence-classification"]()
    assert forward_seconds(model, batch, repeats=3) == 2.0


def test_a_real_clock_gives_finite_positive_rising_latencies():
    module = nn.Linear(24, 16)
    curve = curve_of(module)
    size = latency_sizes({"a": module}, {"a": curve}, {"a": {(4, 24): 1}}, repeats=1)["a"]
    compressing = size.by_rank[1 : curve.break_even_rank + 1]
    assert size.dense > 0
    assert (compressing > 0).all()
    assert np.isfinite(compressing).all()
    assert (np.diff(compressing) >= 0).all()


# --- the latency table ----------------------------------------------------------------------------------------------


@on_layers
@on_storages
def test_every_layer_type_is_measured_at_its_real_rows_with_its_real_factorized_form(make, storage):
    module, clock = make(), Clock()
    curve = curve_of(module, storage)
    size = one(module, clock, storage, rows=12)
    assert {rows for _, rows, _ in clock.calls} == {12}  # 12 = 3 x 4 output positions
    assert size.dense == pytest.approx(12e-6 * curve.dense_parameters)
    assert {1, curve.break_even_rank} <= set(clock.ranks())
    for rank in clock.ranks():
        assert size.by_rank[rank] == pytest.approx(12e-6 * curve.parameters(rank))


def test_layers_are_measured_with_the_shapes_that_they_receive_as_often_as_they_do():
    """Of a batch of small pictures, a convolution makes something else than of a large one with as many rows."""
    layer, clock, shapes = nn.Conv2d(3, 9, 3, padding=1), [], {(8, 3, 4, 4): 3, (2, 3, 6, 5): 1}

    def seconds(layer, x, calls):
        clock.append(tuple(x.shape))
        return float(x.shape[0]) * (2.0 if rank_of(layer) else 1.0)

    size = latency_sizes({"a": layer}, {"a": curve_of(layer)}, {"a": shapes}, timer=seconds)["a"]
    assert set(clock) == set(shapes)
    assert size.dense == 3 * 8 + 2
    assert set(size.by_rank[1:9].tolist()) == {2 * size.dense}


def test_what_layers_receive_is_noted_as_they_are_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.idle = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.body(self.body(x)[..., :2, :]))

    model = Twice()
    found = forward_flops(model, dict(model.named_children()), {"x": torch.ones(2, 3, 5, 4)}, 2).inputs
    assert found == {"body": {(2, 3, 5, 4): 1, (2, 3, 2, 4): 1}, "head": {(2, 3, 2, 4): 1}}


@on_layers
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 60, 97])
def test_a_random_input_has_the_rows_asked_for_or_hardly_more(make, rows):
    module = make()
    layout = layout_of(module)
    x = layout.random_input(module, rows)
    found = layout.row_shape(module, x).numel()
    assert found == layout.output_rows(module, module(x)).flatten(0, -2).shape[0]
    assert rows <= found <= rows + 2 * rows**0.5 + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_layers_are_measured_in_the_dtype_of_the_model(dtype):
    seen = set()

    def timer(layer, x, calls):
        seen.update({x.dtype, layer(x).dtype})
        return 1.0

    one(nn.Linear(6, 8).to(dtype), timer)
    assert seen == {dtype}


def test_between_measured_ranks_the_latency_is_interpolated():
    clock = Clock(lambda layer, rows: 2.0 + 3.0 * rank_of(layer))  # a straight line, hit exactly
    size = one(nn.Linear(300, 200), clock)
    assert 6 <= len(clock.ranks()) <= 8
    np.testing.assert_allclose(size.by_rank[1:200], 2.0 + 3.0 * np.arange(1, 200), rtol=ROUNDING)


@pytest.mark.parametrize("seed", range(6))
def test_a_noisy_latency_never_falls_with_the_rank_nor_below_what_was_measured(seed):
    rng = np.random.default_rng(seed)
    by_rank = dict.fromkeys(range(64), 0.0) | {k: float(v) for k, v in enumerate(rng.uniform(1, 2, size=64))}
    clock = Clock(lambda layer, rows: by_rank[rank_of(layer)])
    module = nn.Linear(64, 64)
    size = one(module, clock)
    assert (np.diff(size.by_rank[1:64]) >= 0).all()
    assert all(size.by_rank[rank] >= by_rank[rank] for rank in clock.ranks())
    slower = [rank for rank in clock.ranks() if by_rank[rank] >= by_rank[0]]
    assert not set(slower) & set(allowed_ranks(curve_of(module), 1, size))


def test_a_rank_that_is_not_faster_than_dense_is_not_allowed():
    seconds = Clock(lambda layer, rows: 5.0 if rank_of(layer) == 0 else 1.0 + rank_of(layer))
    module = nn.Linear(16, 16)
    size = one(module, seconds)
    assert allowed_ranks(curve_of(module), 1, size) == [1, 2, 3]  # rank 4 takes as long as dense


def test_ranks_that_do_not_compress_are_neither_measured_nor_allowed():
    module, clock = nn.Linear(20, 20), Clock(lambda layer, rows: 1.0 - 0.5 * is_factorized(layer))
    size = one(module, clock, "two-factor")
    assert max(clock.ranks()) == curve_of(module, "two-factor").break_even_rank == 9
    assert np.isinf(size.by_rank[10:]).all()


def test_a_layer_that_no_rank_compresses_is_measured_dense_only():
    module, clock = nn.Linear(8, 1), Clock()
    size = one(module, clock)
    assert clock.ranks() == []
    assert size.dense > 0
    assert allowed_ranks(curve_of(module), 1, size) == []


@pytest.mark.parametrize("multiple", [4, 7, 32])
def test_only_multiples_are_measured(multiple):
    clock = Clock()
    one(nn.Linear(60, 50), clock, rank_multiple=multiple)
    assert clock.ranks()
    assert all(rank % multiple == 0 for rank in clock.ranks())
    assert {multiple, 49 // multiple * multiple} <= set(clock.ranks())


def test_both_sides_of_a_change_of_storage_are_measured():
    module, clock = nn.Linear(400, 300), Clock()
    size = one(module, clock, "auto", rows=2)
    change = next(k for k in range(2, 300) if choose_storage(300, 400, k, "auto") == "pivoted")
    assert {change - 1, change} <= set(clock.ranks())
    assert size.by_rank[change - 1] == pytest.approx(2e-6 * (change - 1) * 700)  # two factors


def test_the_median_of_alternating_runs_counts_after_a_warm_up():
    values = iter([50.0, 60.0, 70.0, 80.0])  # warm-up of dense and three ranks, then one to see how long a call takes
    later = itertools.cycle([[4.0, 1.0, 2.0, 3.0], [5.0, 9.0, 2.0, 3.0], [90.0, 2.0, 2.5, 3.5]])
    order, queue = [], []

    def timer(layer, x, calls):
        order.append(rank_of(layer))
        warm = next(values, None)
        if warm is not None:
            return warm
        if len(order) == 5:
            return 1.0
        if not queue:
            queue.extend(next(later))
        return queue.pop(0)

    size = one(nn.Linear(4, 4), timer, repeats=3)
    assert order == [0, 1, 2, 3, 0, *[0, 1, 2, 3] * 3]
    assert size.dense == 5.0
    assert size.by_rank[1:4].tolist() == [2.0, 2.0, 3.0]


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (1e-4, 20), (1e-9, 100)])
def test_a_fast_layer_is_called_repeatedly_in_each_run(seconds, calls):
    clock = Clock(lambda layer, rows: seconds)
    one(nn.Linear(4, 4), clock)
    assert {count for _, _, count in clock.calls[5:]} == {calls}


def measured_layers(modules, rows=None, storages=None):
    """How many of the layers are measured, by their number of dense runs."""
    clock = Clock()
    names = [str(index) for index in range(len(modules))]
    storages = storages or ["pivoted"] * len(modules)
    curves = {n: curve_of(module, storage) for n, module, storage in zip(names, modules, storages, strict=True)}
    targets = dict(zip(names, modules, strict=True))
    rows = rows or [12] * len(names)
    inputs = {n: received(module, count) for n, module, count in zip(names, modules, rows, strict=True)}
    sizes = latency_sizes(targets, curves, inputs, timer=clock)
    assert list(sizes) == names
    dense_runs = sum(rank == 0 for rank, _, _ in clock.calls)
    return dense_runs / (2 + 7)  # warm-up, a first look, seven runs


def test_layers_alike_are_measured_once():
    assert measured_layers([nn.Linear(6, 8), nn.Linear(6, 8), Conv1D(9, 6), Conv1D(9, 6)]) == 2
    assert measured_layers([nn.Conv2d(3, 9, 3, padding=1) for _ in range(3)]) == 1


DIFFERENT = {
    "type": [nn.Linear(6, 9), Conv1D(9, 6)],
    "shape": [nn.Linear(6, 8), nn.Linear(8, 6)],
    "bias": [nn.Linear(6, 8), nn.Linear(6, 8, bias=False)],
    "dtype": [nn.Linear(6, 8), nn.Linear(6, 8).double()],
    "stride": [nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(3, 9, 3, padding=1, stride=2)],
    "kernel": [nn.Conv2d(4, 9, (2, 3)), nn.Conv2d(4, 9, (3, 2))],
}


@pytest.mark.parametrize("modules", DIFFERENT.values(), ids=DIFFERENT)
def test_layers_that_differ_are_measured_each(modules):
    assert measured_layers(modules) == 2


def test_rows_and_storages_that_differ_are_measured_each():
    alike = [nn.Linear(6, 8), nn.Linear(6, 8)]
    assert measured_layers(alike, rows=[12, 13]) == 2
    assert measured_layers(alike, storages=list(STORAGES)) == 2


def test_measuring_leaves_the_layers_and_the_random_numbers_as_they_were():
    module = nn.Linear(6, 8)
    weight, state = module.weight.detach().clone(), torch.get_rng_state()
    grads = []
    clock = Clock(lambda layer, rows: grads.append(torch.is_grad_enabled()) or 1.0)
    one(module, clock)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.weight, weight)
    assert not any(grads)


def test_a_latency_budget_is_kept_by_what_is_measured():
    """Two layers alike in loss, one of which gains nothing below dense: the other has to give all."""
    slow, fast = nn.Linear(16, 16), nn.Linear(16, 17)
    seconds = Clock(lambda layer, rows: 1.0 if layer.out_features == 16 else 1.0 if rank_of(layer) == 0 else 0.4)
    targets = {"slow": slow, "fast": fast}
    curves = {name: curve_of(module) for name, module in targets.items()}
    sizes = latency_sizes(targets, curves, {name: {(4, 16): 1} for name in targets}, timer=seconds)
    ranks = select_budget(curves, 0.7, 1, sizes)
    assert ranks == {"slow": None, "fast": 15}  # the highest of the ranks that are equally fast
    assert kept(sizes, ranks) == pytest.approx(1.4)
