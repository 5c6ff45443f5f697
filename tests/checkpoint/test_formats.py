"""Checkpoints with rounded weights: what is in memory, what is in the files, and that both are the same numbers."""

import copy
import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compressions import build, check_same_answers, check_same_model, compress, folder_content
from support.tiny_models import TINY_MODELS
from support.tolerances import BFLOAT16

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.checkpoint.encoding import encoded_state
from hf_lossless_lr.errors import CheckpointError, ConfigurationError
from hf_lossless_lr.formats import FORMATS
from hf_lossless_lr.layers import checkpoint_bytes, grids_in, is_factorized, rounded_modules, stored_in

WEIGHTS = "model.safetensors"
PRODUCT = 1e-4  # of sums in another order
SOME = ("bert-sequence-classification", "bert-masked-lm", "albert", "gpt2", "llama", "t5", "resnet")
KEEP = {"int8": 0.22, "int6": 0.2, "int5": 0.18, "int4": 0.16, "int3": 0.13}
on_models = pytest.mark.parametrize("name", TINY_MODELS)
on_some_models = pytest.mark.parametrize("name", SOME)
on_formats = pytest.mark.parametrize("number_format", FORMATS)


def rounded(name, number_format, **options):
    """A tiny model with all targets and embeddings in a format, some of them factorized."""
    model, batch = build(name)
    options = {"formats": [number_format], "embeddings": number_format, "keep_ratio": KEEP[number_format]} | options
    return compress(model, batch, **options)[0], batch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Gives a rounded model, its batch, and the folder that it is saved in; treat them as read-only."""

    @functools.cache
    def make(name, number_format):
        model, batch = rounded(name, number_format)
        folder = tmp_path_factory.mktemp(f"{name}-{number_format}")
        model.save_pretrained(folder)
        return model, batch, folder

    return make


def load(model, folder, **options):
    other, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return other.eval()


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# --- there and back -------------------------------------------------------------------------------------------------


@on_formats
@on_models
def test_a_reload_is_the_same_bit_for_bit_and_is_saved_to_the_same_bytes(name, number_format, checkpoint, tmp_path):
    model, batch, folder = checkpoint(name, number_format)
    other = load(model, folder)
    check_same_model(model, other, batch)
    kinds = {path: grid.kind for path, grid in grids_in(model).items()}
    assert kinds == {path: grid.kind for path, grid in grids_in(other).items()}
    assert len(kinds) > 4
    other.save_pretrained(tmp_path)
    assert folder_content(tmp_path)[WEIGHTS] == folder_content(folder)[WEIGHTS]
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@on_formats
@on_some_models
def test_bfloat16_is_the_rounded_weights_in_bfloat16_and_is_saved_to_the_same_codes(
    name, number_format, checkpoint, tmp_path
):
    model, _, folder = checkpoint(name, number_format)
    half = load(model, folder, dtype=torch.bfloat16)
    for path, module, _ in rounded_modules(model):
        assert torch.equal(half.get_submodule(path).weight, module.weight.bfloat16()), path
    half.save_pretrained(tmp_path)
    before, after = (load_file(part / WEIGHTS) for part in (folder, tmp_path))
    assert before.keys() == after.keys()
    codes = [key for key in before if key.rpartition(".")[2] in ("codes", "scale", "zero")]
    assert codes
    assert all(torch.equal(before[key], after[key]) for key in codes)


@on_formats
@on_some_models
def test_dequantizing_gives_a_plain_model_with_the_rounded_weights(name, number_format, checkpoint, tmp_path):
    model, batch, folder = checkpoint(name, number_format)
    plain = load(model, folder)
    expected = {
        path: module.weight.clone() for path, module, _ in rounded_modules(plain) if not is_factor(plain, path)
    }
    plain.dequantize()
    assert not grids_in(plain)
    assert expected
    assert all(torch.equal(plain.get_submodule(path).weight, weight) for path, weight in expected.items())
    check_same_answers(model, plain, batch, tolerance=PRODUCT)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    check_same_model(plain, type(plain).from_pretrained(tmp_path).eval(), batch)


def is_factor(model, path):
    return is_factorized(model.get_submodule(path.rpartition(".")[0]))


@on_formats
@on_some_models
def test_the_bytes_are_those_that_the_report_states(name, number_format):
    model, batch = build(name)
    options = {"formats": [number_format], "embeddings": number_format, "keep_ratio": KEEP[number_format]}
    model, report = compress(model, batch, **options)
    stored = encoded_state(model, model.state_dict())
    unique = {(t.data_ptr(), t.dtype): t.numel() * t.element_size() for t in stored.values()}
    assert report.compressed.bytes == sum(unique.values()) == checkpoint_bytes(model)
    for layer, entry in report.layers.items():
        own = [t for key, t in stored.items() if key.startswith(f"{layer}.") and not key.endswith((".bias", "weight"))]
        assert entry.bytes == sum(t.numel() * t.element_size() for t in own)
        assert entry.format == number_format
    assert report.bytes_ratio <= KEEP[number_format]
    assert report.bytes_ratio < report.keep_ratio


def test_one_layer_may_be_dense_and_rounded_and_another_factorized(tmp_path):
    model, batch = build("bert-sequence-classification")
    model, report = compress(model, batch, formats=["auto"], keep_ratio=0.16)
    kinds = {(layer.format, layer.rank is None) for layer in report.layers.values()}
    assert len(kinds) > 2
    model.save_pretrained(tmp_path)
    check_same_model(model, load(model, tmp_path), batch)


def test_a_tied_table_is_stored_once(checkpoint):
    model, _, folder = checkpoint("llama", "int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = load_file(folder / WEIGHTS)
    assert {key for key in tensors if key.startswith(("lm_head", "model.embed_tokens"))} == {
        f"model.embed_tokens.{part}" for part in ("codes", "scale", "weight")
    }
    other = load(model, folder)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_a_tied_table_is_stored_once_from_a_state_dict_with_a_copy_for_each_name(checkpoint, tmp_path):
    model, _, folder = checkpoint("llama", "int8")
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_loaded_model_names_no_class_as_one_to_keep_whole_that_it_does_not_have(checkpoint):
    """FSDP looks for each."""
    model, _, folder = checkpoint("llama", "int8")
    loaded = load(model, folder)
    assert set(loaded._no_split_modules) == set(model._no_split_modules) == {"LlamaDecoderLayer"}


# --- training -------------------------------------------------------------------------------------------------------


def test_trained_weights_are_rounded_anew_with_a_warning(checkpoint, tmp_path, caplog):
    model, batch, folder = checkpoint("bert-sequence-classification", "int4")
    model = load(model, folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(**batch).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert "no longer on the grids" in caplog.text
    other = load(model, tmp_path)
    for path, module, grid in rounded_modules(model):
        error = (other.get_submodule(path).weight - module.weight).abs().max()
        assert error <= 2 * grid.scale.max(), path  # the new grids are about as fine
    caplog.clear()
    other.save_pretrained(tmp_path / "again")
    assert "no longer on the grids" not in caplog.text


@on_formats
def test_a_model_in_memory_reads_its_own_checkpoint(number_format, checkpoint):
    """As the Trainer does, when it resumes or goes back to the best model."""
    model, batch, folder = checkpoint("bert-sequence-classification", number_format)
    other = load(model, folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.load_state_dict(load_file(folder / WEIGHTS))
    check_same_model(model, other, batch)
    for path, _, grid in rounded_modules(model):
        assert torch.equal(grids_in(other)[path].scale, grid.scale)
    other.dequantize()
    assert not other._load_state_dict_pre_hooks


def test_a_copy_keeps_the_grids(checkpoint, tmp_path):
    model, batch, folder = checkpoint("bert-sequence-classification", "int4")
    other = copy.deepcopy(model)
    check_same_model(model, other, batch)
    other.save_pretrained(tmp_path)
    assert folder_content(tmp_path)[WEIGHTS] == folder_content(folder)[WEIGHTS]


# --- as they are stored ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@on_some_models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_may_stay_as_it_is_stored(name, dtype, checkpoint, tmp_path):
    model, batch, folder = checkpoint(name, "int8")
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    kept = load(model, folder, dtype=dtype, quantization_config=LosslessLowRankConfig(compute="stored"))
    stored = stored_in(kept)
    assert len(stored) > 4
    assert all(module.codes.dtype == torch.int8 for module in stored.values())
    plain = load(model, folder, dtype=dtype)
    check_same_answers(plain, kept, batch, tolerance=PRODUCT if dtype == torch.float32 else 10 * BFLOAT16)
    kept.save_pretrained(tmp_path)
    before, after = (load_file(part / WEIGHTS) for part in (folder, tmp_path))
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor.to(after[key].dtype)), key
    check_same_model(load(model, tmp_path, dtype=dtype), plain, batch)
    kept.dequantize()
    assert not stored_in(kept)
    check_same_answers(plain, kept, batch, tolerance=PRODUCT if dtype == torch.float32 else 10 * BFLOAT16)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_what_is_beside_stored_weights_trains(checkpoint):
    """Codes do not; in bfloat16 they have a product without a gradient, which is for inference alone."""
    model, batch, folder = checkpoint("bert-sequence-classification", "int8")
    config = LosslessLowRankConfig(compute="stored")
    kept = load(model, folder, dtype=torch.bfloat16, quantization_config=config)
    kept(**batch).loss.backward()
    trainable = {name for name, parameter in kept.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in kept.named_parameters() if parameter.grad is not None} == trainable
    assert "classifier.bias" in trainable
    guards = [module.weight for module in stored_in(kept).values() if module.guarded]
    assert guards
    assert not any(guard.requires_grad for guard in guards)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("compute", ["dequantized", "stored"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(compute, value, checkpoint, tmp_path):
    model, _, folder = checkpoint("bert-sequence-classification", "int8")
    other = copied(folder, tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    tensors[f"{DENSE}.scale"][3] = torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{DENSE}.* NaN or infinite"):
        load(model, other, quantization_config=LosslessLowRankConfig(compute=compute))


@pytest.mark.parametrize("name", ["bert-sequence-classification", "llama", "gpt2"])
@pytest.mark.parametrize("words", [-8, 8])
def test_resized_embeddings_are_saved_with_the_rows_that_they_had(name, words, checkpoint, tmp_path):
    model, _, folder = checkpoint(name, "int4")
    model = load(model, folder)
    table = model.get_input_embeddings().weight
    old, count = table.detach().clone(), len(table) + words
    model.resize_token_embeddings(count)
    model.save_pretrained(tmp_path)
    found = load(model, tmp_path).get_input_embeddings().weight
    assert len(found) == count
    rows = min(count, len(old))
    assert torch.equal(found[:rows], old[:rows])
    new = model.get_input_embeddings().weight[rows:]
    assert torch.allclose(found[rows:], new, atol=0.2 * float(old.abs().max()))


@on_formats
def test_rows_that_were_not_changed_keep_their_codes_where_another_one_was(number_format, checkpoint, tmp_path):
    model, _, folder = checkpoint("llama", number_format)
    model = load(model, folder)
    layer = model.model.layers[0].mlp.down_proj
    rounded_part = getattr(layer, "up", layer)
    with torch.no_grad():
        rounded_part.weight[0] *= 1.01
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, tensor in before.items():
        assert torch.equal(tensor[1:], after[name][1:]), name


@on_formats
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_a_dense_weight_that_is_offloaded_stays_as_it_is_stored(number_format, checkpoint, tmp_path):
    model, batch, folder = checkpoint("bert-sequence-classification", number_format)
    here = ("bert.embeddings", "bert.pooler", "classifier", "bert.encoder.layer.0")
    device_map = {**dict.fromkeys(here, "cpu"), "bert.encoder.layer.1": "disk"}
    other = load(model, folder, device_map=device_map, offload_folder=tmp_path / "offloaded")
    offloaded = {name.rpartition(".")[0] for name, parameter in other.named_parameters() if parameter.is_meta}
    assert offloaded & set(grids_in(model)) == set(stored_in(other))
    check_same_answers(model, other, batch, tolerance=PRODUCT)
    other.save_pretrained(tmp_path / "again")
    assert folder_content(tmp_path / "again")[WEIGHTS] == folder_content(folder)[WEIGHTS]


# --- refusals -------------------------------------------------------------------------------------------------------

FACTOR, DENSE = "bert.encoder.layer.0.attention.self.query", "bert.embeddings.word_embeddings"
BAD_FILES = {
    "codes missing": (lambda t: t.pop(f"{DENSE}.codes"), "lacks the tensor"),
    "scale missing": (lambda t: t.pop(f"{DENSE}.scale"), "lacks the tensor"),
    "too few columns": (lambda t: t.update({f"{DENSE}.codes": t[f"{DENSE}.codes"][:, :-1].contiguous()}), "the shape"),
    "codes of another kind": (
        lambda t: t.update({f"{DENSE}.codes": t[f"{DENSE}.codes"].view(torch.int8)}),
        "has the dtype I8; it must be in U8",
    ),
    "a float scale": (lambda t: t.update({f"{DENSE}.scale": t[f"{DENSE}.scale"].half()}), "has the dtype F16"),
    "a scale that is not a number": (lambda t: t[f"{DENSE}.scale"].fill_(0x7FC0), "NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_damaged_file_is_refused(case, checkpoint, tmp_path):
    change, text = BAD_FILES[case]
    model, _, folder = checkpoint("bert-sequence-classification", "int4")
    folder = copied(folder, tmp_path / "copy")
    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=text):
        type(model).from_pretrained(folder)


def test_splitting_over_devices_is_refused(checkpoint, monkeypatch):
    model, _, folder = checkpoint("llama", "int4")
    monkeypatch.setattr(type(model), "_is_distributed_loading_by_transformers", True, raising=False)
    with pytest.raises(CheckpointError, match="cannot be split over devices"):
        type(model).from_pretrained(folder)


BAD_RECORDS = {
    "an unknown format": ({"rank": None, "storage": None, "format": "int7"}, "format must be one of float, int8"),
    "dense and in float": ({"rank": None, "storage": None}, "rank must be a positive integer"),
    "pivoted int4": ({"rank": 2, "storage": "pivoted", "format": "int4"}, "does not go with the format 'int4'"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_manifest_that_cannot_be_is_refused(case):
    record, text = BAD_RECORDS[case]
    with pytest.raises(CheckpointError, match=text):
        LosslessLowRankConfig(modules={"a": record})


BAD_OPTIONS = {
    "an unknown format": ({"formats": ["int7"]}, "formats: 'int7' is unknown"),
    "no format": ({"formats": []}, "formats: must be"),
    "pivoted int4": ({"formats": ["int4"], "storage": "pivoted"}, "storage='pivoted' contradicts the format 'int4'"),
    "parameters": ({"formats": ["float", "int8"], "size": "parameters"}, "use size='bytes'"),
    "the paper": ({"formats": ["int8"], "objective": "paper-compact"}, "choose ranks alone"),
    "embeddings": ({"embeddings": "int2"}, "embeddings: 'int2' is unknown"),
    "compute": ({"compute": "fast"}, "compute: must be one of dequantized, stored"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_that_cannot_be_is_refused(case):
    options, text = BAD_OPTIONS[case]
    with pytest.raises(ConfigurationError, match=text):
        LosslessLowRankConfig(**options)


def test_formats_are_kept_finest_first_and_auto_means_all():
    assert LosslessLowRankConfig(formats=("int3", "float")).formats == ["float", "int3"]
    assert LosslessLowRankConfig(formats="auto").formats == ["float", *FORMATS]
    assert (LosslessLowRankConfig().formats, LosslessLowRankConfig().size) == (["float"], "parameters")
    assert LosslessLowRankConfig(formats=["int8"]).size == "bytes"
