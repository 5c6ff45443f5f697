"""Networks of timm, as Transformers loads them: compressed, saved, loaded, dequantized. `make test-timm` runs this.

timm needs a torch and a torchvision that go together, which other tests do without: it has an environment of its own.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="timm is not installed; `make test-timm` makes an environment that has it")

from transformers import AutoModelForImageClassification, TimmWrapperConfig  # noqa: E402

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor  # noqa: E402
from hf_lossless_lr.layers import find_targets, is_factorized  # noqa: E402

SIZE, CLASSES = 80, 4  # pixels: Inception takes no fewer
# Architecture: arguments that make it small, layers to compress (of large ones, not all), the share left dense.
NETWORKS = {
    "resnext50_32x4d": ({"layers": (1, 1, 1, 1), "cardinality": 8}, None, 0.01),
    "densenet121": ({"growth_rate": 8, "block_config": (2, 2, 2)}, None, 0.02),
    "vgg11_bn": ({}, ["features.0", "features.4", "features.8"], 1.0),
    "inception_v3": ({}, ["Mixed_5b.*", "Mixed_6b.*"], 1.0),
    "resnetv2_50": ({"layers": (1, 1, 1, 1)}, ["re:.*stages\\.[01]\\..*"], 1.0),
    "tf_efficientnet_b0": ({}, None, 0.3),  # pads by itself; squeezes to a pixel; depthwise
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}, None, 0.2),
    "vit_tiny_patch16_224": ({"img_size": SIZE, "embed_dim": 48, "depth": 2}, None, 0.05),
}


def pictures(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, SIZE, SIZE, generator=draw), "labels": i % CLASSES} for i in range(count)]


def build(name):
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=name, num_labels=CLASSES, model_args=NETWORKS[name][0])
    model = AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # none of them 0, as new ones may be
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(pixel_values=torch.stack([p["pixel_values"] for p in pictures(2, seed=1)])).logits


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_compressed_saved_loaded_and_made_dense_again(name, tmp_path):
    model = build(name)
    _, targets, _ = NETWORKS[name]
    patterns = None if targets is None else [t if t.startswith("re:") or "*" not in t else f"*{t}" for t in targets]
    dense = deepcopy(model)
    compressor = LowRankCompressor(LosslessLowRankConfig(target_modules=patterns, batch_size=8, keep_ratio=0.6))
    compressor.compress(model, pictures(24), eval_dataset=pictures(16, seed=2))
    layers = [module for module in model.modules() if is_factorized(module)]
    assert layers
    assert compressor.report.keep_ratio <= 0.6
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    states = loaded.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    torch.testing.assert_close(
        logits(loaded), logits(model), rtol=1e-5, atol=1e-5
    )  # weights begin elsewhere in memory
    before = logits(model)
    model.dequantize()
    kinds = [type(module) for module in model.modules()]
    assert kinds == [type(module) for module in dense.modules()]
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_chosen_or_has_a_reason(name):
    model = build(name)
    found = find_targets(model)
    head = model.timm_model.get_classifier()
    names = {id(module): path for path, module in model.named_modules()}
    assert found.skipped[names[id(head)]] == "task head"
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert (path in found.chosen) != (path in found.skipped), path
    reasons = {reason.partition(":")[0] for reason in found.skipped.values()}
    assert reasons <= {"task head", "depthwise", "StdConv2d computes something else than its base type"}
    left = sum(model.get_submodule(path).weight.numel() for path in found.skipped)
    assert left <= max(NETWORKS[name][2], 0.05) * model.num_parameters()
