"""Convolutional networks through the whole pipeline: forms, groups, formats, batch normalizations, real pictures."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from datasets import load_dataset
from support.tiny_models import build
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.factors import batch_norms, shifted_batch_norms
from hf_lossless_lr.layers import in_place, is_factorized
from hf_lossless_lr.pipeline import trial
from hf_lossless_lr.processes import make_accelerator
from hf_lossless_lr.verdict import PairedOutcomes

COUNT = 48


def pictures(count=COUNT, size=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    smooth = torch.randn(count, 3, size, size, generator=draw)
    smooth = (smooth + smooth.roll(1, -1) + smooth.roll(1, -2)) / 3**0.5
    return [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(smooth)]


def grouped():
    """A RegNet: bottlenecks with grouped 3 x 3 kernels."""
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8, "num_labels": 3}
    torch.manual_seed(0)
    return build("RegNetForImageClassification", "RegNetConfig", **sizes).eval()


@torch.no_grad()
def logits(model):
    return model(pixel_values=torch.stack([p["pixel_values"] for p in pictures(4, seed=9)])).logits


@pytest.mark.parametrize(
    "options",
    [{}, {"formats": ["int8"]}, {"forms": ["channel"]}, {"size": "flops"}, {"metric": "activation"}],
    ids=str,
)
def test_a_grouped_network_is_compressed_and_loaded_again(tmp_path, options):
    model = grouped()
    keep = 0.2 if "formats" in options else 0.5
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=keep, batch_size=16, **options))
    compressor.compress(model, pictures(), eval_dataset=pictures(32, seed=1))
    report = compressor.report
    layers = report.layers.values()
    if "formats" in options:
        assert sum(layer.bytes for layer in layers) <= keep * sum(layer.dense_bytes for layer in layers)
    elif "size" not in options:
        assert report.keep_ratio <= keep
    assert {layer.groups for layer in report.layers.values() if layer.rank} > {1}
    forms = {layer.form for layer in report.layers.values() if layer.rank}
    assert forms == ({"channel", "spatial"} if not {"forms", "metric"} & set(options) else {"channel"})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    before = logits(model)
    loaded.dequantize()
    assert not any(is_factorized(module) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_flops_are_those_of_the_compressed_network():
    """Of the spatial form too, whose first filters keep the width of the input."""
    from torch.utils.flop_counter import FlopCounterMode

    model = grouped()
    config = LosslessLowRankConfig(keep_ratio=0.5, size="flops", scope="model", batch_size=16, refit=False)

    def flops():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            logits(model)
        return counter.get_total_flops()

    dense = flops()
    compressor = LowRankCompressor(config)
    compressor.compress(model, pictures(), eval_dataset=pictures(32, seed=1))
    assert any(layer.form == "spatial" for layer in compressor.report.layers.values())
    assert 0.45 < flops() / dense <= 0.5


class TestBatchNorms:
    def shifted(self, damage):
        """The normalizations of a network whose first layer was damaged, shifted over its pictures."""
        model = grouped()
        with torch.no_grad():
            for norm in batch_norms(model).values():
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        name = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
        layer = deepcopy(model.get_submodule(name))
        damage(layer)
        loader = DataLoader(pictures(), 16)
        norms = shifted_batch_norms(model, {name: layer}, [loader], make_accelerator())
        return model, {name: layer, **norms}, norms

    def test_are_as_they_were_where_nothing_changed(self):
        model, _, norms = self.shifted(lambda layer: None)
        assert norms.keys() == batch_norms(model).keys()
        for name, norm in norms.items():
            old = model.get_submodule(name)
            torch.testing.assert_close(norm.running_mean, old.running_mean, rtol=0, atol=1e-5)
            torch.testing.assert_close(norm.running_var, old.running_var, rtol=1e-5, atol=0)
            assert norm is not old

    def test_undo_a_change_of_scale_and_mean(self):
        """Of a layer that is stronger; the moments are taken in one batch here."""

        def damage(layer):
            layer.weight.data *= 1.5

        model, replaced, norms = self.shifted(damage)
        first, seen = next(iter(norms)), []
        x = torch.stack([p["pixel_values"] for p in pictures()])
        with torch.no_grad():
            for layers in ({}, {name: layer for name, layer in replaced.items() if name not in norms}):
                handle = model.get_submodule(first).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
                with in_place(model, layers):
                    model(pixel_values=x)
                handle.remove()
        dense, now = seen
        old, new = model.get_submodule(first), norms[first]
        for values, found, kept in (
            (lambda t: t.mean((0, 2, 3)), new.running_mean, old.running_mean),
            (lambda t: t.var((0, 2, 3), correction=0), new.running_var, old.running_var),
        ):
            torch.testing.assert_close(found - kept, values(now) - values(dense), rtol=1e-3, atol=1e-5)

    def test_leave_the_model_as_it_was(self):
        model, _, _ = self.shifted(lambda layer: layer.weight.data.mul_(2))
        again = grouped()
        assert [type(m) for m in model.modules()] == [type(m) for m in again.modules()]
        assert not any(module._forward_pre_hooks for module in model.modules())


def outcomes(divergence, loss):
    """Of four examples, a unit each; the dense model loses 1 nat in all."""
    divergence = np.array(divergence)
    losses, count = np.array([np.full(4, 0.25), np.full(4, loss / 4)]), np.ones(4, dtype=int)
    return PairedOutcomes(losses, count, 4, True, cluster_of_unit=np.arange(4), divergence=divergence)


def test_one_outlier_does_not_decide_whether_predictions_are_closer():
    before, after = outcomes([0.04, 0.04, 0.04, 1.0], 1.0), outcomes([0.01, 0.01, 0.01, 1.21], 1.0)
    assert after.mean_divergence > before.mean_divergence
    assert trial._distance(after) < trial._distance(before)
    assert trial._distance(before) == pytest.approx((3 * 0.2 + 1) / 4)


def test_a_shift_must_bring_predictions_closer_and_not_raise_the_loss():
    before = outcomes([0.09] * 4, 1.0)
    assert trial._clearly_closer(before, outcomes([0.04, 0.04, 0.04, 0.05], 1.0), 0.95)
    assert not trial._clearly_closer(before, outcomes([0.04, 0.04, 0.04, 0.05], 1.1), 0.95)
    assert not trial._clearly_closer(before, outcomes([0.01, 0.01, 0.25, 0.36], 1.0), 0.95)


@pytest.mark.slow
@pytest.mark.testbed
def test_half_of_a_trained_network_costs_little(testbed):
    """On real pictures; the frontier is measured by studies/convolutional_networks.py."""

    def part(file, count):
        rows = load_dataset("parquet", data_files=str(testbed / "cifar" / file), split="train").select(range(count))
        pixels = torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).movedim(-1, 0) for p in rows["image"]])
        return [{"pixel_values": x, "labels": y} for x, y in zip(pixels / 127.5 - 1, rows["label"], strict=True)]

    model = AutoModelForImageClassification.from_pretrained(testbed / "cnn-regnet", dtype=torch.float32).eval()
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5))
    compressor.calibrate(model, part("train.parquet", 512), eval_dataset=part("heldout.parquet", 1000))
    compressor.compress_to()
    report = compressor.report
    assert {layer.form for layer in report.layers.values() if layer.rank} == {"channel", "spatial"}
    assert report.certificate.divergence < 0.01  # .006 on all pictures, with twice the data
    assert report.compressed.loss - report.dense.loss < 0.02
