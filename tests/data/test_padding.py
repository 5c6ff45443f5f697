"""Which rows of a layer's input are real tokens, whatever the order in which a model has them."""

import pytest
import torch
from support.processes import accelerator, loader_of
from support.tiny_models import IGNORED, VOCABULARY, build, class_labels, split_batch, t5, text_inputs
from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

from hf_lossless_lr.data.padding import PaddingMasks
from hf_lossless_lr.layers import replace_modules, unfuse, unfused
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.statistics.collect import collect_statistics

LENGTH = 8
COUNT = 16

_LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40}
TOKENS_FIRST = {
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "Longformer": {"hidden_size": 32, "attention_window": 4, "pad_token_id": 0, **_LAYERS},
}


@pytest.mark.parametrize("name", TOKENS_FIRST)
def test_a_batch_as_large_as_its_examples_are_long_is_no_other_than_smaller_ones(name):
    """Its mask has the same shape the other way round."""
    options = {"vocab_size": VOCABULARY, "num_labels": 3, "initializer_range": 0.2, **TOKENS_FIRST[name]}
    model = build(f"{name}ForSequenceClassification", f"{name}Config", **options)
    replace_modules(model, unfuse(model))
    batch = text_inputs(COUNT, LENGTH) | class_labels(COUNT, 3)
    targets = find_targets(model).chosen
    square, other = (
        collect_statistics(model, targets, loader_of(split_batch(batch, size)), accelerator()).layers
        for size in (LENGTH, 4)
    )
    assert any(layer.tokens == int(batch["attention_mask"].sum()) for layer in other.values())
    for target in targets:
        assert square[target].tokens == other[target].tokens
        for field in ("input_covariance", "grad_covariance"):
            expected = getattr(other[target], field)
            scale = float(expected.abs().max())
            torch.testing.assert_close(getattr(square[target], field), expected, rtol=0, atol=1e-5 * scale)


def words_and_classes(longest):
    return text_inputs(COUNT, longest) | class_labels(COUNT, 3)


def alone(batch):
    """Each example on its own, without padding and without a mask."""
    for example in split_batch(batch, 1):
        real = example.pop("attention_mask")[0].bool()
        yield example | {"input_ids": example["input_ids"][:, real]}


def check_agrees_with_examples_alone(model, batch, examples):
    targets = find_targets(model).chosen
    got, expected = (
        collect_statistics(model, targets, loader_of(batches), accelerator()).layers
        for batches in (split_batch(batch, 4), examples)
    )
    for name in expected:
        assert got[name].tokens == expected[name].tokens, name
        for field in ("input_covariance", "grad_covariance"):
            value = getattr(expected[name], field)
            torch.testing.assert_close(getattr(got[name], field), value, rtol=0, atol=1e-4 * float(value.abs().max()))
    return got


def test_rows_that_a_model_fills_up_do_not_count_either():
    """Longformer fills examples up to whole windows, also those that came without padding."""
    options = {"vocab_size": VOCABULARY, "num_labels": 3, "initializer_range": 0.2, **TOKENS_FIRST["Longformer"]}
    model = build("LongformerForSequenceClassification", "LongformerConfig", **options)
    batch = words_and_classes(11)
    got = check_agrees_with_examples_alone(model, batch, alone(batch))
    assert got["longformer.encoder.layer.0.attention.self.key"].tokens == int(batch["attention_mask"].sum())


def test_each_window_of_attention_has_a_mask_of_its_own():
    """CANINE calls a layer for one window after the other."""
    model = build(
        "CanineForSequenceClassification",
        "CanineConfig",
        hidden_size=32,
        num_hash_buckets=50,
        downsampling_rate=2,
        local_transformer_stride=4,
        num_labels=3,
        **_LAYERS,
    )
    batch = words_and_classes(16)
    targets = find_targets(model).chosen
    layers = collect_statistics(model, targets, loader_of(split_batch(batch, 4)), accelerator()).layers
    name = "canine.initial_char_encoder.layer.0.attention.self.query"
    assert layers[name].tokens == int(batch["attention_mask"].sum())


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces")  # of encoder-decoder models, whenever they get labels
def test_what_a_decoder_gets_of_the_encoder_has_the_encoders_mask():
    """Also where it was projected in between, and both sides are equally long."""
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "initializer_range": 0.2}
    decoder = BertConfig(**sizes, hidden_size=24, is_decoder=True, add_cross_attention=True, tie_word_embeddings=False)
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(**sizes, hidden_size=32))
    model = EncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(decoder)).eval()
    model.config.pad_token_id, model.config.decoder_start_token_id = 0, 1
    batch = text_inputs(COUNT, LENGTH)
    targets = text_inputs(COUNT, LENGTH, seed=1)
    batch["labels"] = torch.where(targets["attention_mask"].bool(), targets["input_ids"], -100)
    examples = [e | {"labels": e["labels"][:, e["labels"][0] != -100]} for e in alone(batch)]
    check_agrees_with_examples_alone(model, batch, examples)


def test_a_decoder_mask_that_is_none_is_none_at_all():
    model, batch = t5()
    layer = model.decoder.block[0].layer[0].SelfAttention.q
    found = []
    for given in ({}, {"decoder_attention_mask": None}):
        masks = PaddingMasks(model)
        masks.start(batch | given)
        found.append(masks.of(layer, torch.zeros(*batch["labels"].shape, 32))())
    assert torch.equal(found[0], (batch["labels"] != IGNORED).flatten())
    assert torch.equal(found[1], found[0])


def test_a_mask_that_hides_every_key_is_about_something_else():
    """Mask2Former has one in which true stands for padding: without any, all rows count."""
    model = BertModel(BertConfig(hidden_size=32, vocab_size=VOCABULARY, **_LAYERS))
    layer, masks, x = model.encoder.layer[0].output.dense, PaddingMasks(model), torch.randn(2, 5, 48)
    for hidden in (0, 2):
        masks.start({"input_ids": torch.ones(2, 5, dtype=torch.long)})
        mask = torch.tensor([[True] * hidden + [False] * (5 - hidden), [hidden > 0] * 5])
        masks.note(layer, {"attention_mask": mask})
        counted = masks.of(layer, x)()
        assert (counted is None) if hidden == 0 else torch.equal(counted, mask.flatten())
        assert not masks.unmatched


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_pytorch_says_whether_tokens_come_first(batch_first):
    """A mask of as many sequences as tokens has the same shape the other way round."""
    model = BertModel(BertConfig(hidden_size=32, vocab_size=VOCABULARY, **_LAYERS))
    model.extra = unfused(torch.nn.MultiheadAttention(32, 4, batch_first=batch_first))
    mask, masks = torch.ones(4, 4, dtype=torch.long).tril(), PaddingMasks(model)
    masks.start({"input_ids": torch.ones(4, 4, dtype=torch.long), "attention_mask": mask})
    found = masks.of(model.extra.get_submodule("q_proj"), torch.randn(4, 4, 32))()
    assert torch.equal(found, (mask if batch_first else mask.T).bool().flatten())
