"""The refit on shifted inputs, against a slow oracle that runs whole models; and what it must leave alone."""

import contextvars
import functools
from collections import Counter
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compressions import default_options
from support.processes import accelerator, in_two_processes, loader_of, needs_processes
from support.refit_oracle import get_matrix, layer_inputs, plain_examples, roots, slow_refit, with_ridge
from support.statistics_oracle import ROUNDS_TO_FLOAT32, double_rows
from support.tiny_models import IGNORED, TINY_MODELS, generator, split_batch, t5, t5_equal_lengths
from support.tolerances import AMPLIFIED, PARTLY_FLOAT32, REFIT_FLOAT32
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lossless_lr.errors import NumericalError
from hf_lossless_lr.factors.factorize import factorize
from hf_lossless_lr.factors.refit import RefitTarget, refit, refit_groups
from hf_lossless_lr.layers.layout import layout_of, weight_matrices
from hf_lossless_lr.layers.replacement import replace_modules
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.statistics.collect import collect_statistics
from hf_lossless_lr.statistics.records import CalibrationStatistics
from hf_lossless_lr.statistics.residuals import find_residuals
from hf_lossless_lr.timing import Clock

refit_module = import_module("hf_lossless_lr.factors.refit")  # the room has a function of this name
streams_module = import_module("hf_lossless_lr.statistics.streams")

pytestmark = pytest.mark.numerical

COUNT = 7
BATCH_SIZE = 3
DAMPING = 0.03

MODELS = {**TINY_MODELS, "t5-equal-lengths": t5_equal_lengths}
SHARED_ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"


def in_double(build, count=COUNT):
    model, batch = build(count)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.fixture
def double_products(monkeypatch):
    """Products in double precision, so that a comparison shows errors and not rounding."""
    monkeypatch.setattr("hf_lossless_lr.statistics.streams.real_rows", double_rows)


class Prepared(NamedTuple):
    """A model with factorized layers beside it, ready for a refit."""

    model: PreTrainedModel
    statistics: CalibrationStatistics
    targets: dict[str, RefitTarget]
    groups: list[tuple[str, ...]]

    def products(self) -> dict[str, np.ndarray]:
        """The matrices that the factorized layers stand for."""
        return {name: target.layer.dense_weight().detach().numpy().copy() for name, target in self.targets.items()}

    def refit(self, batches, damping: float = DAMPING, **options) -> dict[str, np.ndarray]:
        refit(self.model, self.targets, self.groups, [loader_of(batches)], accelerator(), damping, Clock(), **options)
        return self.products()


def target_modules(model):
    if "Albert" in type(model).__name__:  # with a layer behind the shared ones, whose inputs they shift
        return ["Linear", "albert.pooler"]
    return default_options(model).get("target_modules")


