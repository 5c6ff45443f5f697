"""Number formats through the compressor: budgets in bytes, embeddings, the refit, and figures of rounded weights."""

import copy

import pytest
import torch
from support.compressions import (
    BATCH_SIZE,
    build,
    certifiable,
    check_same_answers,
    check_same_model,
    compress,
    count_parameters,
)
from support.tiny_models import TINY_MODELS, as_examples, other_inputs, split_batch

from hf_lossless_lr import CompressionReport, LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.checkpoint.encoding import encoded_state
from hf_lossless_lr.formats import FORMATS
from hf_lossless_lr.layers import checkpoint_bytes, grids_in, rounded_modules
from hf_lossless_lr.layers.rounded import as_matrix
from hf_lossless_lr.pipeline import trial as trials_module

RATIOS = (0.5, 0.26, 0.2, 0.15)
on_models = pytest.mark.parametrize("name", ["bert-sequence-classification", "gpt2", "llama", "resnet"])


def targeted_bytes(model, report):
    state = encoded_state(model, model.state_dict())
    unique = {key: tensor for key, tensor in state.items() if not key.endswith(".bias")}
    total = 0
    for layer in report.layers:
        own = {key: tensor for key, tensor in unique.items() if key.startswith(f"{layer}.")}
        guards = [key for key in own if key == f"{layer}.weight" and len(own) > 1]
        total += sum(t.numel() * t.element_size() for key, t in own.items() if key not in guards)
    return total


@on_models
def test_a_budget_in_bytes_is_kept(name):
    model, batch = build(name)
    options = {"target_modules": ["Conv2d"]} if name == "resnet" else {}
    compressor = LowRankCompressor(LosslessLowRankConfig(formats="auto", refit=False, **options))
    compressor.calibrate(model, split_batch(batch, BATCH_SIZE), eval_dataset=[other_inputs(batch)])
    dense = sum(m.weight.numel() * 4 for m in compressor._calibration.factors.targets.chosen.values())
    for ratio in RATIOS:
        compressor.compress_to(ratio)
        kept = targeted_bytes(model, compressor.report) / dense
        assert kept <= ratio
        assert kept == pytest.approx(compressor.report.bytes_ratio)
        assert kept > 0.6 * ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_relative_to_the_model_as_it_was_given(dtype):
    model, batch = build("bert-sequence-classification")
    _, report = compress(model.to(dtype), batch, formats=["int8"], keep_ratio=0.5)
    itemsize = dtype.itemsize
    assert all(layer.dense_bytes == layer.dense_parameters * itemsize for layer in report.layers.values())
    assert report.bytes_ratio <= 0.5
    dense = [layer.rank is None for layer in report.layers.values()]
    assert all(dense) == (dtype == torch.float32)  # in 32 bits, int8 alone is a quarter of the bytes


def test_the_whole_models_bytes_count_its_rounded_embeddings():
    model, batch = build("bert-sequence-classification")
    before = checkpoint_bytes(model)
    assert before == 4 * count_parameters(model) + sum(b.numel() * b.element_size() for b in persistent(model))
    _, report = compress(model, batch, formats=["int8"], embeddings="int8", scope="model", keep_ratio=0.5)
    assert report.dense.bytes == before
    assert report.compressed.bytes == checkpoint_bytes(model) <= 0.5 * before
    assert report.skipped["bert.embeddings.word_embeddings"].format == "int8"
    assert report.skipped["classifier"].format == "float"


def persistent(model):
    return [tensor for key, tensor in model.state_dict().items() if key in dict(model.named_buffers())]


