"""Blocks that PyTorch wraps, to checkpoint their activations or to compile them: files have the names without that."""

import json

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from support.compressions import build, check_same_answers, compress
from support.mixtures import mixture
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hf_lossless_lr.layers import NarrowLinear, Unfused, grids_in

OPTIONS = {
    "factorized": {"keep_ratio": 0.6},
    "rounded": {"formats": ["int8"], "embeddings": "int8", "keep_ratio": 0.2},
    "narrow": {"forms": ["channel", "dimensions"], "keep_ratio": 0.4},
}


def checkpointed(block):
    return checkpoint_wrapper(block)


def compiled(block):
    return torch.compile(block, backend="eager")


def unwraps_compiled_blocks():
    """Whether this Accelerate can unwrap a model with compiled blocks, as Transformers asks it when it saves one."""
    try:
        extract_model_from_parallel(nn.Sequential(compiled(nn.Linear(1, 1))))
    except KeyError:
        return False
    return True


saves_compiled_blocks = pytest.mark.skipif(
    not unwraps_compiled_blocks(), reason="this Accelerate fails on models with compiled blocks"
)


def wrap(model, wrapper):
    blocks = model.model.layers
    for place in range(len(blocks)):
        blocks[place] = wrapper(blocks[place])


def manifest_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(
    ("wrapper", "before"),
    [(checkpointed, True), (checkpointed, False), pytest.param(compiled, False, marks=saves_compiled_blocks)],
)
def test_are_saved_as_if_nothing_was_around_them(wrapper, before, kind, tmp_path):
    model, batch = build("llama")
    if before:
        wrap(model, wrapper)
    compress(model, batch, **OPTIONS[kind])
    if not before:
        model.save_pretrained(tmp_path / "plain")
        wrap(model, wrapper)
    model.eval().save_pretrained(tmp_path / "wrapped")
    assert "has no certificate" not in (tmp_path / "wrapped" / "README.md").read_text()
    loaded, info = type(model).from_pretrained(tmp_path / "wrapped", output_loading_info=True)
    assert not any(info.values()), info
    check_same_answers(model, loaded.eval(), batch)
    assert grids_in(loaded).keys() == grids_in(model).keys()
    assert any(isinstance(module, NarrowLinear) for module in loaded.modules()) == (kind == "narrow")
    if not before:
        for name in ("config.json", "model.safetensors", "README.md"):
            assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_of_which_a_module_of_experts_is_wrapped_itself_load(tmp_path):
    model = mixture("Mixtral")
    batch = build("llama")[1]
    compress(model, batch, keep_ratio=0.5)
    model.save_pretrained(tmp_path / "plain")
    wrap(model, checkpointed)
    model.save_pretrained(tmp_path / "wrapped")
    assert manifest_in(tmp_path / "wrapped") == manifest_in(tmp_path / "plain")
    loaded = type(model).from_pretrained(tmp_path / "wrapped").eval()
    assert any(isinstance(module, Unfused) for module in loaded.modules())
    check_same_answers(model.eval(), loaded, batch)


@saves_compiled_blocks
def test_a_part_of_a_wrapped_model_is_saved_without_the_wrapper(tmp_path):
    model, batch = build("llama")
    compress(model, batch, **OPTIONS["rounded"])
    wrap(model, compiled)
    model.eval().model.save_pretrained(tmp_path)
    loaded: nn.Module = type(model.model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = (each(batch["input_ids"]).last_hidden_state for each in (model.model, loaded))
    torch.testing.assert_close(found, expected)
