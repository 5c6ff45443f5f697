"""Projections of attention as linear layers of their own: exactly the same function, and back."""

import pytest
import torch
from support.tiny_models import VOCABULARY, build, text_inputs
from support.tolerances import BFLOAT16, FLOAT32
from torch import nn

from hf_lossless_lr.errors import TargetError
from hf_lossless_lr.layers import find_targets, in_place, replace_modules, unfuse, unfused
from hf_lossless_lr.layers.unfusing import why_fused

WIDTH, HEADS = 16, 4
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]


def check_close(x, y, tolerance=FLOAT32):
    torch.testing.assert_close(x, y, rtol=0, atol=tolerance * float(y.detach().abs().max()))


def with_random_weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def xlnet(kind="Model"):
    sizes = {"d_model": 32, "n_head": 4, "n_layer": 2, "d_inner": 48, "mem_len": 4}
    return with_random_weights(build(f"XLNet{kind}", "XLNetConfig", vocab_size=VOCABULARY, **sizes))


def attention(**options):
    return with_random_weights(nn.MultiheadAttention(WIDTH, HEADS, **options))


class TestHeads:
    """XLNet's attention, whose weights have an axis of heads."""

    def one_stream(self):
        return text_inputs(3) | {"token_type_ids": torch.arange(3 * 9).reshape(3, 9) % 2}

    def two_streams(self):
        batch, targets = text_inputs(3), torch.zeros(3, 2, 9)
        targets[:, 0, 1] = targets[:, 1, 4] = 1
        unseen = torch.zeros(3, 9, 9)
        unseen[:, :, [1, 4]] = 1
        return {**batch, "perm_mask": unseen, "target_mapping": targets}

    @pytest.mark.parametrize("inputs", ["one_stream", "two_streams"])
    def test_a_model_answers_and_learns_as_before(self, inputs):
        model, batch = xlnet(), getattr(self, inputs)()
        expected = model(**batch, output_attentions=True)
        expected.last_hidden_state.square().sum().backward()
        heads = unfuse(model)
        assert list(heads) == ["layer.0.rel_attn", "layer.1.rel_attn"]
        fused = {name: model.get_submodule(name) for name in heads}
        gradients = {f"{name}.{letter}": getattr(m, letter).grad for name, m in fused.items() for letter in "qkvo"}
        with in_place(model, heads):
            found = model(**batch, output_attentions=True)
            found.last_hidden_state.square().sum().backward()
        assert all(model.get_submodule(name) is module for name, module in fused.items())
        check_close(found.last_hidden_state, expected.last_hidden_state)
        for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
            for own, other in zip(ours, theirs, strict=True) if isinstance(theirs, tuple) else [(ours, theirs)]:
                check_close(own, other)
        for name, module in heads.items():
            for letter in "qkvo":
                whole = gradients[f"{name}.{letter}"].flatten(1)
                check_close(module.get_parameter(f"{letter}_proj.weight").grad, whole if letter == "o" else whole.mT)

    def test_memories_of_earlier_tokens_count(self):
        model, batch = xlnet(), text_inputs(3)
        first = model(**batch, use_mems=True)
        expected = model(**batch, mems=first.mems).last_hidden_state
        replace_modules(model, unfuse(model))
        check_close(model(**batch, mems=first.mems).last_hidden_state, expected)
        assert not torch.allclose(expected, first.last_hidden_state)

    def test_the_projections_of_tokens_are_targets_and_that_of_positions_is_not(self):
        model = xlnet("ForSequenceClassification")
        replace_modules(model, unfuse(model))
        own = {name.rpartition(".")[2] for name in find_targets(model).chosen if ".rel_attn." in name}
        assert own == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert isinstance(model.transformer.layer[0].rel_attn.r, nn.Parameter)

    def test_fusing_gives_the_same_numbers_back(self):
        fused = xlnet().layer[0].rel_attn
        module = unfused(fused)
        module.own_weights()
        again = module.fused()
        assert type(again) is type(fused)
        assert again.state_dict().keys() == fused.state_dict().keys()
        assert all(torch.equal(again.state_dict()[key], value) for key, value in fused.state_dict().items())
        assert all(parameter.is_contiguous() for parameter in again.parameters())

    def test_attention_that_calls_more_of_its_own_stays_fused(self):
        fused = xlnet().layer[0].rel_attn

        class More(type(fused)):
            def rel_attn_core(self, *args, **kwargs):
                return self.more(super().rel_attn_core(*args, **kwargs))

            def more(self, found):
                return found

        fused.__class__ = More
        assert why_fused(fused) == "More computes something else than its layers one by one"

    def test_attention_that_computes_something_else_stays_fused(self):
        fused = xlnet().layer[0].rel_attn

        class Doubled(type(fused)):
            def post_attention(self, h, attn_vec, residual=True):
                return 2 * super().post_attention(h, attn_vec, residual)

        fused.__class__ = Doubled
        assert why_fused(fused) == "Doubled computes something else than its layers one by one"
        assert unfuse(nn.ModuleDict({"attention": fused})) == {}


