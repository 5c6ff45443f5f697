"""Models whose weights Accelerate keeps on disk, or off their modules: compressed as those in memory are."""

from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import PrefixedDataset, align_module_device
from support.compressions import (
    answers,
    build,
    check_same_answers,
    check_same_state,
    compress,
    factorized_layers,
    folder_content,
)
from support.mixtures import mixture, words
from support.tiny_models import other_inputs, split_batch

from hf_lossless_lr import CompressionReport, LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.errors import CheckpointError
from hf_lossless_lr.layers import at_hand, copied
from hf_lossless_lr.report import REPORT_NAME

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
BLOCKS_OF_LLAMA = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)
TOLERANCE = 1e-3  # where weights lie decides how kernels sum; a compression passes that on


def built(name):
    return (mixture(name), words(12)) if name == "Mixtral" else build(name)


def by_a_map(model, folder):
    """What has no room in memory stays in the checkpoint."""
    model.save_pretrained(folder / "dense")
    room = {"cpu": int(0.4 * sum(p.numel() * p.element_size() for p in model.parameters())), "disk": 10**9}
    options = {"device_map": "auto", "max_memory": room, "offload_folder": folder / "disk"}
    return type(model).from_pretrained(folder / "dense", **options)


def on_disk(model, folder):
    return disk_offload(model, str(folder / "disk"))


def off_its_modules(model, folder):
    return cpu_offload(model)


def absent(model):
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}


WAYS = pytest.mark.parametrize("offload", [by_a_map, on_disk, off_its_modules])


@pytest.mark.parametrize(
    ("name", "offload"),
    [
        ("bert-sequence-classification", by_a_map),
        ("llama", on_disk),
        ("gpt2", off_its_modules),
        ("t5", by_a_map),
        ("resnet", on_disk),
        ("Mixtral", by_a_map),
    ],
)
def test_the_result_is_that_of_the_same_model_in_memory(name, offload, tmp_path):
    model, batch = built(name)
    offloaded = offload(deepcopy(model), tmp_path)
    before = absent(offloaded)
    assert before
    expected, of_memory = compress(model, batch, keep_ratio=0.5, refit=True)
    result, report = compress(offloaded, batch, keep_ratio=0.5, refit=True)
    assert result is offloaded
    assert report.layers == of_memory.layers
    replaced = tuple(f"{layer}." for layer in factorized_layers(result))
    left = {weight for weight in before if not weight.startswith(replaced) and "expert" not in weight}
    assert absent(result) == left  # what stays dense is where it was
    check_same_answers(expected.eval(), result.eval(), batch, TOLERANCE)
    result.save_pretrained(tmp_path / "compressed")
    check_same_answers(result, type(result).from_pretrained(tmp_path / "compressed"), batch)
    assert (
        CompressionReport.from_json((tmp_path / "compressed" / REPORT_NAME).read_text()).compressed_fingerprint
        == report.compressed_fingerprint
    )


@WAYS
def test_dense_again_it_is_offloaded_again(offload, tmp_path):
    model, batch = build("llama")
    offloaded = offload(deepcopy(model), tmp_path)
    before, expected = absent(offloaded), answers(offloaded, batch)
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
    compressor.calibrate(offloaded, split_batch(dict(batch), 4), eval_dataset=[other_inputs(batch)])
    assert absent(offloaded) == before
    compressor.compress_to(0.5)
    compressor.restore()
    assert absent(offloaded) == before
    assert all(torch.equal(value, expected[name]) for name, value in answers(offloaded, batch).items())


@WAYS
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_weights_are_at_hand_for_the_time_of_a_body(offload, name, tmp_path):
    model, batch = build(name)
    offloaded = offload(deepcopy(model), tmp_path)
    before, expected = absent(offloaded), answers(offloaded, batch)
    with suppress(KeyboardInterrupt), at_hand(offloaded):
        with at_hand(offloaded):
            assert not absent(offloaded)
        assert not absent(offloaded)
        assert not [name for name in before if "forward" in vars(offloaded.get_submodule(name.rpartition(".")[0]))]
        check_same_state(model.state_dict(), offloaded.state_dict())
        assert len(set(offloaded.parameters())) == len(set(model.parameters()))  # what was shared still is
        assert all(torch.equal(value, expected[key]) for key, value in answers(offloaded, batch).items())
        raise KeyboardInterrupt
    assert absent(offloaded) == before
    assert all(torch.equal(value, expected[key]) for key, value in answers(offloaded, batch).items())


def test_a_checkpoint_that_is_still_read_from_is_not_written_anew(tmp_path):
    model, batch = build("llama")
    offloaded = by_a_map(model, tmp_path)
    before = folder_content(tmp_path / "dense")
    compress(offloaded, batch, keep_ratio=0.5)
    with pytest.raises(CheckpointError, match=r"still reads offloaded weights from model.safetensors there"):
        offloaded.save_pretrained(tmp_path / "dense")
    assert folder_content(tmp_path / "dense") == before


@pytest.mark.parametrize("options", [{"formats": ["float"]}, {"formats": ["int8"], "embeddings": "int8"}])
def test_a_compressed_model_that_is_offloaded_becomes_dense(options, tmp_path):
    model, batch = build("llama")
    ratio = 0.5 if options["formats"] == ["float"] else 0.2
    compress(model, batch, keep_ratio=ratio, **options)
    model.save_pretrained(tmp_path / "compressed")
    places = {name: "disk" if name.endswith("1") else "cpu" for name in BLOCKS_OF_LLAMA}
    folders = {"device_map": places, "offload_folder": tmp_path / "disk"}
    offloaded = type(model).from_pretrained(tmp_path / "compressed", **folders)
    assert [name for name in absent(offloaded) if "layers.1" in name]
    model.dequantize()
    check_same_answers(model.eval(), offloaded.dequantize().eval(), batch)
    assert not [name for name in absent(offloaded) if "proj" in name]


def test_experts_do_not_know_what_offloaded_them(tmp_path):
    offloaded, batch = on_disk(mixture("Mixtral"), tmp_path), words(12)
    result, _ = compress(offloaded, batch, keep_ratio=0.5)
    before = answers(result, batch)["logits"]
    result.dequantize()
    remove_hook_from_submodules(result)
    experts = [module for module in result.modules() if type(module).__name__ == "MixtralExperts"]
    assert experts
    assert not [module for module in experts if "_hf_hook" in vars(module) or "forward" in vars(module)]
    assert before.isfinite().all()


@WAYS
def test_a_copy_of_an_offloaded_layer_is_not_offloaded(offload, tmp_path, monkeypatch):
    """Else what moves weights about would put the original ones in the place of its own.

    Nor does it copy the map of all weights on its way, which would take the memory of the model once more.
    """
    monkeypatch.setattr(PrefixedDataset, "__deepcopy__", None, raising=False)
    model, _ = build("llama")
    offloaded = offload(deepcopy(model), tmp_path)
    names = {name.rpartition(".")[0] for name in absent(offloaded) if name.endswith("proj.weight")}
    assert names
    with at_hand(offloaded):
        layers = {name: offloaded.get_submodule(name) for name in names}
        copies = {name: copied(layer) for name, layer in layers.items()}
    for name, copy in copies.items():
        with torch.no_grad():
            copy.weight.zero_()
        x = torch.ones(2, copy.in_features)
        with align_module_device(copy):
            assert not copy(x).any()
        assert torch.equal(offloaded.get_submodule(name)(x), model.get_submodule(name)(x))
