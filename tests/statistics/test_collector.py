"""Calibration statistics against a slow double-precision oracle, and everything that must not change them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.padded_models import unfused_experts
from support.processes import accelerator, in_two_processes, loader_of, needs_processes
from support.statistics_oracle import ROUNDS_TO_FLOAT32, Oracle, double_rows, slow_statistics, unpadded_examples
from support.tiny_models import (
    IGNORED,
    LENGTH,
    TINY_MODELS,
    albert,
    bert_sequence_classification,
    bert_token_classification,
    gpt2,
    llama,
    rows,
    split_batch,
    t5,
    t5_equal_lengths,
    vit,
)
from support.tolerances import BFLOAT16_MODEL, EXACT, FLOAT32, FLOAT32_MODEL, PARTLY_FLOAT32, ROUNDING
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_lossless_lr.data.forward import forward_loss
from hf_lossless_lr.errors import DataError, NumericalError, TargetError
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.statistics.collect import collect_statistics
from hf_lossless_lr.statistics.records import CalibrationStatistics

pytestmark = pytest.mark.numerical

COUNT = 7

# the tiny models whose loss does not depend on padding (question answering has logits for it, multiple choice is 3-d)
ORACLE_MODELS = {
    **{
        name: build
        for name, build in TINY_MODELS.items()
        if name not in ("bert-question-answering", "bert-multiple-choice")
    },
    "t5-equal-lengths": t5_equal_lengths,
}


def targets_of(model):
    return find_targets(model, ["Conv2d"] if "ResNet" in type(model).__name__ else None).chosen


def collect(model, batches, targets=None, weight_grads=True) -> CalibrationStatistics:
    targets = targets or targets_of(model)
    return collect_statistics(model, targets, loader_of(batches), accelerator(), weight_grads)


def in_double(build: Callable, count: int = COUNT):
    """A model and a batch in double precision, so that a comparison shows errors and not rounding."""
    model, batch = build(count)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def limit(model) -> float:
    """Tolerance for a model in double precision; the loss of a causal model rounds its logits to float32."""
    return PARTLY_FLOAT32 if model.config.model_type in (*ROUNDS_TO_FLOAT32, "gpt2") else ROUNDING


def with_double_rows(patch: pytest.MonkeyPatch) -> None:
    """Products in double precision, so that a comparison shows errors and not rounding."""
    patch.setattr("hf_lossless_lr.statistics.collector.real_rows", double_rows)


@pytest.fixture
def double_products(monkeypatch):
    with_double_rows(monkeypatch)


def check_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Compare by the largest deviation, relative to the largest entry."""
    assert got.shape == expected.shape, what
    scale = expected.abs().max()
    assert scale > 0, f"{what} is zero, so the comparison says nothing"
    assert (got.double() - expected.double()).abs().max() <= tolerance * scale, what


def check_same(got: CalibrationStatistics, expected: CalibrationStatistics, tolerance: float) -> None:
    assert list(got.layers) == list(expected.layers)
    assert (got.examples, got.units) == (expected.examples, expected.units)
    of_loss = max(tolerance, FLOAT32) if tolerance else EXACT  # a batch's loss is rounded to float32
    assert got.loss == pytest.approx(expected.loss, rel=of_loss)
    for name, layer in expected.layers.items():
        mine = got.layers[name]
        assert (mine.tokens, mine.units) == (layer.tokens, layer.units), name
        for field in ("weight_grad", "input_covariance", "grad_covariance"):
            check_close(getattr(mine, field), getattr(layer, field), tolerance, f"{field} of {name}")


class Pair(NamedTuple):
    """Statistics of a padded set in batches of three, and the oracle's."""

    got: CalibrationStatistics  # with products in double precision
    rounded: CalibrationStatistics  # with the package's own
    oracle: Oracle
    tolerance: float


@pytest.fixture(scope="module", params=ORACLE_MODELS)
def pair(request):
    model, batch = in_double(ORACLE_MODELS[request.param])
    rounded = collect(model, split_batch(batch, 3))
    with pytest.MonkeyPatch.context() as patch:
        with_double_rows(patch)
        got = collect(model, split_batch(batch, 3))
    oracle = slow_statistics(model, list(got.layers), unpadded_examples(model, batch))
    return Pair(got, rounded, oracle, limit(model))


