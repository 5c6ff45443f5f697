"""Which rows of a layer's input are real tokens, whatever the order in which a model has them."""

import pytest
import torch
from support.processes import accelerator, loader_of
from support.tiny_models import VOCABULARY, build, class_labels, split_batch, text_inputs

from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.statistics.collector import collect_statistics

LENGTH = 8
COUNT = 16

_LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40}
TOKENS_FIRST = {
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "Longformer": {"hidden_size": 32, "attention_window": 4, "pad_token_id": 0, **_LAYERS},
}


@pytest.mark.parametrize("name", TOKENS_FIRST)
def test_a_batch_as_large_as_its_examples_are_long_is_no_other_than_smaller_ones(name):
    """Its mask has the same shape the other way round."""
    options = {"vocab_size": VOCABULARY, "num_labels": 3, "initializer_range": 0.2, **TOKENS_FIRST[name]}
    model = build(f"{name}ForSequenceClassification", f"{name}Config", **options)
    batch = text_inputs(COUNT, LENGTH) | class_labels(COUNT, 3)
    targets = find_targets(model).chosen
    square, other = (
        collect_statistics(model, targets, loader_of(split_batch(batch, size)), accelerator()).layers
        for size in (LENGTH, 4)
    )
    assert any(layer.tokens == int(batch["attention_mask"].sum()) for layer in other.values())
    for target in targets:
        assert square[target].tokens == other[target].tokens
        for field in ("input_covariance", "grad_covariance"):
            expected = getattr(other[target], field)
            scale = float(expected.abs().max())
            torch.testing.assert_close(getattr(square[target], field), expected, rtol=0, atol=1e-5 * scale)
