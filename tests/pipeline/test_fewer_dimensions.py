"""Models with fewer dimensions between values and output: chosen, refitted, saved, loaded, adapted, made dense."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compressions import (
    auto_class,
    build,
    check_same_answers,
    check_same_model,
    check_same_state,
    folder_content,
)
from support.tiny_models import as_examples, other_inputs, split_batch
from support.tolerances import BFLOAT16, FLOAT32
from transformers import AutoModelForCausalLM, T5EncoderModel

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor, lora_targets
from hf_lossless_lr.errors import CheckpointError, ConfigurationError
from hf_lossless_lr.layers import INPUTS, OUTPUTS, NarrowLinear, is_factorized

FORMS = ["channel", "spatial", "dimensions"]
MODELS = ["bert-sequence-classification", "llama", "t5", "vit", "swin"]
FORMATS = {"float": 0.4, "int8": 0.15, "int4": 0.07}  # with the share of bytes, or of parameters


def compressor_of(**options):
    return LowRankCompressor(LosslessLowRankConfig(forms=FORMS, **{"keep_ratio": 0.4, "refit": False} | options))


def compressed(name="llama", **options):
    model, batch = build(name)
    compressor = compressor_of(**options)
    compressor.compress(model, split_batch(batch, 4), eval_dataset=[other_inputs(batch)])
    return model.eval(), batch, compressor.report


def narrow_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, NarrowLinear)}


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_saved_loaded_saved_again_and_made_dense(name, number_format, tmp_path):
    share = FORMATS[number_format]
    model, batch, report = compressed(name, formats=[number_format], keep_ratio=share)
    layers = narrow_layers(model)
    assert {layer.side for layer in layers.values()} == {INPUTS, OUTPUTS}
    assert (report.keep_ratio if number_format == "float" else targeted_bytes(report)) <= share
    for path, layer in layers.items():
        found = report.layers[path]
        assert found.form.endswith(" dimensions")
        assert layer.features == (found.out_features if layer.side == OUTPUTS else found.in_features)
        assert found.rank == (layer.inner.rank if is_factorized(layer.inner) else None)
    model.save_pretrained(tmp_path / "first")
    loaded, info = auto_class(name).from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values())
    check_same_model(model, loaded.eval(), batch)
    loaded.save_pretrained(tmp_path / "second")
    assert folder_content(tmp_path / "first") == folder_content(tmp_path / "second")
    kinds = [type(module) for module in build(name)[0].modules()]
    loaded.dequantize()
    assert [type(module) for module in loaded.modules()] == kinds
    check_same_answers(model, loaded, batch, 10 * FLOAT32)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def targeted_bytes(report):
    return sum(each.bytes for each in report.layers.values()) / sum(
        each.dense_bytes for each in report.layers.values()
    )


def test_it_is_predicted_to_cost_no_more_than_without():
    costs = []
    for forms in (FORMS, FORMS[:2]):
        model, batch = build("bert-sequence-classification")
        compressor = LowRankCompressor(LosslessLowRankConfig(forms=forms, keep_ratio=0.4, refit=False))
        compressor.compress(model, split_batch(batch, 4), eval_dataset=[other_inputs(batch)])
        costs.append(compressor.report.predicted_loss_increase)
        assert compressor.report.keep_ratio <= 0.4
    assert costs[0] < 0.98 * costs[1]


def test_parameters_and_bytes_are_those_that_were_counted():
    model, _, report = compressed("bert-sequence-classification")
    for path, layer in narrow_layers(model).items():
        stored = sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
        permutations = [b for name, b in layer.named_buffers() if name.endswith("permutation")]
        assert report.layers[path].parameters == stored
        order = layer.places.nbytes + sum(each.nbytes for each in permutations)
        assert report.layers[path].bytes == 4 * stored + order
        assert report.layers[path].dense_parameters == layer.in_features * layer.out_features


@pytest.mark.parametrize("name", ["bert-sequence-classification", "llama"])
def test_a_refit_brings_them_closer_to_the_dense_model(name):
    """All layers of a block are fitted, those with fewer dimensions among them."""
    found = []
    for refit in (False, True):
        model, batch = build(name) if name == "llama" else build_large(name)
        examples = as_examples(batch) if name != "llama" else split_batch(batch, 1)
        compressor = compressor_of(refit=refit, keep_ratio=0.5, selection_fraction=0.0)
        compressor.compress(model, examples, eval_dataset=split_batch(other_inputs(batch), 4))
        assert narrow_layers(model)
        found.append(compressor.report)
    if found[1].refitted:
        assert found[1].certificate.divergence < found[0].certificate.divergence


def build_large(name):
    from support.tiny_models import TINY_MODELS

    return TINY_MODELS[name](300)


def test_one_calibration_serves_several_sizes_and_the_model_is_dense_in_between():
    model, batch = build("llama")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressor = compressor_of()
    compressor.calibrate(model, split_batch(batch, 4), eval_dataset=[other_inputs(batch)])
    forms = []
    for keep_ratio in (0.7, 0.3):
        compressor.compress_to(keep_ratio)
        forms.append({layer.form for layer in compressor.report.layers.values()})
        assert narrow_layers(model)
    assert forms[0] != forms[1]
    compressor.restore()
    assert not narrow_layers(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_run_in_windows_and_from_a_work_folder_ends_with_the_same_model(tmp_path):
    model, batch, _ = compressed("llama")
    for _ in range(2):  # the second one finds everything there
        other, _ = build("llama")
        compressor = LowRankCompressor(compressor_of().config, work_dir=tmp_path / "work")
        compressor.compress(other, split_batch(batch, 4), eval_dataset=[other_inputs(batch)])
        compressor.release()
        check_same_model(model, other.eval(), batch)


def test_in_bfloat16_it_loads_as_it_was_saved(tmp_path):
    model, batch = build("llama")
    model = model.to(torch.bfloat16)
    compressor_of().compress(model, split_batch(batch, 4), eval_dataset=[other_inputs(batch)])
    assert narrow_layers(model)
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    check_same_state(model.state_dict(), loaded.state_dict())
    check_same_answers(model, loaded, batch, BFLOAT16)


def test_the_base_model_alone_reads_its_part(tmp_path):
    model, batch, _ = compressed("bert-sequence-classification")
    model.save_pretrained(tmp_path)
    base = type(model.bert).from_pretrained(tmp_path).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected, found = (each(**inputs).last_hidden_state for each in (model.bert, base))
    torch.testing.assert_close(found, expected)


def first(config):
    """Returns the record of a projection of values."""
    return next(record for record in config["narrowed"].values() if record["side"] == "outputs")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow")
    model, _, _ = compressed(target_modules=["v_proj", "o_proj"], keep_ratio=0.8, storage="two-factor")
    assert any(not is_factorized(layer.inner) for layer in narrow_layers(model).values())
    model.save_pretrained(path)
    return path


def copied(folder, path):
    for name in ("config.json", "model.safetensors"):
        (path / name).write_bytes((folder / name).read_bytes())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c["narrowed"].update({"model.layers.9.mlp": {"side": "inputs", "features": 3}}), "layers.9"),
        (lambda c: c["narrowed"].update({"lm_head": {"side": "inputs", "features": 3}}), "tied"),
        (
            lambda c: c["narrowed"].update({"model.layers.0": {"side": "inputs", "features": 3}}),
            "of LlamaDec",
        ),
        (lambda c: first(c).update(side="left"), "side"),
        (lambda c: first(c).update(side="inputs"), "has the shape"),
        (lambda c: first(c).update(features=0), "positive"),
        (lambda c: first(c).update(features=99), "does not fit"),
        (lambda c: first(c).update(features=first(c)["features"] - 1), "has the shape"),
        (lambda c: first(c).update(features=first(c)["features"] + 1), "has the shape"),
        (lambda c: c.update(narrowed=[1]), "narrowed"),
        (lambda c: c["narrowed"].popitem(), "does not list"),
        (lambda c: c.update(narrowed={}), "lists no module|does not have"),
    ],
)
@pytest.mark.parametrize("mismatched", [False, True])
def test_a_manifest_that_was_edited_is_refused(change, error, mismatched, saved, tmp_path):
    copied(saved, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=error):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=mismatched)


@pytest.mark.parametrize("side", [INPUTS, OUTPUTS])
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda t: torch.zeros_like(t), "missing, doubled"),
        (lambda t: torch.full_like(t, 1000), "out of range"),
        (lambda t: -t - 1, "out of range"),
        (lambda t: t.flip(0), "out of order"),
        (lambda t: t.long(), "I64"),
        (lambda t: t.float() + 0.4, "F32"),
        (lambda t: t.to(torch.int8), "I8"),
        (lambda t: t[:-1], "has the shape"),
        (lambda t: t[:, None], "has the shape"),
        (lambda t: None, "places"),
    ],
)
def test_places_that_were_edited_are_refused(damage, error, side, saved, tmp_path):
    copied(saved, tmp_path)
    narrowed = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["narrowed"]
    name = next(f"{path}.places" for path, record in narrowed.items() if record["side"] == side)
    tensors = load_file(tmp_path / "model.safetensors")
    places = damage(tensors.pop(name))
    if places is not None:
        tensors[name] = places.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=error):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tensor", ["weight", "inner.weight"])
def test_a_missing_tensor_is_refused(tensor, saved, tmp_path):
    copied(saved, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".places")).removesuffix("places") + tensor
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_class_with_the_part_that_has_none_of_them_loads_it(tmp_path):
    """An encoder whose layers are factorized, of a model whose decoder has narrow layers."""
    model, _, _ = compressed("t5", ignore=["re:encoder.*\\.v"])
    assert all(name.startswith("decoder.") for name in narrow_layers(model))
    model.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path)
    assert not narrow_layers(encoder)
    check_same_state(model.encoder.state_dict(), encoder.encoder.state_dict())


def test_adapters_go_on_the_layers_inside():
    model, batch, _ = compressed()
    peft = pytest.importorskip("peft")
    names = lora_targets(model, ["v_proj", "o_proj"])
    assert all(any(name.startswith(f"{path}.inner") for name in names) for path in narrow_layers(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=2))
    adapted(**batch).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)


def test_it_trains_and_keeps_what_is_in_use(tmp_path):
    model, batch, _ = compressed()
    places = {path: layer.places.clone() for path, layer in narrow_layers(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    assert model(**batch).loss < before
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    check_same_model(model, loaded, batch)
    assert all(torch.equal(layer.places, places[path]) for path, layer in narrow_layers(loaded).items())


def test_layers_that_are_to_be_left_alone_are_in_no_pair():
    _, _, report = compressed(ignore=["v_proj"])
    assert {layer.form for layer in report.layers.values()} == {"channel"}


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "uniform"},
        {"objective": "lossless", "keep_ratio": None},
        {"size": "latency"},
        {"metric": "identity"},
    ],
)
def test_options_that_contradict_it_are_refused(options):
    with pytest.raises(ConfigurationError, match="forms="):
        LosslessLowRankConfig(forms=FORMS, **options)