class TestAgainstTheOracle:
    @pytest.mark.parametrize("field", ["weight_grad", "input_covariance", "grad_covariance"])
    def test_the_matrices_are_exact(self, pair, field):
        got, _, oracle, tolerance = pair
        for name, expected in getattr(oracle, field).items():
            check_close(getattr(got.layers[name], field)[0], expected, tolerance, f"{field} of {name}")

    @pytest.mark.parametrize("field", ["weight_grad", "input_covariance", "grad_covariance"])
    def test_the_packages_own_products_are_rounded_to_float32_and_no_further(self, pair, field):
        for name, expected in getattr(pair.oracle, field).items():
            check_close(getattr(pair.rounded.layers[name], field)[0], expected, PARTLY_FLOAT32, f"{field} of {name}")

    def test_the_counts_are_exact(self, pair):
        got, _, oracle, _ = pair
        assert {name: layer.tokens for name, layer in got.layers.items()} == oracle.tokens
        assert {layer.units for layer in got.layers.values()} == {got.units} == {oracle.units}
        assert got.examples == COUNT

    def test_the_loss_is_the_mean_over_labelled_units(self, pair):
        got, _, oracle, _ = pair
        assert got.loss == pytest.approx(oracle.loss, rel=FLOAT32)  # a batch's loss is rounded to it

    def test_the_matrices_are_float64_and_shaped_as_the_weight_matrix(self, pair):
        for layer in pair.got.layers.values():
            groups, size_out, size_in = layer.weight_grad.shape
            assert groups == 1
            assert layer.input_covariance.shape == (groups, size_in, size_in)
            assert layer.grad_covariance.shape == (groups, size_out, size_out)
            assert {layer.weight_grad.dtype, layer.input_covariance.dtype, layer.grad_covariance.dtype} == {
                torch.float64
            }


def test_conv1d_matrices_have_outputs_as_rows():
    model, batch = gpt2()
    layer = collect(model, [batch]).layers["transformer.h.0.mlp.c_fc"]
    assert layer.weight_grad.shape == (1, 48, 32)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "name"),
    [
        *((torch.float32, FLOAT32_MODEL, name) for name in TINY_MODELS),
        *((torch.bfloat16, BFLOAT16_MODEL, name) for name in ("bert-sequence-classification", "llama", "gpt2", "vit")),
    ],
)
def test_a_model_of_lower_precision_has_nearly_the_same_statistics(dtype, tolerance, name):
    model, batch = TINY_MODELS[name](COUNT)
    model = model.to(dtype)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    got = collect(model, split_batch(cast, 3))
    assert all(parameter.dtype is dtype for parameter in model.parameters())
    exact = {k: v.double() if v.is_floating_point() else v for k, v in cast.items()}
    check_same(got, collect(model.double(), split_batch(exact, 3)), tolerance)


@pytest.mark.parametrize("masked", [True, False])
def test_products_of_a_model_of_lower_precision_are_not_rounded_to_it(masked):
    model, batch = bert_sequence_classification(COUNT)
    layer = model.to(torch.bfloat16).bert.encoder.layer[0].output.dense
    seen = {}

    def watch(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda grad: seen.update(g=grad))

    layer.register_forward_hook(watch)
    if not masked:
        batch["attention_mask"][:] = 1
    got = collect(model, [batch], {"layer": layer}).layers["layer"]
    real = batch["attention_mask"].bool()
    x, g = (seen[name][real].double() for name in "xg")
    check_close(got.input_covariance[0], x.T @ x / len(x), FLOAT32, "input_covariance")
    check_close(got.grad_covariance[0], g.T @ g / COUNT, FLOAT32, "grad_covariance")


