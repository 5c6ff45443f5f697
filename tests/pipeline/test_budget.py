"""Budgets of a whole compression: what the compressed model takes, counted independently; nothing is timed."""

from functools import partial

import pytest
import torch
from support.compressions import BATCH_SIZE, build, count_parameters, factorized_layers
from support.tiny_models import other_inputs, split_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.pipeline import budget as budgets
from hf_lossless_lr.ranks.latency import latency_sizes

FIXED_SECONDS = 500.0


def calibrated(**options):
    model, batch = build("bert-sequence-classification")
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=False, **options))
    compressor.calibrate(model, split_batch(batch, BATCH_SIZE), eval_dataset=[other_inputs(batch)])
    return compressor, model, split_batch(batch, BATCH_SIZE)[0]


def flops(model, batch, parts):
    """FLOPs of a forward pass by PyTorch's counter, of the whole model or of some modules of it."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**batch)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return counter.get_total_flops() if parts is None else sum(by_module[f"{type(model).__name__}.{p}"] for p in parts)


@pytest.mark.parametrize("keep_ratio", [0.8, 0.6])
@pytest.mark.parametrize("scope", ["targeted", "model"])
def test_in_flops_is_kept_and_nearly_used_up(scope, keep_ratio):
    compressor, model, batch = calibrated(size="flops", scope=scope, keep_ratio=keep_ratio)
    with torch.no_grad():
        model(**batch)
    parts = None if scope == "model" else list(find_targets(model).chosen)
    dense = flops(model, batch, parts)
    compressor.compress_to()
    assert factorized_layers(model)
    assert keep_ratio - 0.08 < flops(model, batch, parts) / dense <= keep_ratio


def test_in_parameters_of_the_model_is_kept():
    compressor, model, _ = calibrated(scope="model", keep_ratio=0.7)
    dense = count_parameters(model)
    compressor.compress_to()
    assert 0.6 < count_parameters(model) / dense <= 0.7


class Clock:
    """Latency as the number of parameters that a layer has; counts how often it is asked."""

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(budgets, "latency_sizes", partial(latency_sizes, timer=self.seconds))
        monkeypatch.setattr(budgets, "forward_seconds", lambda model, batch: FIXED_SECONDS + self.of(model))

    def of(self, model):
        return sum(self.seconds(layer) for layer in self.targets(model))

    def targets(self, model):
        return [module for name, module in model.named_modules() if name in self.names]

    def seconds(self, layer, *_):
        self.calls += 1
        return float(sum(parameter.numel() for parameter in layer.parameters()))


@pytest.mark.parametrize("scope", ["targeted", "model"])
def test_in_latency_is_kept_by_what_is_measured_once(scope, monkeypatch):
    clock = Clock(monkeypatch)
    compressor, model, _ = calibrated(size="latency", scope=scope, storage="two-factor")  # linear in the rank
    clock.names = set(find_targets(model).chosen)
    fixed = FIXED_SECONDS if scope == "model" else 0.0
    dense = fixed + clock.of(model)
    for index, keep_ratio in enumerate((0.8, 0.6)):
        before = clock.calls
        compressor.compress_to(keep_ratio)
        assert (clock.calls > before) == (index == 0)  # the second ratio goes by the table of the first
        assert keep_ratio - 0.1 < (fixed + clock.of(model)) / dense <= keep_ratio


def test_is_measured_again_for_other_options(monkeypatch):
    clock = Clock(monkeypatch)
    compressor, _, _ = calibrated(size="latency")
    assert {curve.storage for curve in compressor._calibration.factors.curves.values()} == {"fastest"}
    compressor.compress_to(0.8)
    before = clock.calls
    compressor.config.rank_multiple = 4
    compressor.compress_to(0.8)
    assert clock.calls > before
