"""Checkpoints with factorized experts: the same model again, a stock one after `dequantize`, never a wrong one."""

import cProfile
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compressions import check_same_answers, check_same_model, compress, factorized_layers, folder_content
from support.mixtures import mixture, words
from support.tolerances import FLOAT32

from hf_lossless_lr.checkpoint import contents
from hf_lossless_lr.checkpoint.config import FORMAT_VERSION
from hf_lossless_lr.errors import CheckpointError
from hf_lossless_lr.layers import UnfusedExperts, is_factorized
from hf_lossless_lr.report.records import REPORT_NAME

SAVED = ["Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3", "GraniteMoe", "NemotronH", "Llama4"]  # in different ways
EXPERTS = {"target_modules": ["re:.*experts.*"]}
STOCK = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

assert "hf_lossless_lr" not in sys.modules
dense, compressed = sys.argv[1:]
saved = load_file(dense + "/expected.safetensors")
model, info = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
assert not any(info.values()), info
logits = model.eval()(saved["input_ids"]).logits
torch.testing.assert_close(logits, saved["logits"], rtol=1e-3, atol=1e-4)
try:
    AutoModelForCausalLM.from_pretrained(compressed)
except RuntimeError as error:
    assert "mismatch" in str(error), error
else:
    raise SystemExit("a compressed checkpoint was loaded without the package")
"""


def load(model, folder, **options):
    other, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in info if kind != "unexpected_keys"), info
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}  # of a head that the base model does not have
    return other.eval()


def unfused_in(model):
    return [name for name, module in model.named_modules() if isinstance(module, UnfusedExperts)]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A Mixtral whose experts alone are compressed, and its checkpoint; treat them as read-only."""
    folder = tmp_path_factory.mktemp("mixtral")
    model, _ = compress(mixture("Mixtral"), words(16), keep_ratio=0.5, **EXPERTS)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("family", SAVED)
def test_a_checkpoint_with_factorized_experts_loads_as_it_was(family, tmp_path):
    model = mixture(family)
    if not any(".experts." in name for name, _ in model.named_parameters()):
        pytest.skip("this version of Transformers keeps its experts in another form")
    compress(model, words(16), keep_ratio=0.5)
    assert any(".experts." in name and is_factorized(module) for name, module in model.named_modules())
    model.save_pretrained(tmp_path / "first")
    loaded = load(model, tmp_path / "first")
    check_same_model(loaded, model, words())
    loaded.save_pretrained(tmp_path / "second")
    first, second = (folder_content(tmp_path / name) for name in ("first", "second"))
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first[REPORT_NAME] == second[REPORT_NAME]