@pytest.mark.usefixtures("double_products")
class TestInvariance:
    @pytest.mark.parametrize("size", [1, 2, 4])
    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_to_the_batch_size(self, name, size):
        model, batch = in_double(TINY_MODELS[name])
        assert COUNT % size or size == 1  # the last batch is smaller
        check_same(collect(model, split_batch(batch, size)), collect(model, [batch]), limit(model))

    @pytest.mark.parametrize("name", ["bert-sequence-classification", "bert-token-classification", "llama", "gpt2"])
    def test_to_the_amount_of_padding(self, name):
        model, batch = in_double(TINY_MODELS[name])
        expected = collect(model, split_batch(batch, 3))
        assert expected.layers[next(iter(expected.layers))].tokens == int(batch["attention_mask"].sum())
        wider = [padded(part, extra) for part, extra in zip(split_batch(batch, 3), (0, 5, 11), strict=True)]
        check_same(collect(model, wider), expected, limit(model))

    @pytest.mark.parametrize(("inputs", "targets"), [(4, 0), (0, 4), (3, 5)])
    def test_to_the_amount_of_padding_on_both_sides_of_an_encoder_decoder(self, inputs, targets):
        model, batch = in_double(t5)
        check_same(collect(model, [padded(batch, inputs, targets)]), collect(model, [batch]), limit(model))

    def test_to_the_amount_of_padding_of_choices(self):
        model, batch = in_double(TINY_MODELS["bert-multiple-choice"])
        check_same(collect(model, [padded(batch, 4)]), collect(model, [batch]), limit(model))

    def test_to_the_side_of_the_padding(self):
        model, batch = in_double(llama)
        batch["labels"][:, 0] = IGNORED  # else padding on the left would predict each first token
        shifts = (batch["attention_mask"] == 0).sum(1).tolist()
        left = {k: torch.stack([r.roll(s) for r, s in zip(v, shifts, strict=True)]) for k, v in batch.items()}
        assert left["attention_mask"][1, 0] == 0
        check_same(collect(model, split_batch(left, 3)), collect(model, [batch]), limit(model))

    def test_to_the_content_of_the_padding(self):
        model, batch = in_double(bert_token_classification)
        other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 33)}
        check_same(collect(model, [other]), collect(model, [batch]), limit(model))

    def test_to_an_explicit_decoder_mask(self):
        model, batch = in_double(t5)
        explicit = batch | {"decoder_attention_mask": (batch["labels"] != IGNORED).long()}
        check_same(collect(model, [explicit]), collect(model, [batch]), limit(model))

    @pytest.mark.parametrize("name", ["bert-token-classification", "llama"])
    def test_to_a_batch_of_its_own_for_an_example_without_labels(self, name):
        """Alone, the example's loss is NaN; it still has tokens, but adds nothing to loss, units and gradients."""
        model, batch = in_double(TINY_MODELS[name])
        batch["labels"][2] = IGNORED
        assert forward_loss(model, rows(batch, slice(2, 3)), 0).units == 0
        check_same(collect(model, split_batch(batch, 1)), collect(model, [batch]), limit(model))

    def test_to_the_order_of_the_batches(self):
        model, batch = in_double(llama)
        batches = split_batch(batch, 2)
        check_same(collect(model, batches[::-1]), collect(model, batches), limit(model))

    @pytest.mark.parametrize("name", ["llama", "t5", "albert", "swin"])
    def test_of_a_layer_to_the_other_targets(self, name):
        model, batch = in_double(TINY_MODELS[name])
        everything = collect(model, [batch])
        for chosen in (next(iter(everything.layers)), list(everything.layers)[-1]):
            alone = collect(model, [batch], {chosen: model.get_submodule(chosen)})
            for field in ("weight_grad", "input_covariance", "grad_covariance"):
                got, expected = getattr(alone.layers[chosen], field), getattr(everything.layers[chosen], field)
                check_close(got, expected, limit(model), f"{field} of {chosen}")

    def test_to_layers_that_share_their_input_in_some_batches_only(self):
        model, batch = in_double(bert_sequence_classification)
        expected = collect(model, [batch])
        calls, targets = [], targets_of(model)

        def copy_every_second(module, args):
            calls.append(1)
            return (args[0].clone(),) if len(calls) % 2 else args

        model.bert.encoder.layer[0].attention.self.key.register_forward_pre_hook(copy_every_second)
        check_same(collect(model, split_batch(batch, 2), targets), expected, limit(model))
        assert len(calls) == 4

    def test_to_frozen_embeddings(self):
        model, batch = in_double(bert_sequence_classification)
        expected = collect(model, [batch])
        model.bert.embeddings.requires_grad_(False)
        check_same(collect(model, [batch]), expected, limit(model))

    def test_to_training_mode(self):
        model, batch = in_double(bert_sequence_classification)
        assert model.config.hidden_dropout_prob > 0
        expected = collect(model, [batch])
        check_same(collect(model.train(), [batch]), expected, limit(model))

    def test_to_a_surrounding_no_grad(self):
        model, batch = in_double(bert_sequence_classification)
        with torch.no_grad():
            got = collect(model, [batch])
        check_same(got, collect(model, [batch]), limit(model))

    def test_to_gradients_that_were_there_before(self):
        model, batch = in_double(bert_sequence_classification)
        expected = collect(model, [batch])
        model(**batch).loss.backward()
        check_same(collect(model, [batch]), expected, limit(model))

    @pytest.mark.parametrize("name", ["bert-sequence-classification", "llama", "t5"])
    def test_to_gradient_checkpointing(self, name):
        model, batch = in_double(TINY_MODELS[name])
        expected = collect(model, [batch])
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()  # the second is the older name
        check_same(collect(model.train(), split_batch(batch, 3)), expected, limit(model))

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("name", ["bert-sequence-classification", "llama"])
    def test_to_a_layer_that_repeats_its_forward_pass_even_in_evaluation_mode(self, name, reentrant):
        model, batch = in_double(TINY_MODELS[name])
        expected = collect(model, [batch])
        layer = model.base_model.encoder.layer[1] if "bert" in name else model.base_model.layers[1]
        calls, plain = [], layer.forward

        def repeated(*args, **kwargs):
            calls.append(1)
            return plain(*args, **kwargs)

        layer.forward = lambda x, *args, **kwargs: checkpoint(
            partial(repeated, **kwargs), x, *args, use_reentrant=reentrant
        )
        check_same(collect(model, split_batch(batch, 3)), expected, limit(model))
        assert len(calls) == 3 * 3  # in each batch once forward, and once again for the gradients of G and of B


