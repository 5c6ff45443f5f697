"""Heads stay dense, whatever they are called and wherever they lie."""

import pytest
import torch
import transformers
from support.tiny_models import (
    FIRST_WORD,
    TINY_MODELS,
    VOCABULARY,
    as_examples,
    build,
    class_labels,
    other_inputs,
    pixels,
    split_batch,
    text_inputs,
)
from torch import nn
from transformers import BertConfig, BertModel, EncoderDecoderModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.data.heads import answering_layers

_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "initializer_range": 0.2}
COUNT = 8


class HeadBesideTheBody(PreTrainedModel):
    """A user's own model: its head has no name that means one, and no base model lies beside it."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = BertModel(config, add_pooling_layer=False)
        self.last = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        seen = self.body(input_ids, attention_mask).last_hidden_state
        logits = self.last(seen)[:, 0]  # of which only the first token's count
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


class HeadOfAnyKind(HeadBesideTheBody):
    """Something becomes of the head's output before it is the model's answer."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        seen = self.body(input_ids, attention_mask).last_hidden_state
        logits = self.become(self.last(seen), attention_mask[..., None])
        return {"loss": logits.mean(), self.name: logits}


BECOMES = {
    "mean over tokens": lambda y, mask: y.mean(1),
    "mean over real tokens": lambda y, mask: (y * mask).sum(1) / mask.sum(1),
    "maximum over tokens": lambda y, mask: y.amax(1),
    "scaled": lambda y, mask: 0.5 * y[:, 0],
    "capped": lambda y, mask: 5 * torch.tanh(y[:, 0] / 5),
    "with another bias": lambda y, mask: y[:, 0] + 1,
    "log probabilities": lambda y, mask: y[:, 0].log_softmax(-1),
    "two tokens": lambda y, mask: y[:, 0] + y[:, 1],
    "classes first": lambda y, mask: y.transpose(1, 2),
    "in place": lambda y, mask: y.mul_(2)[:, 0],
}


def head_of_any_kind(become, name="logits"):
    torch.manual_seed(0)
    model = HeadOfAnyKind(BertConfig(**_TEXT, num_labels=3)).eval()
    model.become, model.name = become, name
    return model, text_inputs(COUNT) | class_labels(COUNT, 3)


def beside_the_body():
    torch.manual_seed(0)
    model = HeadBesideTheBody(BertConfig(**_TEXT, num_labels=3)).eval()
    return model, text_inputs(COUNT) | class_labels(COUNT, 3), {"last"}


def pictures(name):
    def make():
        vision = {**_SIZES, "image_size": 12, "patch_size": 4}
        model = build(f"{name}ForImageClassification", f"{name}Config", vision_config=vision, num_labels=3)
        return model, pixels(COUNT, 3, 12) | class_labels(COUNT, 3), {"classifier"}

    return make


def encoder_and_decoder():
    config = BertConfig(**_TEXT, is_decoder=True, add_cross_attention=True, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = EncoderDecoderModel(encoder=BertModel(BertConfig(**_TEXT)), decoder=transformers.BertLMHeadModel(config))
    model.config.pad_token_id, model.config.decoder_start_token_id = 0, 1
    labels = torch.randint(FIRST_WORD, VOCABULARY, (COUNT, 5), generator=torch.Generator().manual_seed(1))
    heads = {"decoder.cls.predictions.transform.dense", "decoder.cls.predictions.decoder"}
    return model.eval(), text_inputs(COUNT) | {"labels": labels}, heads


MODELS = {
    "beside the body": beside_the_body,
    "CLIP": pictures("CLIP"),
    "Siglip": pictures("Siglip"),
    "encoder and decoder": encoder_and_decoder,
}


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces")  # of encoder-decoder models, whenever they get labels
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_heads_stay_dense(make):
    model, batch, heads = make()
    before = {name: model.get_submodule(name).weight.clone() for name in heads}
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.7, refit=False))
    compressor.compress(model, split_batch(batch, 2), eval_dataset=split_batch(other_inputs(batch), 2))
    report = compressor.report
    assert not heads & set(report.layers)
    assert {report.skipped[name].reason for name in heads} <= {"task head", "output embeddings"}
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in before.items())
    assert any(layer.rank for layer in report.layers.values())


def test_a_head_that_is_asked_for_is_a_target():
    model, batch, _ = pictures("CLIP")()
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.9, target_modules=["classifier", "k_proj"]))
    compressor.compress(model, split_batch(batch, 2), eval_dataset=split_batch(other_inputs(batch), 2))
    assert "classifier" in compressor.report.layers


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert-sequence-classification", ["classifier"]),
        ("bert-multiple-choice", ["classifier"]),
        ("bert-question-answering", ["qa_outputs"]),
        ("bert-masked-lm", ["cls.predictions.decoder"]),
        ("llama", ["lm_head"]),
        ("t5", ["lm_head"]),
        ("swin", ["classifier"]),
    ],
)
def test_what_answers_is_found_by_what_it_returns(name, heads):
    model, batch = TINY_MODELS[name]()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert answering_layers(model, layers, batch) == heads


@pytest.mark.parametrize("become", BECOMES.values(), ids=BECOMES)
def test_what_answers_is_found_whatever_becomes_of_its_output(become):
    model, batch = head_of_any_kind(become)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert answering_layers(model, layers, batch) == ["last"]


@pytest.mark.parametrize("name", ["intent", "logits_of_intents"])
def test_what_answers_is_found_whatever_the_answer_is_called(name):
    model, batch = head_of_any_kind(BECOMES["mean over tokens"], name)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert answering_layers(model, layers, batch) == ["last"]


def test_answers_in_a_dictionary_of_their_own_are_found():
    model, batch = head_of_any_kind(BECOMES["scaled"])
    forward = model.forward

    def nested(**inputs):
        out = forward(**inputs)
        return {"loss": out["loss"], "logits": {"intent": out["logits"]}}

    model.forward = nested
    assert answering_layers(model, {"last": model.last}, batch) == ["last"]


def test_looking_for_answers_leaves_the_model_as_it_was():
    model, batch = head_of_any_kind(BECOMES["scaled"])
    model.train()
    model.last.weight.requires_grad_(False)
    before = model.last.weight.grad = torch.ones_like(model.last.weight)
    answering_layers(model, {"last": model.last}, batch)
    assert model.training
    assert model.body.training
    assert not model.last.weight.requires_grad
    assert model.body.embeddings.word_embeddings.weight.requires_grad
    assert model.last.weight.grad is before
    assert not model.last._forward_hooks


def test_the_examples_are_found_in_plain_data_too():
    model, batch, _ = pictures("Siglip")()
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.7, refit=False))
    compressor.compress(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
    assert compressor.report.skipped["classifier"].reason == "task head"
