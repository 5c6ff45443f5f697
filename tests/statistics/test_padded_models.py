"""Padded batches against the same examples one by one and unpadded, where a layer's rows are not the mask's tokens."""

from typing import NamedTuple

import pytest
import torch
from support.padded_models import (
    PADDED_MODELS,
    captions,
    deberta_v2,
    experts,
    funnel,
    perceiver,
    unfused_experts,
    vilt,
    wav2vec2,
    whisper,
)
from support.processes import accelerator, loader_of
from support.statistics_oracle import Oracle, double_rows, slow_statistics, unpadded_examples
from support.tiny_models import TINY_MODELS, split_batch
from support.tolerances import PARTLY_FLOAT32, ROUNDING
from transformers import Wav2Vec2ForSequenceClassification

from hf_lossless_lr.data.padding import PaddingMasks
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.statistics.collect import collect_statistics
from hf_lossless_lr.statistics.records import CalibrationStatistics
from hf_lossless_lr.statistics.shared_rows import layers_with_shared_rows

pytestmark = [
    pytest.mark.numerical,
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),  # of WavLM's own
]

COUNT = 6


def in_double(build):
    model, batch = build(COUNT)
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def collect(model, batches) -> CalibrationStatistics:
    return collect_statistics(model, find_targets(model).chosen, loader_of(batches), accelerator(), weight_grads=True)


class WithTable(Wav2Vec2ForSequenceClassification):
    def forward(self, labels=None, table=None, **inputs):
        return super().forward(labels=labels, **inputs)


class Pair(NamedTuple):
    got: CalibrationStatistics
    oracle: Oracle
    tolerance: float


@pytest.fixture(scope="module", params=PADDED_MODELS)
def pair(request):
    model, batch = in_double(PADDED_MODELS[request.param])
    assert not batch["attention_mask"].bool().all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lossless_lr.statistics.collector.real_rows", double_rows)
        got = collect(model, split_batch(batch, 3))
    oracle = slow_statistics(model, list(got.layers), unpadded_examples(model, batch))
    in_float32 = (
        "deberta",
        "deberta-v2",
        "experts",
        "longformer",
        "sorted-experts",
        "unfused-experts",
    )  # scores or routers
    return Pair(got, oracle, PARTLY_FLOAT32 if request.param in in_float32 else ROUNDING)


@pytest.mark.parametrize("field", ["weight_grad", "input_covariance", "grad_covariance"])
def test_the_matrices_are_those_of_unpadded_examples(pair, field):
    for name, expected in getattr(pair.oracle, field).items():
        got, scale = getattr(pair.got.layers[name], field)[0], float(expected.abs().max())
        assert (got - expected).abs().max() <= pair.tolerance * scale, name


def test_the_rows_are_those_of_unpadded_examples(pair):
    assert {name: layer.tokens for name, layer in pair.got.layers.items()} == pair.oracle.tokens


@pytest.mark.parametrize("after_one_that_does", [False, True])
def test_a_layer_whose_rows_belong_to_no_mask_is_named(caplog, monkeypatch, after_one_that_does):
    """A user's own model may shorten its sequence as it likes and tell no layer; this batch does not come apart."""
    model, batch = wav2vec2()
    model.__class__ = WithTable
    monkeypatch.setattr(model.wav2vec2, "_get_feature_vector_attention_mask", lambda *args, **kwargs: None)
    collect(model, [batch] * after_one_that_does + [batch | {"table": torch.zeros(1)}])
    assert "wav2vec2.encoder.layers.0.attention.k_proj" in caplog.text
    assert "belong to no attention mask" in caplog.text