class TestMultiheadAttention:
    """That of PyTorch, with the weights of queries, keys and values in one."""

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("masks", ["none", "keys", "pairs", "both", "heads", "added"])
    def test_it_answers_as_before(self, masks, bias, batch_first, need_weights):
        fused = attention(bias=bias, batch_first=batch_first)
        query, key, value = torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
        keys, pairs = torch.rand(2, 5) < 0.3, torch.rand(3, 5) < 0.3
        keys[:, 0] = pairs[:, 0] = False
        given = {
            "none": {},
            "keys": {"key_padding_mask": keys},
            "pairs": {"attn_mask": pairs},
            "both": {"key_padding_mask": keys, "attn_mask": pairs},
            "heads": {"attn_mask": (torch.rand(2 * HEADS, 3, 5) < 0.3).index_fill(2, torch.tensor([0]), False)},
            "added": {"key_padding_mask": torch.randn(2, 5), "attn_mask": torch.randn(3, 5)},
        }[masks]
        inputs = (query, key, value) if batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))
        for average in (True, False):
            options = {**given, "need_weights": need_weights, "average_attn_weights": average}
            expected, weights = fused(*inputs, **options)
            found, own = unfused(fused)(*inputs, **options)
            check_close(found, expected)
            assert (own is None) == (weights is None) == (not need_weights)
            if need_weights:
                check_close(own, weights)

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_one_sequence_needs_no_axis_of_sequences(self, need_weights):
        fused, query, key = attention(), torch.randn(3, WIDTH), torch.randn(5, WIDTH)
        found, own = unfused(fused)(query, key, key, None, need_weights)
        expected, weights = fused(query, key, key, None, need_weights)
        check_close(found, expected)
        assert (own is None) == (weights is None) == (not need_weights)
        if need_weights:
            check_close(own, weights)

    def test_it_learns_as_before(self):
        fused, x = attention(batch_first=True), torch.randn(2, 3, WIDTH)
        fused(x, x, x)[0].square().sum().backward()
        expected = fused.in_proj_weight.grad.clone()
        module = unfused(fused)
        module(x, x, x)[0].square().sum().backward()
        check_close(torch.cat([module.get_parameter(f"{name}.weight").grad for name in PROJECTIONS]), expected)

    def test_it_drops_weights_in_training(self):
        module, x = unfused(attention(dropout=0.5, batch_first=True).train()), torch.randn(2, 3, WIDTH)
        assert module.training
        assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])

    def test_it_rounds_in_bfloat16_as_before(self):
        fused, x = attention(batch_first=True).bfloat16(), torch.randn(2, 3, WIDTH).bfloat16()
        check_close(unfused(fused)(x, x, x)[0], fused(x, x, x)[0], BFLOAT16)

    def test_an_encoder_of_pytorch_calls_it(self):
        layer, x = nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True).eval(), torch.randn(2, 3, WIDTH)
        with torch.no_grad():
            expected = layer(x)
            replace_modules(layer, unfuse(layer))
            layer.self_attn.v_proj.weight.data.mul_(0)
            assert not torch.allclose(layer(x), expected)  # nothing reads a fused weight any more
            layer.self_attn = layer.self_attn.fused()
            check_close(layer(x), unfused_twice(layer)(x))

    def test_fusing_gives_the_same_numbers_back(self):
        fused = attention()
        module = unfused(fused)
        module.own_weights()
        again = module.fused()
        assert type(again) is nn.MultiheadAttention
        assert all(torch.equal(again.state_dict()[key], value) for key, value in fused.state_dict().items())

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"kdim": 8, "vdim": 8}, "other parameters than one for queries, keys and values"),
            ({"add_bias_kv": True}, "other parameters than one for queries, keys and values"),
            ({"add_zero_attn": True}, "attends to a key that is no input"),
        ],
    )
    def test_what_is_not_covered_stays_fused_with_the_reason(self, options, reason):
        fused = attention(**options)
        assert reason in why_fused(fused)
        assert unfuse(nn.ModuleDict({"attention": fused})) == {}

    def test_what_is_called_through_a_hook_stays_fused(self):
        fused = attention()
        fused.forward = fused.forward
        assert "through a hook" in why_fused(fused)

    def test_what_another_module_reads_stays_fused(self):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = attention()

            def forward(self, x):
                return x @ self.attention.in_proj_weight.T

        assert unfuse(Reader()) == {}
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS)  # reads it unless that has been made several
        assert list(unfuse(layer)) == ["self_attn"]

    def test_a_hint_without_a_mask_is_refused_as_before(self):
        fused, x = attention(), torch.randn(3, WIDTH)
        for module in (fused, unfused(fused)):
            with pytest.raises(RuntimeError, match="is_causal"):
                module(x, x, x, is_causal=True)


def unfused_twice(layer):
    """The layer with its attention unfused, and once more after it was fused again."""
    replace_modules(layer, unfuse(layer))
    layer.self_attn = unfused(layer.self_attn.fused())
    return layer


def test_no_weight_is_copied_until_it_has_to_be():
    fused = attention()
    module = unfused(fused)
    assert module.get_submodule("q_proj").weight.data_ptr() == fused.in_proj_weight.data_ptr()
    module.own_weights()
    assert module.get_submodule("q_proj").weight.data_ptr() != fused.in_proj_weight.data_ptr()


def test_what_has_no_fused_weights_is_refused():
    with pytest.raises(TargetError, match="Linear has no fused weights"):
        unfused(nn.Linear(2, 2))
    assert why_fused(nn.Linear(2, 2)) is None
