"""The loss of models without a head: its gradients, its units, and compression by it."""

import pytest
import torch
from support.tiny_models import as_examples, build, pixels, split_batch, text_inputs

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.data import forward_loss, model_inputs
from hf_lossless_lr.data.representations import NOISE, noisy_loss, representations
from hf_lossless_lr.errors import DataError
from hf_lossless_lr.processes import make_accelerator
from hf_lossless_lr.verdict import paired_outcomes

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert(count=64):
    return build("BertModel", "BertConfig", vocab_size=99, **SIZES), text_inputs(count)


def vit(count=64):
    model = build("ViTModel", "ViTConfig", image_size=16, patch_size=8, **SIZES)
    return model, pixels(count, 3, 16)


def resnet(count=64):
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return build("ResNetModel", "ResNetConfig", **options), pixels(count, 3, 16)


def clip(count=64):
    text = {"vocab_size": 99, "max_position_embeddings": 32, "eos_token_id": 98, **SIZES}
    options = {"text_config": text, "vision_config": {"image_size": 16, "patch_size": 8, **SIZES}}
    model = build("CLIPModel", "CLIPConfig", projection_dim=24, **options)
    return model, {**text_inputs(count), **pixels(count, 3, 16)}


def seeds(count):
    return {NOISE: torch.arange(count) + 1000}


@pytest.mark.parametrize("features", [2, 5])
def test_second_moments_of_the_gradients_are_the_hessian_of_one_minus_the_cosine(features):
    torch.manual_seed(features)
    fixed = torch.randn(features, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda e: 1 - torch.cosine_similarity(e, fixed, dim=0), fixed)
    draws = 20_000
    embedding = fixed.float().repeat(draws, 1).requires_grad_()
    outputs = {"text_embeds": embedding}
    found = representations(outputs, seeds(draws))
    noisy_loss(found, seeds(draws)[NOISE]).backward()
    gradients = embedding.grad.double() * draws
    moments = gradients.mT @ gradients / draws
    assert (moments - hessian).abs().max() < 5 * hessian.abs().max() * (2 / draws) ** 0.5


@pytest.mark.parametrize("make", [bert, vit, resnet, clip], ids=lambda make: make.__name__)
def test_loss_is_one_minus_the_cosine_in_the_mean_over_what_is_real(make):
    dense, batch = make(6)
    other, _ = make(6)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    data = [{**part, **each} for part, each in zip(split_batch(batch, 3), split_batch(seeds(6), 3), strict=True)]
    outcomes = paired_outcomes(dense, other, data, make_accelerator())
    with torch.no_grad():
        pair = [model.eval()(**batch) for model in (dense, other)]
    if make is clip:
        kinds = [(pair[0].text_embeds, pair[1].text_embeds), (pair[0].image_embeds, pair[1].image_embeds)]
        expected = sum(1 - torch.cosine_similarity(a, b, dim=-1).double().mean() for a, b in kinds) / 2
    else:
        states = [each.last_hidden_state for each in pair]
        if make is resnet:
            states = [state.permute(0, 2, 3, 1) for state in states]
        distance = 1 - torch.cosine_similarity(*states, dim=-1).double()
        expected = distance[batch["attention_mask"].bool()].mean() if make is bert else distance.mean()
    assert outcomes.mean_loss[0] == 0
    assert outcomes.mean_loss[1] == pytest.approx(float(expected), rel=1e-3)
    assert outcomes.mean_divergence == pytest.approx(outcomes.mean_loss[1], rel=1e-6)
    assert outcomes.by_example
    assert outcomes.clusters == 6
    assert outcomes.headless
    assert outcomes.accuracy is None


def test_gradients_do_not_depend_on_the_batches():
    model, batch = bert(8)
    found = []
    for size in (2, 8):
        model.zero_grad()
        for part, each in zip(split_batch(batch, size), split_batch(seeds(8), size), strict=True):
            passed = forward_loss(model.eval(), {**part, **each}, 0)
            assert passed.loss.item() == 0
            (passed.loss * passed.units).backward()
        found.append(model.encoder.layer[0].output.dense.weight.grad.clone())
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)
    assert found[0].abs().max() > 0


def test_seeds_are_no_argument_of_the_model():
    assert model_inputs({"input_ids": 1, NOISE: 2}) == {"input_ids": 1}


def test_of_other_numbers_than_examples_are_an_error():
    with pytest.raises(DataError, match="4 representations for 3 examples"):
        representations({"text_embeds": torch.ones(4, 2)}, seeds(3))


@pytest.mark.parametrize("form", [lambda batch: split_batch(batch, 4), as_examples], ids=["batches", "examples"])
@pytest.mark.parametrize("make", [bert, vit, clip], ids=lambda make: make.__name__)
def test_models_without_a_head_are_compressed_and_certified(make, form):
    model, batch = make(96)
    data = form(batch)
    with torch.no_grad():
        before = model.eval()(**batch)
    config = LosslessLowRankConfig(labels="model", keep_ratio=0.5, loss_margin=0.5)
    compressor = LowRankCompressor(config)
    part = len(data) * 5 // 8
    compressor.compress(model, data[:part], eval_dataset=data[part:])
    report = compressor.report
    assert report.dense.loss == 0
    assert 0 < report.compressed.loss < 0.2
    assert report.certificate.status == "lossless"
    assert report.certificate.examples == 36
    assert report.keep_ratio <= 0.5
    assert any("1 − cosine" in note for note in report.notes)
    name = "text_embeds" if make is clip else "last_hidden_state"
    with torch.no_grad():
        after = model(**batch)
    assert torch.cosine_similarity(before[name], after[name], dim=-1).mean() > 0.7


def test_a_loss_aware_choice_beats_one_that_is_not():
    increases = {}
    for metric in ("kronecker", "identity"):
        model, batch = bert(160)
        with torch.no_grad():  # features that count little
            model.encoder.layer[1].output.LayerNorm.weight[16:] = 0.02
        config = LosslessLowRankConfig(labels="model", keep_ratio=0.5, metric=metric, refit=False, rank_multiple=1)
        compressor = LowRankCompressor(config)
        compressor.compress(model, split_batch(batch, 8)[:12], eval_dataset=split_batch(batch, 8)[12:])
        increases[metric] = compressor.report.compressed.loss
    assert increases["kronecker"] < 0.8 * increases["identity"]


def test_gradients_of_several_representations_are_those_of_their_mean():
    """Each counts for its share of the loss, `I / kinds`, and so do the second moments of its gradients."""
    torch.manual_seed(0)
    draws = 20_000
    embeddings = [torch.randn(3).repeat(draws, 1).requires_grad_() for _ in range(2)]
    found = representations(dict(zip(("text_embeds", "image_embeds"), embeddings, strict=True)), seeds(draws))
    noisy_loss(found, seeds(draws)[NOISE]).backward()
    for embedding in embeddings:
        fixed = embedding[0].detach().double()
        hessian = torch.autograd.functional.hessian(lambda e: 1 - torch.cosine_similarity(e, fixed, dim=0), fixed)  # noqa: B023
        gradients = embedding.grad.double() * draws
        moments = gradients.mT @ gradients / draws
        assert (moments - hessian / 2).abs().max() < 5 * hessian.abs().max() * (2 / draws) ** 0.5