@pytest.mark.parametrize("name", ["bert-masked-lm", "gpt2", "llama", "t5"])
def test_embeddings_are_rounded_row_by_row_and_stay_tied(name):
    model, batch = build(name)
    tables = {path: m for path, m in model.named_modules() if type(m) is torch.nn.Embedding}
    before = {path: module.weight.detach().clone() for path, module in tables.items()}
    shared = {path for path, module in model.named_modules() if module is model.get_output_embeddings()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    compress(model, batch, embeddings="int8", keep_ratio=0.9)
    for path, weight in before.items():
        now = model.get_submodule(path).weight.detach()
        steps = weight.abs().amax(-1, keepdim=True) / 127
        assert ((now - weight).abs() <= 3 * steps).all()  # the search may cut off extremes
        assert not torch.equal(now, weight)
    assert shared
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_a_refit_that_does_not_help_leaves_the_grids_as_they_were(monkeypatch):
    monkeypatch.setattr(trials_module, "FEWEST_JUDGES", 1)
    monkeypatch.setattr(trials_module, "FEWEST_FITTED", 1)
    results = []
    distances = iter(range(9))  # that after the refit is asked for first
    monkeypatch.setattr(trials_module, "_distance", lambda outcomes: -next(distances))
    for refit in (False, True):
        model, batch = build("bert-sequence-classification")
        compress(model, batch, formats=["int4"], keep_ratio=0.16, refit=refit, selection_fraction=0.0)
        results.append(model)
    plain, tried = results
    check_same_model(plain, tried, batch)
    grids = [grids_in(model) for model in results]
    assert grids[0].keys() == grids[1].keys()
    assert all(torch.equal(grids[0][path].scale, grids[1][path].scale) for path in grids[0])


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_refit_gives_other_numbers_on_grids(number_format, monkeypatch):
    monkeypatch.setattr(trials_module, "FEWEST_JUDGES", 1)
    monkeypatch.setattr(trials_module, "FEWEST_FITTED", 1)
    distances = iter(range(0, -9, -1))  # that after the refit is asked for first, and shall be the lower one
    monkeypatch.setattr(trials_module, "_distance", lambda outcomes: -next(distances))
    weights = []
    for refit in (False, True):
        model, batch = build("bert-sequence-classification")
        options = {"formats": [number_format], "keep_ratio": 0.14, "refit": refit, "selection_fraction": 0.0}
        _, report = compress(model, batch, **options)
        assert report.refitted is refit
        weights.append({path: module.weight.detach().clone() for path, module, _ in rounded_modules(model)})
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weights[0][path], weight) for path, weight in weights[1].items())
    for _, module, grid in rounded_modules(model):
        matrix = as_matrix(module, module.weight.detach())
        columns = grid.columns(matrix.shape[1])
        assert torch.equal(columns.values(columns.codes(matrix)), matrix)


def test_the_fingerprint_and_the_card_are_of_the_rounded_weights(tmp_path):
    model, batch, evaluation = certifiable()
    compressor = LowRankCompressor(LosslessLowRankConfig(formats="auto", keep_ratio=0.2, embeddings="int8"))
    compressor.compress(model, split_batch(batch, 8), eval_dataset=[evaluation])
    report = compressor.report
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "of its bytes" in card
    assert "rounding to int" in card
    assert CompressionReport.from_json((tmp_path / "compression_report.json").read_text()) == report
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        loss = float(loaded(**evaluation).loss)
    assert loss == pytest.approx(report.compressed.loss, rel=1e-4)


def test_a_search_starts_from_the_finest_format():
    model, batch = build("bert-sequence-classification")
    options = {"formats": ["int8", "int4"], "objective": "compact", "loss_margin": 1.0, "accuracy_margin": 1.0}
    _, report = compress(model, batch, **options)
    assert {layer.format for layer in report.layers.values()} <= {"int8", "int4"}
    assert report.bytes_ratio < 0.27


def test_restoring_gives_the_dense_model_back():
    model, batch = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressor = LowRankCompressor(LosslessLowRankConfig(formats="auto", embeddings="int4", refit=False))
    compressor.calibrate(model, split_batch(batch, BATCH_SIZE), eval_dataset=[other_inputs(batch)])
    compressor.compress_to(0.15)
    assert grids_in(model)
    compressor.restore()
    assert not grids_in(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("options", [{"keep_ratio": 0.6}, {"keep_ratio": 0.2, "formats": ["int8"]}], ids=str)
def test_a_convolutional_network_in_channels_last_is_compressed_and_saved(options, tmp_path):
    model, batch = build("resnet")
    plain = compress(copy.deepcopy(model), batch, **options)[0]
    model, _ = compress(model.to(memory_format=torch.channels_last), batch, **options)
    one_code = 1 / 127  # that falls to the other side of a half
    check_same_answers(plain, model, batch, tolerance=one_code if "formats" in options else 1e-3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).to(memory_format=torch.channels_last).eval()
    check_same_answers(model, again, batch, tolerance=1e-3)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("objective", ["compact", "lossless"])
def test_a_search_without_float_tries_the_dense_model_in_its_formats(objective):
    """No rank is allowed, so that rounding is all that there is."""
    model, batch = TINY_MODELS["bert-sequence-classification"](80)
    options = {"formats": ["int8"], "rank_multiple": 64, "loss_margin": 0.5, "accuracy_margin": 0.5}
    compressor = LowRankCompressor(LosslessLowRankConfig(objective=objective, **options))
    compressor.compress(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
    assert {(layer.rank, layer.format) for layer in compressor.report.layers.values()} == {(None, "int8")}