def prepare(model, batches, storage="pivoted", share=3, damping=DAMPING) -> Prepared:
    """Factorize every target at a third of its full rank."""
    found = find_targets(model, target_modules(model)).chosen
    statistics = collect_statistics(model, found, loader_of(batches), accelerator())
    targets = {}
    for name, module in found.items():
        weight, layer_statistics = weight_matrices(module), statistics.layers[name]
        rank = max(1, min(weight.shape[-2:]) // share)
        layer = layout_of(module).factorized(module, rank, storage)
        factors = factorize(weight, layer_statistics, "kronecker", damping)
        layer.load_factors(*factors.truncate(rank, storage, layer.pivots_inputs), module.bias)
        targets[name] = RefitTarget(module, layer, functools.partial(getattr, layer_statistics, "grad_covariance"))
    return Prepared(model, statistics, targets, refit_groups(statistics, targets))


@pytest.mark.parametrize("storage", ["pivoted", "two-factor"])
def test_a_metric_without_gradients_is_that_of_equal_ones(storage, double_products):
    found = []
    for moments in (lambda out: None, lambda out: torch.eye(out, dtype=torch.float64)[None]):
        model, batch = in_double(MODELS["bert-sequence-classification"])
        prepared = prepare(model, split_batch(batch, BATCH_SIZE), storage)
        for name, target in prepared.targets.items():
            given = functools.partial(moments, target.dense.out_features)
            prepared.targets[name] = replace(target, grad_covariance=given)
        found.append(prepared.refit(split_batch(batch, BATCH_SIZE)))
    assert deviation(*found) < 1e-8


def test_takes_no_more_batches_than_there_is_memory_for():
    found = []
    for taken, options in ((2, {}), (3, {"most": 2}), (3, {"most": None}), (3, {"most": 9})):
        model, batch = MODELS["llama"](COUNT)
        batches = split_batch(batch, BATCH_SIZE)
        found.append(prepare(model, batches).refit(batches[:taken], **options))
    first_two, limited, everything, generous = found
    assert changed(first_two, limited) == set()
    assert changed(everything, generous) == set()
    assert changed(limited, everything) == set(everything)


def deviation(got, expected) -> float:
    """Largest deviation of a weight, relative to its largest entry."""
    assert got.keys() == expected.keys()
    return max(np.abs(got[name] - expected[name]).max() / np.abs(expected[name]).max() for name in expected)


def changed(before, after) -> set[str]:
    return {name for name in before if not np.array_equal(before[name], after[name])}


class Case(NamedTuple):
    """A tiny model before and after its refit."""

    prepared: Prepared
    batch: dict[str, torch.Tensor]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


@functools.cache
def refitted(name: str, makes_up: bool = False) -> Case:
    model, batch = in_double(MODELS[name])
    batches = split_batch(batch, BATCH_SIZE)
    prepared = prepare(model, batches)
    before = prepared.products()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lossless_lr.statistics.streams.real_rows", double_rows)
        residuals = residuals_of(prepared, batch) if makes_up else {}
        return Case(prepared, batch, before, prepared.refit(batches, residuals=residuals))


def residuals_of(prepared, batch):
    return find_residuals(prepared.model, {name: target.dense for name, target in prepared.targets.items()}, batch)


def oracle(prepared, before, examples, damping=DAMPING, **options):
    return slow_refit(
        prepared.model,
        before,
        {name: target.layer.rank for name, target in prepared.targets.items()},
        {name: target.grad_covariance()[0].numpy() for name, target in prepared.targets.items()},
        prepared.groups,
        examples,
        damping,
        **options,
    )


class TestErrorsOfTheResidualStream:
    @pytest.mark.parametrize("name", ["bert-token-classification", "llama", "gpt2", "t5", "vit", "swin"])
    def test_are_made_up_for_as_in_the_oracle(self, name):
        prepared, batch, before, after = refitted(name, makes_up=True)
        residuals = residuals_of(prepared, batch)
        assert len(residuals) >= 4
        expected = oracle(prepared, before, plain_examples(prepared.model, batch), residuals=residuals)
        assert deviation(after, expected) <= (PARTLY_FLOAT32 if name in ROUNDS_TO_FLOAT32 else AMPLIFIED)
        changed_by_it = changed(refitted(name).after, after) & residuals.keys()
        assert len(changed_by_it) >= len(residuals) - 2  # what is added to the first layer of a stack is dense

    def test_are_smaller_where_they_are_made_up_for(self):
        """The sum of the last block is closer to the dense model's on the data of the fit."""
        errors = {}
        for makes_up in (False, True):
            prepared, batch, _, _ = refitted("llama", makes_up)
            layers = {layer: target.layer for layer, target in prepared.targets.items()}
            with torch.no_grad():
                dense = prepared.model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
                replacement = replace_modules(prepared.model, layers)
                found = prepared.model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            replacement.undo()
            errors[makes_up] = (found - dense)[batch["attention_mask"].bool()].square().mean().item()
        assert errors[True] < 0.9 * errors[False]


on_models = pytest.mark.parametrize("name", MODELS)


@on_models
class TestOnEveryModel:
    def test_matches_the_oracle(self, name):
        prepared, batch, before, after = refitted(name)
        expected = oracle(prepared, before, plain_examples(prepared.model, batch))
        tolerance = PARTLY_FLOAT32 if name in ROUNDS_TO_FLOAT32 else AMPLIFIED
        assert deviation(after, expected) <= tolerance
        assert deviation(after, before) > 1e-1  # else the comparison says nothing

    def test_changes_all_layers_called_once_and_no_other(self, name):
        _, _, before, after = refitted(name)
        shared = {layer for layer in before if layer.startswith(SHARED_ALBERT)}
        assert changed(before, after) == before.keys() - shared
        assert len(shared) == (6 if name == "albert" else 0)

    def test_groups_are_in_the_order_of_the_forward_pass(self, name):
        """And each layer is in one group, with all layers of the same input."""
        prepared, batch, _, _ = refitted(name)
        calls = []
        handles = [
            target.dense.register_forward_pre_hook(lambda module, args, layer=layer: calls.append((layer, args[0])))
            for layer, target in prepared.targets.items()
        ]
        prepared.model(**batch)
        for handle in handles:
            handle.remove()
        times = Counter(layer for layer, _ in calls)
        expected: dict[Any, list[str]] = {}
        for layer, x in calls:
            if times[layer] == 1:
                dense: Any = prepared.targets[layer].dense
                geometry = (dense.kernel_size, dense.stride, dense.padding) if isinstance(dense, nn.Conv2d) else None
                expected.setdefault((id(x), geometry), []).append(layer)
        assert prepared.groups == [tuple(group) for group in expected.values()]

    def test_outputs_on_shifted_inputs_are_no_worse(self, name):
        """Each layer's error on the inputs it has in the end, in the norm of the metric, falls."""
        prepared, batch, before, after = refitted(name)
        examples = plain_examples(prepared.model, batch)
        names = [layer for group in prepared.groups for layer in group]
        dense = layer_inputs(prepared.model, names, examples)
        layers = {layer: target.layer for layer, target in prepared.targets.items()}
        handle = {}
        shifted = {layer: [] for layer in names}
        for layer in names:
            geometry = prepared.targets[layer].dense

            def watch(module, args, layer=layer, geometry=geometry):
                shifted[layer].append(layout_of(geometry).input_rows(geometry, args[0]).flatten(0, -2))

            handle[layer] = layers[layer].register_forward_pre_hook(watch)
        replacement = replace_modules(prepared.model, layers)
        with torch.no_grad():
            for example in examples:
                prepared.model(**example)
        replacement.undo()
        improved = 0
        for layer in names:
            handle[layer].remove()
            weight = get_matrix(prepared.targets[layer].dense)
            P = roots(with_ridge(prepared.targets[layer].grad_covariance()[0].numpy(), DAMPING))[0]
            outputs = np.concatenate(list(dense[layer].values())) @ weight.T
            inputs = torch.cat(shifted[layer]).numpy()
            old, new = (np.square((outputs - inputs @ s[layer].T) @ P).sum() for s in (before, after))
            assert new <= old * (1 + DAMPING), layer
            improved += new < 0.99 * old
        assert improved >= len(names) / 2

    def test_runs_each_model_once_for_each_batch(self, name):
        model, batch = MODELS[name](COUNT)
        batches = split_batch(batch, BATCH_SIZE)
        prepared = prepare(model, batches)
        calls: Counter[str] = Counter()
        model.register_forward_pre_hook(lambda *_: calls.update(["model"]))
        for layer in (layer for group in prepared.groups for layer in group):
            target = prepared.targets[layer]
            for kind, module in (("dense", target.dense), ("factorized", target.layer)):
                module.register_forward_hook(lambda *_, key=f"{kind} {layer}": calls.update([key]))
        plain = type(model).forward
        model.forward = functools.wraps(plain)(lambda **inputs: calls.update(["forward"]) or plain(model, **inputs))
        prepared.refit(batches)
        assert calls.pop("model") == calls.pop("forward") == 2 * len(batches)
        assert set(calls.values()) <= {len(batches)}  # no layer is run twice
        last = prepared.groups[-1]
        behind = {f"{kind} {layer}" for kind in ("dense", "factorized") for layer in last}
        everything = {f"{kind} {layer}" for kind in ("dense", "factorized") for g in prepared.groups for layer in g}
        assert everything - behind <= calls.keys()

    def test_leaves_the_model_as_it_was(self, name):
        model, batch = MODELS[name](COUNT)
        batches = split_batch(batch, BATCH_SIZE)
        prepared = prepare(model, batches)
        model.train()
        list(prepared.targets.values())[-1].dense.eval()
        before = Snapshot(prepared)
        prepared.refit(batches)
        before.check()


class TestTheGroups:
    def test_of_llama_share_query_key_value_and_gate_up(self):
        layer = "model.layers.{}.{}"
        parts = [("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))]
        assert refitted("llama").prepared.groups == [
            tuple(layer.format(index, f"{part}.{key}_proj") for key in keys)
            for index in (0, 1)
            for part, keys in parts
        ]

    def test_of_layers_that_stay_dense_are_left_out(self):
        prepared = refitted("llama").prepared
        kept = {name: t for name, t in prepared.targets.items() if not name.endswith(("k_proj", "o_proj"))}
        groups = refit_groups(prepared.statistics, kept)
        assert {name for group in groups for name in group} == kept.keys()
        assert groups[0] == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
        assert () not in groups

    def test_of_nothing_are_nothing(self):
        prepared = refitted("llama").prepared
        assert refit_groups(prepared.statistics, {}) == []


@pytest.mark.usefixtures("double_products")
class TestTheFit:
    @pytest.fixture
    def bert(self):
        model, batch = in_double(TINY_MODELS["bert-token-classification"])
        return prepare(model, [batch]), batch

    def test_of_layers_that_stay_dense_is_passed_over(self, bert):
        """Layers that are not targets run as they are, in both streams."""
        prepared, batch = bert
        kept = {name: t for name, t in prepared.targets.items() if ".0." not in name or "query" in name}
        partial = prepared._replace(targets=kept, groups=refit_groups(prepared.statistics, kept))
        before = partial.products()
        got = partial.refit([batch])
        assert deviation(got, oracle(partial, before, plain_examples(partial.model, batch))) <= AMPLIFIED

    def test_of_the_first_group_changes_nothing(self, bert):
        """Nothing before it is compressed, so its inputs are the dense ones."""
        prepared, batch = bert
        before, after = prepared.products(), prepared.refit([batch])
        for name, product in before.items():
            same = np.allclose(product, after[name], rtol=0, atol=1e-5 * np.abs(product).max())
            assert same == (name in prepared.groups[0]), name

    def test_at_full_rank_gives_the_dense_weights(self):
        model, batch = in_double(TINY_MODELS["gpt2"])
        prepared = prepare(model, [batch], "two-factor", share=1)
        after = prepared.refit([batch])
        assert deviation(after, {name: get_matrix(t.dense) for name, t in prepared.targets.items()}) <= AMPLIFIED

    @pytest.mark.parametrize("name", ["bert-question-answering", "gpt2", "resnet"])
    def test_does_not_depend_on_the_storage(self, name):
        model, batch = in_double(TINY_MODELS[name])
        two_factor = prepare(model, split_batch(batch, BATCH_SIZE), "two-factor")
        assert deviation(two_factor.refit([batch]), refitted(name).after) <= AMPLIFIED

    def test_keeps_the_biases(self, bert):
        prepared, batch = bert
        prepared.refit([batch])
        assert sum(t.dense.bias is not None for t in prepared.targets.values()) > 10
        assert all(torch.equal(t.dense.bias, t.layer.bias) for t in prepared.targets.values())

    @pytest.mark.parametrize("damping", [0.01, 0.3])
    def test_takes_the_damping_it_is_given(self, bert, damping):
        prepared, batch = bert
        before = prepared.products()
        got = prepared.refit([batch], damping)
        expected = oracle(prepared, before, plain_examples(prepared.model, batch), damping)
        assert deviation(got, expected) <= AMPLIFIED

    @pytest.mark.parametrize("size", [1, 2, 7])
    @pytest.mark.parametrize("name", ["bert-masked-lm", "t5", "resnet", "swin"])
    def test_does_not_depend_on_the_batches(self, name, size):
        case = refitted(name)
        model, batch = in_double(MODELS[name])
        again = prepare(model, split_batch(batch, BATCH_SIZE))
        got = again.refit(split_batch(batch, size)[::-1])
        assert deviation(got, case.after) <= (PARTLY_FLOAT32 if name in ROUNDS_TO_FLOAT32 else AMPLIFIED)

    @pytest.mark.parametrize("chunk", [1, 20])
    @pytest.mark.parametrize("name", ["bert-masked-lm", "resnet"])
    def test_does_not_depend_on_the_rows_of_a_product(self, name, chunk, monkeypatch):
        """One product for all batches, which are small, or several."""
        monkeypatch.setattr("hf_lossless_lr.factors.paired_rows.CHUNK", chunk)
        model, batch = in_double(MODELS[name])
        prepared = prepare(model, split_batch(batch, BATCH_SIZE))
        assert deviation(prepared.refit(split_batch(batch, 2)), refitted(name).after) <= AMPLIFIED

    @pytest.mark.parametrize("name", ["bert-sequence-classification", "bert-multiple-choice", "gpt2", "t5"])
    def test_does_not_depend_on_padding(self, name):
        """Neither on its amount nor on what it contains."""
        case = refitted(name)
        model, batch = in_double(MODELS[name])
        again = prepare(model, split_batch(batch, BATCH_SIZE))
        wider = [padded(part, extra) for part, extra in zip(split_batch(batch, BATCH_SIZE), (0, 4, 9), strict=True)]
        assert deviation(again.refit(wider), case.after) <= (PARTLY_FLOAT32 if name == "t5" else AMPLIFIED)

    def test_is_nearly_the_same_with_products_in_float32(self, monkeypatch):
        model, batch = in_double(TINY_MODELS["vit"])
        prepared = prepare(model, split_batch(batch, BATCH_SIZE))
        monkeypatch.undo()
        assert deviation(prepared.refit([batch]), refitted("vit").after) <= REFIT_FLOAT32

    def test_sees_the_dropout_switched_off(self, bert):
        prepared, batch = bert
        before = prepared.products()
        expected = oracle(prepared, before, plain_examples(prepared.model, batch))
        prepared.model.train()
        assert prepared.model.config.hidden_dropout_prob > 0
        assert deviation(prepared.refit([batch]), expected) <= AMPLIFIED

    def test_of_16_bits_is_not_lost_in_a_large_bias(self):
        """The outputs of the dense model are the bias, up to rounding."""
        model, batch = TINY_MODELS["gpt2"](COUNT)
        model.to(torch.bfloat16)
        large = model.transformer.h[0].attn.c_proj
        with torch.no_grad():
            large.bias.fill_(400)
        prepared = prepare(model, [batch], "two-factor", share=1)
        after = prepared.refit([batch])["transformer.h.0.attn.c_proj"]
        assert np.abs(after - get_matrix(large)).max() <= 0.02 * np.abs(get_matrix(large)).max()

    def test_runs_in_the_context_of_the_caller(self, bert):
        prepared, batch = bert
        variable = contextvars.ContextVar("variable", default="lost")
        seen = set()

        def watch(module, args):
            seen.add(variable.get())
            variable.set("changed in a stream")

        prepared.targets["bert.encoder.layer.0.output.dense"].dense.register_forward_pre_hook(watch)
        variable.set("kept")
        prepared.refit(split_batch(batch, 2))
        assert seen == {"kept"}
        assert variable.get() == "kept"


class TestAutocast:
    """A model whose forward pass switches autocast on, as the Trainer and Accelerate make it."""

    @pytest.fixture
    def prepared(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        batches = split_batch(batch, 2)
        prepared = prepare(model, batches)
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        return prepared, batches

    def test_is_on_in_the_model_alone(self, prepared, monkeypatch):
        prepared, batches = prepared
        states, plain = {"model": set(), "products": set()}, refit_module._products

        def watch(*arguments):
            states["products"].add(torch.is_autocast_enabled("cpu"))
            return plain(*arguments)

        monkeypatch.setattr(refit_module, "_products", watch)
        for target in prepared.targets.values():
            for module in (target.dense, target.layer):
                module.register_forward_hook(lambda *_: states["model"].add(torch.is_autocast_enabled("cpu")))
        prepared.refit(batches)
        assert states == {"model": {True}, "products": {False}}
        assert not torch.is_autocast_enabled("cpu")

    def test_is_off_after_an_exception(self, prepared, monkeypatch):
        prepared, batches = prepared
        monkeypatch.setattr(refit_module, "_solve", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared.refit(batches)
        assert not torch.is_autocast_enabled("cpu")

    def test_of_the_caller_stays_on(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        prepared = prepare(model, [batch])
        with torch.autocast("cpu", torch.bfloat16):
            prepared.refit([batch])
            assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cpu")


def padded(batch, extra):
    """Wider columns; the padding of the inputs is a word like any other."""
    values = {"input_ids": 33, "attention_mask": 0, "labels": IGNORED}
    wide = {k: nn.functional.pad(v, (0, extra), value=values[k]) if v.ndim >= 2 else v for k, v in batch.items()}
    wide["input_ids"] = torch.where(wide["attention_mask"].bool(), wide["input_ids"], 33)
    return wide


# --- what is left alone ---------------------------------------------------------------------------------------------


class Snapshot:
    """Everything about a model and its layers that a refit must leave alone."""

    HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def __init__(self, prepared):
        self.prepared = prepared
        self.modules = {
            path: (id(module), module.training, *self.hooks(module))
            for path, module in prepared.model.named_modules(remove_duplicate=False)
        }
        self.factorized = {name: self.hooks(target.layer) for name, target in prepared.targets.items()}
        self.parameters = {n: (id(p), p.requires_grad, id(p.grad)) for n, p in prepared.model.named_parameters()}
        self.values = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
        self.grad_mode = torch.is_grad_enabled()

    def hooks(self, module):
        return [list(getattr(module, hook).items()) for hook in self.HOOKS]

    def check(self):
        now = Snapshot(self.prepared)
        for what in ("modules", "factorized", "parameters", "grad_mode"):
            assert getattr(now, what) == getattr(self, what), what
        assert now.values.keys() == self.values.keys()
        assert all(torch.equal(now.values[name], value) for name, value in self.values.items())


@pytest.fixture
def streams(monkeypatch):
    """All streams that are made, kept from the garbage collector, which would end them."""
    made = []

    class Recorded(streams_module.Stream):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(streams_module, "Stream", Recorded)
    return made


class TestTheEnd:
    @pytest.fixture
    def prepared(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        batches = split_batch(batch, 2)
        prepared = prepare(model, batches)
        model.train()
        model.bert.encoder.layer[0].eval()
        return prepared, batches

    def test_leaves_no_stream_alive(self, prepared, streams):
        prepared, batches = prepared
        prepared.refit(batches)
        assert len(streams) == 2 * len(batches)
        assert all(stream.dead for stream in streams)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("stage", ["dense", "layer", "first", "solution", "data"])
    def test_after_an_exception_is_the_same(self, prepared, streams, monkeypatch, stage, error):
        prepared, batches = prepared
        calls = []

        def fail_late(*_, at=3):
            calls.append(1)
            if len(calls) == at:
                raise error("broken on purpose")

        target = prepared.targets["bert.encoder.layer.1.attention.output.dense"]
        if stage in ("dense", "layer"):  # the third batch, in the middle of the model
            getattr(target, stage).register_forward_hook(fail_late)
        elif stage == "first":  # the others have not started
            prepared.model.bert.embeddings.register_forward_hook(functools.partial(fail_late, at=1))
        elif stage == "solution":
            solve = refit_module.metric_svd
            monkeypatch.setattr(refit_module, "metric_svd", lambda *a: fail_late() or solve(*a))
        else:
            batches = Failing(batches, error)
        before = Snapshot(prepared)
        with pytest.raises(error, match="broken on purpose"):
            prepared.refit(batches)
        before.check()
        assert all(stream.dead for stream in streams)
        assert len(streams) == (0 if stage == "data" else 2 * len(batches))

    def test_after_numbers_that_are_not_finite_is_the_same(self, prepared, streams):
        prepared, batches = prepared
        list(prepared.targets.values())[4].grad_covariance()[0, 0, 0] = torch.nan
        before = Snapshot(prepared)
        with pytest.raises(NumericalError, match="B has entries that are not finite"):
            prepared.refit(batches)
        before.check()
        assert all(stream.dead for stream in streams)

    def test_comes_at_once_without_groups(self, prepared, streams):
        prepared, batches = prepared
        before, snapshot = prepared.products(), Snapshot(prepared)
        assert not changed(before, prepared._replace(groups=[]).refit(batches))
        snapshot.check()
        assert all(stream.dead for stream in streams)

    def test_leaves_factors_without_a_graph(self, prepared):
        prepared, batches = prepared
        prepared.refit(batches)
        assert torch.is_grad_enabled()
        for target in prepared.targets.values():
            assert all(p.is_leaf and p.requires_grad for p in target.layer.parameters())

    def test_can_be_repeated(self, prepared):
        prepared, batches = prepared
        once = prepared.refit(batches)
        assert (
            deviation(prepared.refit(batches), once) <= REFIT_FLOAT32
        )  # the compressed inputs are those of new factors


class Failing(list):
    """Data whose second batch cannot be read."""

    def __init__(self, batches, error):
        super().__init__(batches)
        self.error = error

    def __getitem__(self, index):
        if index == 1:
            raise self.error("broken on purpose")
        return super().__getitem__(index)


# --- a model that takes another way in some batches -----------------------------------------------------------------

SIZE = 6


class RoutedConfig(PretrainedConfig):
    model_type = "routed"


class Routed(PreTrainedModel):
    """Layers in a row, in an order that each batch names."""

    config_class = RoutedConfig

    def __init__(self, config):
        super().__init__(config)
        for name in "abcd":
            setattr(self, name, nn.Linear(SIZE, SIZE))
        self.post_init()

    def forward(self, x, route, labels=None):
        for name in (chr(int(letter)) for letter in route[0] if letter):
            x = x + self.step(name, x, route)
        return SequenceClassifierOutput(loss=(x - labels).square().mean(), logits=x)

    def step(self, name, x, route):
        return torch.tanh(getattr(self, name)(x))


def routed(routes, model_class=Routed):
    """A model, and one batch of three examples for each route, such as "acd"."""
    torch.manual_seed(0)
    model = model_class(RoutedConfig()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    batches = []
    for index, route in enumerate(routes):
        x, labels = torch.randn(2, 3, SIZE, generator=generator(index)).double()
        codes = torch.tensor([ord(letter) for letter in route.ljust(4, "\0")]).expand(3, 4)
        batches.append({"x": x, "route": codes, "labels": labels})
    return model, batches


# Routes of the batches, and the batches that each layer is fitted to, by number.
ROUTES = {
    "skipped in some": (["abcd", "acd", "abcd", "bcd", "abc"], {"a": "0124", "b": "0234", "c": "01234", "d": "0123"}),
    "in another order in some": (["abcd", "acbd", "abcd"], {"a": "012", "b": "02", "c": "012", "d": "012"}),
    "in reverse in some": (["abcd", "dcba", "abcd"], {"a": "02", "b": "02", "c": "02", "d": "012"}),
    "skipped in the first": (["acd", "abcd"], {"a": "01", "b": "1", "c": "01", "d": "01"}),
    "disjoint": (["ab", "cd", "ab", "cd"], {"c": "13", "d": "13", "a": "02", "b": "02"}),
}


class Careless(Routed):
    """Never calls its second layer once that is factorized."""

    def step(self, name, x, route):
        return x if name == "b" and not isinstance(self.b, nn.Linear) else super().step(name, x, route)


class Eager(Routed):
    """Calls its second layer in every batch once that is factorized."""

    def step(self, name, x, route):
        if name == "a" and not isinstance(self.b, nn.Linear) and ord("b") not in route:
            return super().step("b", x + super().step("a", x, route), route)
        return super().step(name, x, route)


class Picky(Routed):
    """Sends fewer rows to its third layer once its second one is factorized, in batches that go to the fourth."""

    def step(self, name, x, route):
        if name != "c":
            return super().step(name, x, route)
        chosen = torch.arange(len(x)) >= int(not isinstance(self.b, nn.Linear) and bool(route[0, 3]))
        return torch.zeros_like(x).masked_scatter(chosen[:, None], super().step(name, x[chosen], route))


@pytest.mark.usefixtures("double_products")
class TestALayerThatIsReached:
    @pytest.mark.parametrize("case", ROUTES)
    def test_differently_from_batch_to_batch_is_fitted_where_it_is_met_in_turn(self, case, streams):
        routes, batches_of = ROUTES[case]
        model, batches = routed(routes)
        prepared = prepare(model, batches)
        assert prepared.groups == [(name,) for name in batches_of]
        before, snapshot = prepared.products(), Snapshot(prepared)
        expected = oracle(prepared, before, batches, contributes=lambda name, i: str(i) in batches_of[name])
        got = prepared.refit(batches)
        assert deviation(got, expected) <= AMPLIFIED
        snapshot.check()
        assert all(stream.dead for stream in streams)

    @pytest.mark.parametrize(
        ("model_class", "routes", "kept"),
        [
            (Careless, ["abcd"] * 3, "b"),
            (Picky, ["abcd"] * 3, "c"),
            (Picky, ["abc", "abcd", "abc"], "c"),  # some rows would pair
        ],
    )
    def test_in_the_dense_model_alone_or_by_other_rows_keeps_its_factors(self, model_class, routes, kept, streams):
        model, batches = routed(routes, model_class)
        prepared = prepare(model, batches)
        before = prepared.products()
        after = prepared.refit(batches)
        assert changed(before, after) == set("abcd") - {kept}
        assert all(stream.dead for stream in streams)

    def test_in_the_compressed_model_alone_is_not_fitted_to_that_batch(self, streams):
        results = []
        for model_class in (Routed, Eager):
            model, batches = routed(["abcd", "acd", "abcd"], model_class)
            results.append(prepare(model, batches).refit(batches))
        plain, eager = results
        assert np.allclose(eager["b"], plain["b"], rtol=0, atol=AMPLIFIED)
        assert not np.allclose(eager["d"], plain["d"])  # the other way makes a difference
        assert all(stream.dead for stream in streams)

    def test_in_no_batch_keeps_its_factors(self):
        model, batches = routed(["abcd", "acd"])
        prepared = prepare(model, batches)
        before = prepared.products()
        after = prepared.refit(batches[1:])
        assert changed(before, after) == {"a", "c", "d"}


# --- several processes ----------------------------------------------------------------------------------------------

# what builds the model and the batches; two processes get the batches in turn
LAUNCHED = {
    "uneven examples": ("bert-token-classification", 11, 2),
    "an idle process": ("t5", 5, 16),
    "convolutions": ("resnet", 5, 1),
    "shared layers": ("albert", 7, 2),
    "shared layers and an idle process": ("albert", 4, 16),
    "routes": (("abcd", "acd", "acbd", "abcd", "bcd"), 0, 0),
}


def refit_case(name):
    build, count, size = LAUNCHED[name]
    if isinstance(build, tuple):
        model, batches = routed(build)
    else:
        model, batch = in_double(MODELS[build], count)
        batches = split_batch(batch, size)
    return prepare(model, batches).refit(batches)


def with_double_rows(patch):
    patch.setattr("hf_lossless_lr.statistics.streams.real_rows", double_rows)
    patch.setattr("hf_lossless_lr.statistics.collector.real_rows", double_rows)


def refit_cases(folder, process):
    with_double_rows(pytest.MonkeyPatch())
    products = {f"{case}/{k}": torch.from_numpy(v) for case in LAUNCHED for k, v in refit_case(case).items()}
    save_file(products, folder / f"{process}.safetensors")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(refit_cases, folder)
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@needs_processes
class TestTwoProcesses:
    @pytest.mark.parametrize("case", LAUNCHED)
    def test_give_what_one_process_gives(self, case, launched, monkeypatch):
        with_double_rows(monkeypatch)
        expected = refit_case(case)
        for products in launched:
            got = {name: products[f"{case}/{name}"].numpy() for name in expected}
            assert deviation(got, expected) <= (PARTLY_FLOAT32 if case == "an idle process" else AMPLIFIED)

    def test_have_the_same_result_to_the_last_bit(self, launched):
        mine, others = launched
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_the_models_have_padding_to_get_wrong():
    for name in ("bert-token-classification", "bert-multiple-choice", "gpt2"):
        assert 0 < MODELS[name](COUNT)[1]["attention_mask"].float().mean() < 1
    assert (t5(COUNT)[1]["labels"] == IGNORED).any()