def test_a_model_that_takes_no_shorter_examples_keeps_its_padding(caplog, monkeypatch):
    model, batch = funnel()
    forward = model.forward

    def of_full_length(input_ids, **inputs):
        if input_ids.shape[1] != batch["input_ids"].shape[1]:
            raise RuntimeError("shorter than ever before")
        return forward(input_ids, **inputs)

    monkeypatch.setattr(model, "forward", of_full_length)
    collect(model, [batch])
    assert "funnel.encoder.blocks.1.0.ffn.linear_1" in caplog.text


def test_pictures_with_as_many_patches_as_a_text_has_words_have_no_mask():
    """Ten rows for each picture, as many as the longest text has words."""
    model, batch = captions(longest=10)
    vision = collect(model, [batch]).layers["vision_model.encoder.layers.0.mlp.fc1"]
    assert vision.tokens == 10 * len(batch["labels"])


@pytest.mark.parametrize("build", [wav2vec2, vilt, funnel, perceiver, experts, captions, whisper])
def test_nothing_is_named_where_masks_are_found(caplog, build):
    model, batch = build()
    collect(model, [batch])
    assert "attention mask" not in caplog.text


def test_experts_that_tell_what_they_get_need_no_examples_one_by_one(monkeypatch):
    model, batch = unfused_experts()
    monkeypatch.setattr("hf_lossless_lr.statistics.collector.one_by_one", pytest.fail)
    layers = collect(model, [batch]).layers
    rows = [layer.tokens for name, layer in layers.items() if "layers.0.mlp" in name and name.endswith("in_proj")]
    assert sum(rows) == 2 * int(batch["attention_mask"].sum())


@pytest.mark.parametrize("name", ["deberta", "deberta-v2", "conformer"])
def test_a_layer_that_works_once_for_a_batch_does_not_depend_on_the_batches(name):
    """Also where there is no padding, so that nothing hides among its rows."""
    model, batch = in_double(PADDED_MODELS[name])
    batch["attention_mask"][:] = 1
    together, alone = (collect(model, split_batch(batch, size)) for size in (COUNT, 1))
    for layer, expected in alone.layers.items():
        got = together.layers[layer]
        assert got.tokens == expected.tokens, layer
        for field in ("weight_grad", "input_covariance", "grad_covariance"):
            mine, other = getattr(got, field), getattr(expected, field)
            assert (mine - other).abs().max() <= PARTLY_FLOAT32 * float(other.abs().max()), (layer, field)


def test_only_layers_that_work_once_for_a_batch_have_shared_rows():
    for name in TINY_MODELS.keys() - {"resnet"}:
        model, batch = TINY_MODELS[name]()
        assert layers_with_shared_rows(model, find_targets(model).chosen, batch) == []
    model, batch = deberta_v2()
    shared = layers_with_shared_rows(model, find_targets(model).chosen, batch)
    assert {name.rpartition(".")[2] for name in shared} == {"query_proj", "key_proj"}


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (torch.tensor([[True, True, False]]), [[True, True, False]]),
        (torch.tensor([[1, 0, 1]]), [[True, False, True]]),
        (torch.tensor([[1.0, 1.0, 0.0]]), [[True, True, False]]),
        (torch.tensor([[0.0, -1e9, 0.0]]), [[True, False, True]]),
        (torch.tensor([[0.0, float("-inf"), 1e4]]), [[True, False, True]]),
        (torch.zeros(1, 3), [[True, True, True]]),
        (torch.tensor([[[[0.0, -1e9, -1e9], [0.0, 0.0, -1e9]]]]), [[True, True, False]]),  # causal
    ],
)
def test_masks_of_every_kind_say_which_tokens_are_seen(mask, seen):
    model, _ = wav2vec2()
    masks = PaddingMasks(model)
    masks.start({"attention_mask": torch.tensor([[1, 0, 0, 0]]), "labels": torch.tensor([0])})
    masks.handed = {id(model.wav2vec2.encoder): [mask]}
    layer = model.wav2vec2.encoder.layers[0].attention.k_proj
    assert masks.of(layer, torch.zeros(1, 3, 32))().tolist() == seen[0]
