"""Modules whose weights are as a checkpoint has them: how they are loaded, and that they answer as plain ones do."""

import copy

import pytest
import torch
from support.architecture_inputs import text_and_itself
from support.compressions import answers, build, check_same_answers, compress
from support.tiny_models import VOCABULARY, initialized
from support.tolerances import FLOAT32
from torch import nn
from transformers import BigBirdConfig, BigBirdForMaskedLM
from transformers.pytorch_utils import Conv1D

from hf_lossless_lr.checkpoint.encoding import encoded_state
from hf_lossless_lr.errors import CheckpointError
from hf_lossless_lr.formats import FORMATS, encode, search_grid
from hf_lossless_lr.layers import Stored, as_matrix

ROUNDED = {"formats": ["int8"], "embeddings": "int8", "keep_ratio": 0.22}
LAYERS = {
    "Linear": (lambda: nn.Linear(32, 24), (5, 32)),
    "Conv1D": (lambda: Conv1D(24, 32), (5, 32)),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3, stride=2), (2, 8, 9, 9)),
}
on_layers = pytest.mark.parametrize("kind", LAYERS)


def stored(kind, number_format="int8"):
    """A plain layer on the grids of a format, the stored module in its place, and an input of both."""
    make, shape = LAYERS[kind]
    plain = make().requires_grad_(False)
    matrix = as_matrix(plain, plain.weight)
    grid = search_grid(matrix, torch.ones(matrix.shape[1]), FORMATS[number_format])
    module = Stored(copy.deepcopy(plain), number_format)
    module.load_state_dict(encode(matrix, grid), strict=False)
    return module.to_float(torch.float32), module, torch.randn(shape)


@on_layers
@pytest.mark.parametrize("number_format", FORMATS)
def test_a_stored_module_answers_as_the_plain_one(kind, number_format):
    plain, module, x = stored(kind, number_format)
    torch.testing.assert_close(module(x), plain(x), rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(module(x=x), plain(x), rtol=FLOAT32, atol=FLOAT32)


@on_layers
def test_parameters_may_be_plain_tensors(kind):
    """So they are in the copies of DataParallel."""
    _, module, x = stored(kind)
    expected = module(x)
    module.template.to("meta")  # as it is after loading
    for name, parameter in list(module.named_parameters()):
        delattr(module, name)
        setattr(module, name, parameter)
    assert torch.equal(module(x), expected)


def test_settings_of_the_plain_module_can_be_asked_for_and_tensors_cannot():
    _, module, _ = stored("Conv2d")
    assert (module.stride, module.in_channels) == ((2, 2), 8)
    table = Stored(nn.Embedding(9, 32, padding_idx=3), "int8", guarded=False)
    assert (table.padding_idx, table.embedding_dim) == (3, 32)
    for name in ("weight", "nothing"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(table, name)
    assert copy.deepcopy(module).stride == (2, 2)


def test_the_output_bias_beside_a_tied_rounded_table_is_loaded(tmp_path):
    """Classes that tie the bias before the weight would have Transformers cut it to the size of the guard."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = BigBirdConfig(vocab_size=VOCABULARY, max_position_embeddings=40, attention_type="original_full", **small)
    model = initialized(lambda: BigBirdForMaskedLM(config))
    batch = text_and_itself(model, 8, 0)
    compress(model, batch, **ROUNDED)
    model.save_pretrained(tmp_path)
    other = BigBirdForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(other.cls.predictions.bias, model.cls.predictions.bias)
    assert other.cls.predictions.decoder.bias is other.cls.predictions.bias
    check_same_answers(model, other, batch)
    assert not {"_adjust_bias", "_init_weights"} & vars(other).keys()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-masked-lm"])
def test_a_tied_rounded_table_on_disk_is_refused(name, tmp_path):
    model, batch = build(name)
    if not model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    compress(model, batch, **ROUNDED)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": "auto", "max_memory": {"cpu": "8KB"}, "offload_folder": tmp_path / "off"}
    with pytest.raises(CheckpointError, match="its weight is tied to another module's, so it cannot be offloaded"):
        type(model).from_pretrained(tmp_path / "model", **options)


def test_codes_are_read_in_the_dtype_of_the_model():
    """Also by `assign=True`, which takes tensors as they are given."""
    model, batch = build("bert-sequence-classification")
    model = compress(model, batch, **ROUNDED)[0].to(torch.bfloat16)
    expected = answers(model, batch)
    model.load_state_dict(encoded_state(model, model.state_dict()), assign=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(answers(model, batch)["logits"], expected["logits"])
