"""Labels drawn from the dense model's predictions: the same whatever the batches, and of the right frequencies."""

import pytest
import torch
from support.tiny_models import (
    as_examples,
    bert_question_answering,
    bert_sequence_classification,
    llama,
    split_batch,
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


@pytest.mark.parametrize("make", [llama, bert_question_answering], ids=lambda make: make.__name__)
def test_of_other_heads_are_an_error_that_says_what_to_do(make):
    model, batch = make(16)
    with pytest.raises(DataError, match=r"draws one of several classes.*labels=input_ids"):
        draw_labels(split_batch(batch, 4), model, CPU, 0, batch_size=4)


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
