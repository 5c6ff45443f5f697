"""Channels in other units, as outliers of language models are, change nothing in statistics, factors and refit."""

from copy import deepcopy

import pytest
import torch
from support.compressions import answers, build, factorized_layers
from support.tiny_models import other_inputs, split_batch
from support.tolerances import BFLOAT16, FLOAT32

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor

OUTLIER = 2.0**10  # a power of two, so that the rescaled model computes the same numbers
CHANNELS = (3, 17)


def rescaled(model):
    """The same function, with a few channels between `up_proj` and `down_proj` a thousand times larger."""
    other = deepcopy(model)
    with torch.no_grad():
        for layer in other.model.layers:
            for channel in CHANNELS:
                layer.mlp.up_proj.weight[channel] *= OUTLIER
                layer.mlp.down_proj.weight[:, channel] /= OUTLIER
    return other


def compress(model, batch, **options):
    compressor = LowRankCompressor(LosslessLowRankConfig(selection_fraction=0.25, **options))
    model = compressor.compress(model, split_batch(batch, 2), eval_dataset=[other_inputs(batch)])
    return model, compressor.report


@pytest.mark.parametrize("options", [{}, {"refit": False, "storage": "two-factor"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_outlier_channels_is_compressed_to_the_same_function(dtype, options):
    model, batch = build("llama")
    model.to(dtype)
    other = rescaled(model)
    assert torch.equal(answers(model, batch)["logits"], answers(other, batch)["logits"])
    (model, report), (other, other_report) = (compress(m, batch, **options) for m in (model, other))
    ranks = {name: layer.rank for name, layer in report.layers.items()}
    assert {name: layer.rank for name, layer in other_report.layers.items()} == ranks
    assert len(factorized_layers(other)) > 5
    assert other_report.refitted == report.refitted
    predicted = report.predicted_loss_increase
    assert other_report.predicted_loss_increase == pytest.approx(predicted, rel=100 * FLOAT32)
    mine, others = (answers(m, batch)["logits"].float() for m in (model, other))
    tolerance = 10 * FLOAT32 if dtype == torch.float32 else BFLOAT16
    assert (mine - others).abs().max() <= tolerance * mine.abs().max()
