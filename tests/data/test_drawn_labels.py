"""Labels drawn from the dense model's predictions: the same whatever the batches, and of the right frequencies."""

import itertools

import pytest
import torch
from support.processes import loader_of
from support.tiny_models import (
    as_examples,
    bert_masked_lm,
    bert_multiple_choice,
    bert_question_answering,
    bert_sequence_classification,
    bert_token_classification,
    build,
    llama,
    split_batch,
    t5,
    text_inputs,
    vit,
)

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.data.drawn_labels import draw_labels
from hf_lossless_lr.errors import ConfigurationError, DataError

CPU = torch.device("cpu")


def unlabelled(batches):
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def labels_of(data):
    return torch.cat([torch.as_tensor(batch["labels"]).view(-1) for batch in data]).tolist()


@pytest.mark.parametrize("make", [bert_sequence_classification, vit], ids=lambda make: make.__name__)
def test_do_not_depend_on_the_batches_nor_on_labels_that_are_there(make):
    model, batch = make(24)
    expected = labels_of(draw_labels(split_batch(batch, 1), model, CPU, 0, batch_size=4))
    for size in (3, 8, 24):
        found = draw_labels(unlabelled(split_batch(batch, size)), model, CPU, 0, batch_size=4)
        assert labels_of(found) == expected
    assert len(set(expected)) > 1
    other = labels_of(draw_labels(split_batch(batch, 4), model, CPU, 1, batch_size=4))
    assert other != expected


def test_examples_stay_examples():
    model, batch = bert_sequence_classification(24)
    examples = unlabelled(as_examples(batch))
    loader = draw_labels(examples, model, CPU, 0, batch_size=5)
    assert len(loader.dataset) == 24
    assert labels_of(loader) == labels_of(draw_labels(split_batch(batch, 6), model, CPU, 0, batch_size=4))
    some = draw_labels(examples, model, CPU, 0, max_examples=9, batch_size=5)
    assert len(some.dataset) == 9


