"""Checkpoints with factorized projections that were no layers: the same model again, and never a wrong one."""

import subprocess
import sys

import pytest
import torch
from support.architecture_page import EXAMPLES, compress
from support.architectures import ARCHITECTURES
from support.compressions import check_same_answers, check_same_model, folder_content
from support.tolerances import FLOAT32

from hf_lossless_lr.layers import Unfused, is_factorized

PLACES = {  # where a model has such projections, and their names
    "XLNetForSequenceClassification": ("transformer.layer.0.rel_attn", "qkvo"),
    "SiglipModel": ("vision_model.head.attention", "qkv"),
}
STOCK = """
import sys
import transformers

assert "hf_lossless_lr" not in sys.modules
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, name).from_pretrained(folder)
    except RuntimeError as error:
        assert "mismatch" in str(error), error
    else:
        raise SystemExit(f"a compressed {name} was loaded without the package")
"""


def dense(name):
    row = next(row for row in ARCHITECTURES if row.model == name)
    return row, *row.build(EXAMPLES)


def smaller(name, **options):
    row, model, batch = dense(name)
    compress(row, model, batch, **options)
    return model, batch


@pytest.fixture(scope="module", params=PLACES)
def saved(request, tmp_path_factory):
    """A compressed model with its inputs, and its checkpoint; treat them as read-only."""
    model, batch = smaller(request.param, keep_ratio=0.5, storage="two-factor")
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, batch, folder


def projections(model):
    path, letters = PLACES[type(model).__name__]
    return [model.get_submodule(f"{path}.{letter}_proj") for letter in letters]


def test_projections_are_factorized_and_loaded_as_they_were(saved, tmp_path):
    model, batch, folder = saved
    assert any(map(is_factorized, projections(model)))
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    check_same_model(loaded.eval(), model, batch)
    loaded.save_pretrained(tmp_path)
    assert folder_content(tmp_path)["model.safetensors"] == folder_content(folder)["model.safetensors"]


def test_a_dequantized_model_has_its_own_modules_again(saved):
    model, batch, folder = saved
    loaded = type(model).from_pretrained(folder).eval()
    loaded.dequantize()
    assert not any(isinstance(module, Unfused) for module in loaded.modules())
    assert loaded.state_dict().keys() == dense(type(model).__name__)[1].state_dict().keys()
    check_same_answers(loaded, model, batch, tolerance=FLOAT32)


def test_projections_may_be_rounded(saved, tmp_path):
    model, batch = smaller(type(saved[0]).__name__, formats="auto", keep_ratio=0.2)
    model.save_pretrained(tmp_path)
    check_same_model(type(model).from_pretrained(tmp_path).eval(), model, batch)


def graphs(model, inputs):
    """A model as it is compiled, and as it is exported: a function of its inputs each."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs)
    return compiled, torch.export.export(model, (), kwargs=inputs, strict=False).module()


def test_a_compiled_model_and_an_exported_program_answer_the_same(saved):
    model, batch, folder = saved
    loaded = type(model).from_pretrained(folder).eval().requires_grad_(False)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    name = next(name for name in loaded(**inputs) if "logits" in name)
    expected = loaded(**inputs)[name]
    try:
        graphs(dense(type(model).__name__)[1].requires_grad_(False), inputs)
    except (AttributeError, NameError, TypeError) as error:  # of old versions
        pytest.skip(f"neither does the dense model go through: {error}")
    for each in graphs(loaded, inputs):
        torch.testing.assert_close(each(**inputs)[name], expected, rtol=0, atol=FLOAT32 * float(expected.abs().max()))


def test_it_is_refused_without_the_package(tmp_path):
    arguments = []
    for name in PLACES:
        path, _ = PLACES[name]
        model, _ = smaller(name, keep_ratio=0.5, target_modules=[f"{path}.{letter}_proj" for letter in "qkv"])
        assert any(map(is_factorized, projections(model)))
        model.save_pretrained(tmp_path / name)
        arguments += [name, str(tmp_path / name)]
    done = subprocess.run([sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