def padded(batch, inputs: int, targets: int | None = None):
    """Wider columns; `targets` are the extra columns of the labels where they differ from those of the inputs."""
    targets = inputs if targets is None else targets
    extra = {"input_ids": (inputs, 0), "attention_mask": (inputs, 0), "labels": (targets, IGNORED)}
    return {
        k: nn.functional.pad(v, (0, extra[k][0]), value=extra[k][1]) if v.ndim >= 2 else v for k, v in batch.items()
    }


class TestSharedInputs:
    @pytest.mark.parametrize(
        ("build", "groups"),
        [
            (
                llama,
                [
                    [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"],
                    [f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")],
                    ["model.layers.0.self_attn.o_proj"],
                    ["model.layers.0.mlp.down_proj"],
                    [f"model.layers.1.self_attn.{p}_proj" for p in "qkv"],
                ],
            ),
            (
                t5,
                [
                    [f"encoder.block.1.layer.0.SelfAttention.{p}" for p in "qkv"],
                    [f"decoder.block.1.layer.0.SelfAttention.{p}" for p in "qkv"],
                    [f"decoder.block.{block}.layer.1.EncDecAttention.{p}" for block in (0, 1) for p in "kv"],
                    ["decoder.block.0.layer.1.EncDecAttention.q"],
                ],
            ),
            (vit, [[f"vit.layers.0.attention.{p}_proj" for p in "qkv"], ["vit.layers.0.mlp.fc1"]]),
            (
                albert,
                [
                    [
                        f"albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{p}"
                        for p in ("query", "key", "value")
                    ],
                    ["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"],
                ],
            ),
        ],
    )
    def test_have_one_matrix_and_different_inputs_have_different_ones(self, build, groups):
        model, batch = build()
        layers = collect(model, split_batch(batch, 2)).layers
        seen = {}
        for group in groups:
            assert len({id(layers[name].input_covariance) for name in group}) == 1
            seen.setdefault(id(layers[group[0]].input_covariance), group)
            for name, layer in layers.items():
                if name not in group:
                    assert layer.input_covariance is not layers[group[0]].input_covariance, name
        assert len(seen) == len(groups)

    def test_are_multiplied_once(self, monkeypatch):
        model, batch = llama()
        products = []
        monkeypatch.setattr(
            "hf_lossless_lr.statistics.collector.real_rows",
            lambda rows, mask, positions=None: products.append(rows.shape[-1]) or rows.flatten(0, -2).float(),
        )
        collect(model, [batch])
        gradients = len(targets_of(model))
        inputs = 2 * 4  # in each layer: q k v, o, gate up, down
        assert len(products) == gradients + inputs

    def test_of_convolutions_are_not_mixed_up(self):
        """Two convolutions of one input see different patches of it."""
        model, batch = TINY_MODELS["resnet"]()
        layers = collect(model, [batch]).layers
        first_layer = "resnet.encoder.stages.1.layers.0"
        shortcut = layers[f"{first_layer}.shortcut.convolution"]
        reduction = layers[f"{first_layer}.layer.0.convolution"]
        assert shortcut.input_covariance.shape == reduction.input_covariance.shape
        assert shortcut.tokens != reduction.tokens

    def test_of_a_layer_called_several_times_are_all_counted(self):
        model, batch = albert()
        layers = collect(model, [batch]).layers
        tokens = int(batch["attention_mask"].sum())
        assert layers["albert.encoder.embedding_hidden_mapping_in"].tokens == tokens
        assert layers["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"].tokens == 3 * tokens


class TestGroups:
    """Layers of the same input, in the order of the forward pass."""

    def test_of_llama_share_query_key_value_and_gate_up(self):
        model, batch = llama()
        assert collect(model, split_batch(batch, 2)).groups == tuple(
            tuple(f"model.layers.{layer}.{part}_proj" for part in parts)
            for layer in (0, 1)
            for parts in (
                ("self_attn.q", "self_attn.k", "self_attn.v"),
                ("self_attn.o",),
                ("mlp.gate", "mlp.up"),
                ("mlp.down",),
            )
        )

    def test_of_an_encoder_decoder_keep_both_stacks_and_the_shared_encoder_output_apart(self):
        model, batch = t5_equal_lengths()
        groups = collect(model, [batch]).groups
        across = tuple(f"decoder.block.{block}.layer.1.EncDecAttention.{p}" for block in (0, 1) for p in "kv")
        assert across in groups
        order = [group[0] for group in groups]
        assert order.index(across[0]) > order.index("encoder.block.1.layer.1.DenseReluDense.wo")
        assert order.index("decoder.block.0.layer.1.EncDecAttention.q") < order.index(across[0])
        assert order.index(across[0]) < order.index("decoder.block.0.layer.1.EncDecAttention.o")

    @pytest.mark.parametrize("name", [name for name in TINY_MODELS if name != "albert"])
    def test_have_each_target_once(self, name):
        model, batch = TINY_MODELS[name]()
        groups = collect(model, split_batch(batch, 2)).groups
        assert sorted(layer for group in groups for layer in group) == sorted(targets_of(model))
        if name == "resnet":  # two convolutions of one input, with the same geometry in the first stage alone
            assert [len(group) for group in groups].count(2) == 1

    def test_leave_out_layers_that_are_called_several_times_in_a_pass(self):
        model, batch = albert()
        assert collect(model, split_batch(batch, 2)).groups == (("albert.encoder.embedding_hidden_mapping_in",),)

    def test_leave_out_a_layer_that_is_called_several_times_in_one_batch_alone(self):
        model, batch = bert_sequence_classification()
        attention, calls, targets = model.bert.encoder.layer[0].attention.self, [], targets_of(model)

        def call_again_in_the_second_batch(module, args, output):
            calls.append(1)
            if len(calls) == 2:
                attention.value(args[0].clone())

        attention.key.register_forward_hook(call_again_in_the_second_batch)
        groups = collect(model, split_batch(batch, 2), targets).groups
        prefix = "bert.encoder.layer.0.attention.self."
        assert groups[0] == (prefix + "query", prefix + "key")
        assert prefix + "value" not in {name for group in groups for name in group}

    def test_leave_out_layers_that_share_their_input_in_some_batches_only(self):
        model, batch = bert_sequence_classification()
        calls, targets = [], targets_of(model)

        def copy_in_the_second_batch(module, args):
            calls.append(1)
            return (args[0].clone(),) if len(calls) == 2 else args

        attention = model.bert.encoder.layer[0].attention.self
        attention.key.register_forward_pre_hook(copy_in_the_second_batch)
        groups = collect(model, split_batch(batch, 2), targets).groups
        assert groups[0] == ("bert.encoder.layer.0.attention.output.dense",)
        assert len({name for group in groups for name in group}) == len(targets) - 3

    def test_have_a_layer_that_the_first_batch_skips(self):
        model, batch = bert_sequence_classification()
        layer, calls = model.bert.encoder.layer[0], []
        plain = layer.forward

        def skip_in_the_first_batch(x, *args, **kwargs):
            calls.append(1)
            return x if len(calls) == 1 else plain(x, *args, **kwargs)

        layer.forward = skip_in_the_first_batch
        groups = collect(model, split_batch(batch, 2)).groups
        assert sorted(name for group in groups for name in group) == sorted(targets_of(model))

    def test_are_of_the_targets_alone(self):
        model, batch = llama()
        names = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.q_proj"]
        groups = collect(model, [batch], {name: model.get_submodule(name) for name in names}).groups
        assert groups == ((names[2], names[1]), (names[0],))


class Snapshot:
    """Everything about a model that collecting must leave alone."""

    def __init__(self, model):
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self.modules = {
            name: (id(module), module.training, *(list(getattr(module, hook).items()) for hook in hooks))
            for name, module in model.named_modules()
        }
        self.parameters = {
            name: (id(p), p.requires_grad, id(p.grad), p._backward_hooks) for name, p in model.named_parameters()
        }
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.model = model

    def check(self):
        now = Snapshot(self.model)
        assert now.modules == self.modules
        assert now.parameters == self.parameters
        for mine, before in ((now.values, self.values), (now.grads, self.grads)):
            assert mine.keys() == before.keys()
            assert all(torch.equal(mine[name], before[name]) for name in before)


class TestTheModel:
    @pytest.fixture
    def used(self):
        """A model in the middle of a user's work: mixed modes, frozen parts, gradients, hooks; and a batch."""
        model, batch = bert_sequence_classification()
        model(**batch).loss.backward()
        model.bert.encoder.layer[0].zero_grad()
        model.bert.embeddings.requires_grad_(False)
        model.train()
        model.bert.encoder.layer[1].eval()
        model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
        return model, batch

    def test_is_left_as_it_was(self, used):
        model, batch = used
        before = Snapshot(model)
        collect(model, split_batch(batch, 4))
        before.check()

    @pytest.mark.parametrize("name", ["t5", "resnet"])
    def test_is_left_as_it_was_whatever_its_kind(self, name):
        model, batch = TINY_MODELS[name]()
        before = Snapshot(model.train())
        collect(model, [batch])
        before.check()

    @pytest.mark.parametrize("stage", ["forward", "backward"])
    def test_is_left_as_it_was_after_an_exception(self, used, stage):
        model, batch = used
        calls = []

        def fail(*_):
            raise RuntimeError("broken on purpose")

        def break_in_second_batch(module, args, output):
            calls.append(1)
            if len(calls) == 2:
                fail() if stage == "forward" else output.register_hook(fail)

        model.bert.encoder.layer[1].output.dense.register_forward_hook(break_in_second_batch)
        before = Snapshot(model)
        with pytest.raises(RuntimeError, match="broken on purpose"):
            collect(model, split_batch(batch, 2))
        before.check()

    def test_is_left_as_it_was_after_bad_data(self, used):
        model, batch = used
        batches = split_batch(batch, 2)
        del batches[1]["labels"]
        before = Snapshot(model)
        with pytest.raises(DataError, match="no labels"):
            collect(model, batches)
        before.check()

    def test_is_left_as_it_was_when_the_loader_cannot_be_prepared(self, used, monkeypatch):
        model, batch = used
        broken = accelerator()
        monkeypatch.setattr(broken, "prepare", lambda loader: next(iter(())))
        before = Snapshot(model)
        with pytest.raises(StopIteration):
            collect_statistics(model, targets_of(model), loader_of([batch]), broken)
        before.check()

    def test_gives_the_same_statistics_twice(self, used):
        model, batch = used
        check_same(collect(model, [batch]), collect(model, [batch]), EXACT)


class TestRefusal:
    def test_of_a_loss_that_is_not_finite_names_the_batch(self):
        model, batch = vit()
        batch["pixel_values"][4] = torch.nan
        with pytest.raises(NumericalError, match="batch 2: the loss is nan; check the labels and the inputs"):
            collect(model, split_batch(batch, 2))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_of_a_gradient_that_is_not_finite_names_the_batch_and_the_layer(self, value):
        model, batch = bert_sequence_classification()
        calls = []

        def spoil(module, args, output):
            calls.append(1)
            if len(calls) == 3:
                output.register_hook(lambda grad: grad * value)

        model.bert.encoder.layer[0].output.dense.register_forward_hook(spoil)
        targets = {"bert.encoder.layer.0.output.dense": model.bert.encoder.layer[0].output.dense}
        with pytest.raises(
            NumericalError, match=r"batch 2: the gradient of 'bert.encoder.layer.0.output.dense' is not finite"
        ):
            collect(model, split_batch(batch, 2), targets)

    def test_of_labels_that_are_all_ignored(self):
        model, batch = llama()
        batch["labels"][:] = IGNORED
        with pytest.raises(DataError, match="no batch has a labelled unit: every label is -100"):
            collect(model, split_batch(batch, 2))

    def test_of_layers_none_of_which_is_ever_called(self):
        model, batch = bert_sequence_classification()
        model.bert.unused, model.bert.idle = nn.Linear(3, 2), nn.Linear(3, 2)
        targets = {f"bert.{name}": getattr(model.bert, name) for name in ("unused", "idle")}
        with pytest.raises(TargetError, match=r"none of the chosen layers was called .*\(bert.unused, bert.idle\)"):
            collect(model, [batch], targets)

    def test_of_data_without_labels(self):
        model, batch = bert_sequence_classification()
        del batch["labels"]
        with pytest.raises(DataError, match="the data has no labels"):
            collect(model, [batch])

    def test_of_a_model_without_a_loss(self):
        model, batch = bert_sequence_classification()
        model.forward = lambda labels=None, **inputs: type(model).forward(model, **inputs)
        with pytest.raises(DataError, match="batch 0: BertForSequenceClassification returned no loss"):
            collect(model, [batch])


class TestForwardLoss:
    def test_is_in_float32_for_a_model_of_lower_precision(self):
        model, batch = bert_sequence_classification()
        loss, _, units, *_ = forward_loss(model.to(torch.bfloat16), batch, 0)
        assert (loss.dtype, units) == (torch.float32, len(batch["labels"]))

    def test_builds_no_cache(self):
        model, batch = llama()
        assert model.config.use_cache
        assert forward_loss(model, batch, 0)[1].past_key_values is None

    def test_does_not_override_the_batch(self):
        model, batch = llama()
        assert forward_loss(model, batch | {"use_cache": True}, 0)[1].past_key_values is not None


class TestTheFingerprint:
    def fingerprint(self, batches):
        return collect(self.model, batches, self.targets).data_fingerprint

    @pytest.fixture(autouse=True)
    def _model(self):
        self.model, self.batch = bert_sequence_classification()
        name = "bert.encoder.layer.1.output.dense"
        self.targets = {name: self.model.get_submodule(name)}
        self.batches = split_batch(self.batch, 2)
        self.expected = self.fingerprint(self.batches)

    def test_is_that_of_the_data_alone(self):
        with torch.no_grad():
            self.model.classifier.weight.zero_()
        assert self.fingerprint(split_batch(self.batch, 2)) == self.expected
        assert len(self.expected) == 64

    def test_does_not_depend_on_the_order_of_the_batches(self):
        assert self.fingerprint(self.batches[::-1]) == self.expected

    @pytest.mark.parametrize("column", ["input_ids", "attention_mask", "labels"])
    def test_changes_with_one_value_of_any_column(self, column):
        self.batches[1][column] = self.batches[1][column].clone()
        value = self.batches[1][column].view(-1)
        value[0] = 1 - value[0].clamp(max=1)
        assert self.fingerprint(self.batches) != self.expected

    def test_changes_when_a_batch_is_left_out_or_repeated(self):
        fingerprints = {self.fingerprint(self.batches[:-1]), self.fingerprint([*self.batches, self.batches[0]])}
        assert len(fingerprints | {self.expected}) == 3


# name of the case: model, examples, batch size; two processes get its batches in turn
LAUNCHED = {
    "uneven examples": (bert_token_classification, 11, 2),  # 6 and 5 examples, in three batches each
    "uneven batches": (llama, 10, 4),  # two batches, and the ragged one
    "an idle process": (t5, 7, 16),  # one batch
    "shared layers": (albert, 9, 2),
    "shared layers and an idle process": (albert, 4, 16),
    "convolutions": (TINY_MODELS["resnet"], 5, 1),
    "experts that one process never calls": (partial(unfused_experts, seed=1), 2, 1),  # each misses another one
}


def collect_case(name: str) -> CalibrationStatistics:
    build, count, size = LAUNCHED[name]
    model, batch = in_double(build, count)
    return collect(model, split_batch(batch, size))


def collect_cases(folder: Path, process: int) -> None:
    """What each launched process runs: all cases, saved under the number of the process."""
    with_double_rows(pytest.MonkeyPatch())
    tensors, facts = {}, {}
    for case in LAUNCHED:
        statistics = collect_case(case)
        facts[case] = [
            statistics.examples,
            statistics.units,
            statistics.loss,
            statistics.data_fingerprint,
            {name: [layer.tokens, layer.units] for name, layer in statistics.layers.items()},
            statistics.groups,
        ]
        for name, layer in statistics.layers.items():
            for field in ("weight_grad", "input_covariance", "grad_covariance"):
                tensors[f"{case}/{name}/{field}"] = getattr(layer, field).clone(memory_format=torch.contiguous_format)
    save_file(tensors, folder / f"{process}.safetensors")
    (folder / f"{process}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(collect_cases, folder)
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in (0, 1)
    ]


@needs_processes
@pytest.mark.usefixtures("double_products")
class TestTwoProcesses:
    @pytest.mark.parametrize("case", LAUNCHED)
    def test_give_what_one_process_gives(self, case, launched):
        expected, tolerance = collect_case(case), limit(LAUNCHED[case][0]()[0])
        for tensors, facts in launched:
            examples, units, loss, fingerprint, counts, _ = facts[case]
            assert (examples, units, fingerprint) == (expected.examples, expected.units, expected.data_fingerprint)
            assert loss == pytest.approx(expected.loss, rel=FLOAT32)
            assert counts == {name: [layer.tokens, layer.units] for name, layer in expected.layers.items()}
            for name, layer in expected.layers.items():
                for field in ("weight_grad", "input_covariance", "grad_covariance"):
                    what = f"{case}/{name}/{field}"
                    check_close(tensors[what], getattr(layer, field), tolerance, what)

    @pytest.mark.parametrize("case", LAUNCHED)
    def test_have_the_groups_of_one_process(self, case, launched):
        expected = [list(group) for group in collect_case(case).groups]
        assert len(expected) > 0
        assert [facts[case][-1] for _, facts in launched] == [expected, expected]

    def test_have_the_same_result_to_the_last_bit(self, launched):
        (tensors, facts), (others, other_facts) = launched
        assert facts == other_facts
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_the_models_of_the_oracle_have_padding_to_get_wrong():
    for name, build in ORACLE_MODELS.items():
        batch = build(COUNT)[1]
        if "attention_mask" in batch:
            assert 0 < batch["attention_mask"].float().mean() < 1, name
    assert t5_equal_lengths()[1]["labels"].shape[1] == LENGTH


class TestWithoutGradientsOfWeights:
    """`G` is collected only where it is asked for; nothing else changes, and no weight gets a gradient."""

    @pytest.mark.parametrize(
        "make", [bert_sequence_classification, albert, gpt2, llama, vit], ids=lambda make: make.__name__
    )
    def test_the_second_moments_are_the_same(self, make):
        model, batch = make()
        batches = split_batch(batch, 2)
        with_gradients, without = collect(model, batches), collect(model, batches, weight_grads=False)
        assert with_gradients.layers.keys() == without.layers.keys()
        for name, layer in without.layers.items():
            assert layer.weight_grad is None
            for field in ("input_covariance", "grad_covariance"):
                torch.testing.assert_close(getattr(layer, field), getattr(with_gradients.layers[name], field))

    def test_no_weight_requires_a_gradient_meanwhile(self, monkeypatch):
        model, batch = llama()
        required = []
        model.lm_head.register_forward_hook(
            lambda *_: required.append([name for name, p in model.named_parameters() if p.requires_grad])
        )
        collect(model, [batch], weight_grads=False)
        assert required == [[]] * len(required) != []