def test_have_the_frequencies_of_the_predictions():
    model, batch = bert_sequence_classification(8)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.linspace(0, 2, len(model.classifier.bias)))
        probabilities = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.softmax(-1)
    counts = torch.zeros_like(probabilities)
    draws = 400
    for seed in range(draws):
        drawn = torch.tensor(labels_of(draw_labels(split_batch(batch, 8), model, CPU, seed, batch_size=8)))
        counts[torch.arange(len(drawn)), drawn] += 1
    deviation = (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((counts / draws - probabilities).abs() < 4.5 * deviation).all()


def test_that_are_there_can_be_kept():
    model, batch = bert_sequence_classification(16)
    for data in (split_batch(batch, 4), as_examples(batch)):
        assert labels_of(draw_labels(data, model, CPU, 0, keep=True, batch_size=4)) == batch["labels"].tolist()


def test_that_a_model_does_not_take_are_none_to_keep():
    """Data of embeddings with classes, to evaluate them by."""
    model = build("BertModel", "BertConfig", num_hidden_layers=1, hidden_size=24, vocab_size=99)
    examples = as_examples(text_inputs(16) | {"labels": torch.arange(16)})
    batch = next(iter(draw_labels(examples, model, CPU, 0, keep=True, batch_size=4)))
    assert "labels" not in batch
    assert len(batch) == 3


def test_of_a_model_that_does_not_run_without_its_own_are_an_error():
    model, batch = t5(16)
    with pytest.raises(DataError, match=r"T5ForConditionalGeneration does not run without labels \("):
        draw_labels(split_batch(batch, 4), model, CPU, 0, batch_size=4)


@pytest.mark.parametrize(("batch", "error"), [(0, DataError("my own")), (1, RuntimeError("out of memory"))])
def test_say_of_no_other_failure_that_labels_are_missing(batch, error, monkeypatch):
    model, inputs = bert_sequence_classification(16)
    forward, calls = model.forward, itertools.count()

    def failing(*arguments, **options):
        if next(calls) == batch:
            raise error
        return forward(*arguments, **options)

    data = unlabelled(split_batch(inputs, 4))
    monkeypatch.setattr("hf_lossless_lr.data.drawn_labels._check", lambda *_: None)
    monkeypatch.setattr("hf_lossless_lr.data.drawn_labels.make_dataloader", lambda data, *_, **__: loader_of(data))
    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(type(error), match=f"^{error}$"):
        draw_labels(data, model, CPU, 0, batch_size=4)


def test_of_a_language_model_are_an_error_that_says_what_to_do():
    model, batch = llama(16)
    with pytest.raises(DataError, match=r"LlamaForCausalLM does not answer to the label .*labels=input_ids"):
        draw_labels(split_batch(batch, 4), model, CPU, 0, batch_size=4)


def test_of_a_head_without_logits_or_states_are_an_error():
    model, batch = bert_sequence_classification(16)
    model.forward = lambda **batch: {"boxes": batch["input_ids"].float()}
    with pytest.raises(DataError, match="BertForSequenceClassification gives logits of the shape none"):
        draw_labels(unlabelled(split_batch(batch, 4)), model, CPU, 0, batch_size=4)


HEADS = {
    "spans": (bert_question_answering, {"start_positions", "end_positions"}),
    "tokens": (bert_token_classification, {"labels"}),
    "masked words": (bert_masked_lm, {"labels"}),
    "choices": (bert_multiple_choice, {"labels"}),
}


@pytest.mark.parametrize("head", HEADS)
def test_fit_every_head_and_are_the_same_in_examples_and_in_batches(head):
    make, names = HEADS[head]
    model, batch = make(12)
    expected = None
    for data in (split_batch(batch, 3), split_batch(batch, 12), as_examples(batch)):
        drawn = list(draw_labels(data, model, CPU, 0, batch_size=4))
        found = {name: torch.cat([each[name] for each in drawn]) for name in names}
        for each in drawn:
            assert torch.isfinite(model(**each).loss)
        expected = found if expected is None else expected
        assert all(torch.equal(found[name], expected[name]) for name in names)
    if head in ("tokens", "masked words"):
        assert torch.equal(expected["labels"] != -100, batch["attention_mask"].bool())


def test_of_tokens_are_padded_as_their_examples():
    model, batch = bert_token_classification(12)
    padded = as_examples(batch)
    ragged = [{n: e[n][: sum(e["attention_mask"])] for n in ("input_ids", "attention_mask")} for e in padded]
    expected = torch.cat([each["labels"] for each in draw_labels(padded, model, CPU, 0, batch_size=4)])

    def pad_in_front(items):
        width = max(len(item["input_ids"]) for item in items)
        return {n: torch.tensor([[0] * (width - len(i[n])) + i[n] for i in items]) for n in items[0]}

    loader = draw_labels(ragged, model, CPU, 0, batch_size=4, data_collator=pad_in_front)
    for each in loader:
        assert torch.equal(each["labels"] != -100, each["attention_mask"].bool())
    found = torch.cat([each["labels"][each["labels"] != -100] for each in loader])
    # Positions differ in front of padding, and so do predictions; the classes are drawn from as many tokens.
    assert len(found) == int((expected != -100).sum())


def test_of_a_regression_scatter_as_its_loss_is_curved():
    model, batch = build_regression()
    with torch.no_grad():
        predicted = model(**batch).logits.double()
    drawn = torch.stack(
        [
            torch.cat([each["labels"] for each in draw_labels(split_batch(batch, 8), model, CPU, seed, batch_size=8)])
            for seed in range(400)
        ]
    ).double()
    gradients = 2 * (predicted - drawn) / predicted.shape[-1]  # of the mean square
    moments = torch.einsum("sei,sej->eij", gradients, gradients) / len(drawn)
    hessian = 2 / predicted.shape[-1] * torch.eye(predicted.shape[-1], dtype=torch.float64)
    deviation = hessian.diagonal()[0] * (2 / len(drawn)) ** 0.5
    assert ((moments - hessian).abs() < 4.5 * deviation).all()


def build_regression():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    options = {"vocab_size": 99, "num_labels": 3, "problem_type": "regression", **sizes}
    return build("BertForSequenceClassification", "BertConfig", **options), text_inputs(8)


def test_of_several_classes_at_once_have_the_frequencies_of_the_predictions():
    model, batch = build_regression()
    model.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        model.classifier.weight.mul_(30)
        probabilities = model(**batch).logits.sigmoid()
    draws = [next(iter(draw_labels(split_batch(batch, 8), model, CPU, seed, batch_size=8))) for seed in range(400)]
    mean = torch.stack([each["labels"] for each in draws]).mean(0)
    deviation = (probabilities * (1 - probabilities) / len(draws)).sqrt()
    assert ((mean - probabilities).abs() < 4.5 * deviation + 1e-9).all()


@pytest.mark.parametrize("form", [lambda batch: split_batch(batch, 1), as_examples], ids=["batches", "examples"])
def test_compress_a_classifier_without_labels(form):
    model, batch = bert_sequence_classification(64)
    data = unlabelled(form(batch))
    with pytest.raises(DataError, match="label"):
        LowRankCompressor(LosslessLowRankConfig()).compress(model, data[:48], eval_dataset=data[48:])
    compressor = LowRankCompressor(LosslessLowRankConfig(labels="model", keep_ratio=0.5))
    compressor.compress(model, data[:48], eval_dataset=data[48:])
    report = compressor.report
    assert report.calibration["examples"] == 48
    assert report.held_out["examples"] == 16
    assert any("drawn from the dense model's predictions" in note for note in report.notes)
    assert report.keep_ratio <= 0.5


def test_of_another_origin_are_refused():
    with pytest.raises(ConfigurationError, match="labels"):
        LosslessLowRankConfig(labels="moon")


BART = {
    **{"vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1},
}


def test_of_a_model_that_makes_its_decoders_inputs_of_them_are_an_error():
    model = build("BartForConditionalGeneration", "BartConfig", **BART)
    with pytest.raises(DataError, match="BartForConditionalGeneration makes inputs of its labels"):
        draw_labels(split_batch(text_inputs(16), 4), model, CPU, 0, batch_size=4)


def test_that_a_model_cannot_take_are_an_error_of_ours():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = build("ElectraForPreTraining", "ElectraConfig", **sizes, embedding_size=32, intermediate_size=48)
    with pytest.raises(DataError, match="ElectraForPreTraining"):
        draw_labels(split_batch(text_inputs(16), 4), model, CPU, 0, batch_size=4)