def test_a_dequantized_model_is_a_stock_one_and_a_compressed_one_is_refused_without_the_package(mixtral, tmp_path):
    compressed, folder = mixtral
    model = load(compressed, folder)
    batch, logits = words(), compressed(**words()).logits.detach()
    model.dequantize()
    assert not unfused_in(model)
    check_same_answers(model, compressed, batch, tolerance=FLOAT32)
    model.save_pretrained(tmp_path)
    save_file({"input_ids": batch["input_ids"], "logits": logits}, tmp_path / "expected.safetensors")
    code = [sys.executable, "-c", STOCK, str(tmp_path), str(folder)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_experts_may_be_dense_or_rounded_beside_factorized_ones(tmp_path):
    options = {"formats": "auto", "keep_ratio": 0.2, "embeddings": "int8"}
    model, report = compress(mixture("GptOss"), words(16), **options)
    kinds = {(layer.rank is None, layer.format) for name, layer in report.layers.items() if ".experts." in name}
    assert len(kinds) > 1
    model.save_pretrained(tmp_path)
    check_same_model(load(model, tmp_path), model, words())


def test_one_dense_expert_is_saved_beside_factorized_ones(tmp_path):
    target = {"target_modules": ["re:.*layers.1.*experts.[01].*"]}
    model, _ = compress(mixture("GptOss"), words(16), keep_ratio=0.5, **target)
    assert unfused_in(model) == ["model.layers.1.mlp.experts"]
    assert model.config.quantization_config.unfused == ["model.layers.1.mlp.experts"]
    model.save_pretrained(tmp_path)
    check_same_model(load(model, tmp_path), model, words())


def test_experts_of_which_none_is_chosen_stay_fused(tmp_path):
    dense = mixture("Mixtral")
    experts = dense.model.layers[0].mlp.experts
    model, report = compress(dense, words(16), keep_ratio=0.5, ignore=["re:.*experts.*"])
    assert model.model.layers[0].mlp.experts is experts
    assert model.config.quantization_config.unfused == []
    assert report.skipped["model.layers.0.mlp.experts.0.in_proj"].reason == "in `ignore`"
    model.save_pretrained(tmp_path)
    check_same_model(load(model, tmp_path), model, words())


def edited(folder, target, change):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(unfused=[]), "the manifest lists 'model.layers.0.mlp.experts.0.in_proj'"),
        (lambda c: c.update(unfused=["model.layers.0.mlp"]), "MixtralSparseMoeBlock has no fused weights"),
        (
            lambda c: c.update(unfused=["model.layers.7.mlp.experts"]),
            "the manifest lists 'model.layers.7.mlp.experts'",
        ),
        (lambda c: c.update(unfused="all"), "unfused: must be a list of names"),
        (lambda c: c.update(format_version=FORMAT_VERSION + 1), "Upgrade with"),
    ],
)
def test_a_manifest_that_does_not_fit_the_experts_is_refused(change, message, mixtral, tmp_path):
    model, folder = mixtral
    with pytest.raises(CheckpointError, match=message):
        type(model).from_pretrained(edited(folder, tmp_path, change))


def test_a_missing_expert_is_an_error(mixtral, tmp_path):
    model, folder = mixtral
    target = edited(folder, tmp_path, lambda c: None)
    tensors = load_file(target / "model.safetensors")
    name = next(key for key in tensors if key.endswith("experts.1.out_proj.up.weight"))
    save_file({key: t for key, t in tensors.items() if key != name}, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.1.out_proj"):
        type(model).from_pretrained(target)


def test_a_checkpoint_loads_into_its_base_model(mixtral):
    model, folder = mixtral
    base = load(model.model, folder)
    expected = model.model(words()["input_ids"]).last_hidden_state
    assert torch.allclose(base(words()["input_ids"]).last_hidden_state, expected, atol=1e-5)


def test_factorized_experts_train(mixtral):
    model = load(*mixtral).train()
    model(**words(16)).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".experts." in name)


def calls_for(experts, folder):
    """How many functions are called to compress, to save and to load a mixture of so many experts."""
    model, batch, profile = mixture("Mixtral", num_local_experts=experts), words(16), cProfile.Profile()
    with profile:
        compress(model, batch, keep_ratio=0.5, refit=True, **EXPERTS)
        model.save_pretrained(folder)
        load(model, folder)
    return sum(entry.callcount for entry in profile.getstats())


def test_the_work_grows_with_the_number_of_experts_and_not_with_its_square(tmp_path):
    """Models have thousands of them: nothing is looked for in all layers for the sake of one."""
    calls_for(4, tmp_path / "first")  # what is called once only
    few, more, many = (calls_for(experts, tmp_path / str(experts)) for experts in (16, 32, 64))
    assert many - more <= 2.2 * (more - few)


def test_files_are_read_a_few_times_whatever_the_number_of_layers(mixtral, monkeypatch):
    model, folder = mixtral
    opened, really = [], contents.safe_open
    monkeypatch.setattr(contents, "safe_open", lambda file, **options: opened.append(file) or really(file, **options))
    load(model, folder)
    assert 1 <= len(opened) <= 6 < len(factorized_layers(model))
