"""Architectures whose checkpoints have tensors that Transformers cuts and joins: NomicBERT's queries, keys, values."""

import pytest
from safetensors.torch import load_file
from support.architecture_page import EXAMPLES, compress
from support.architectures import ARCHITECTURES
from support.compressions import check_same_model, check_same_state, factorized_layers
from transformers import NomicBertForSequenceClassification

FUSED = "encoder.layers.0.attn.Wqkv.weight"


@pytest.fixture
def architecture():
    return next(row for row in ARCHITECTURES if row.model == "NomicBertForSequenceClassification")


def keys(folder):
    return {key.removeprefix("nomic_bert.") for key in load_file(folder / "model.safetensors")}


@pytest.mark.parametrize("loaded", [False, True])
def test_compressed_layers_are_in_the_files_as_they_are(architecture, loaded, tmp_path):
    """Whether the dense model was loaded from fused tensors or built; and joined again once it is dense."""
    model, batch = architecture.build(EXAMPLES)
    model.save_pretrained(tmp_path / "dense")
    assert FUSED in keys(tmp_path / "dense")
    if loaded:
        model = NomicBertForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    compress(architecture, model, batch)
    assert any(name.endswith("k_proj") for name in factorized_layers(model))
    model.save_pretrained(tmp_path / "compressed")
    assert FUSED not in keys(tmp_path / "compressed")
    again = NomicBertForSequenceClassification.from_pretrained(tmp_path / "compressed").eval()
    check_same_model(model, again, batch)
    for compressed, name in ((model, "in memory"), (again, "loaded")):
        compressed.dequantize().save_pretrained(tmp_path / name)
        plain = NomicBertForSequenceClassification.from_pretrained(tmp_path / name)
        check_same_state(compressed.state_dict(), plain.state_dict())
    assert FUSED in keys(tmp_path / "in memory")
