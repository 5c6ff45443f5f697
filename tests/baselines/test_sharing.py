"""Basis sharing: what is least in the metric of both layers, one basis for two blocks, counted once."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny_models import TINY_MODELS, split_batch
from torch import nn

from hf_lossless_lr.baselines import compare
from hf_lossless_lr.baselines.sharing import shared_bases, sharing_groups
from hf_lossless_lr.checkpoint import LosslessLowRankConfig
from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.pipeline import LowRankCompressor

BLOCK = "bert.encoder.layer"
QUERIES = [f"{BLOCK}.{block}.attention.self.query" for block in (0, 1)]


@pytest.fixture(scope="module")
def calibrated():
    model, batch = TINY_MODELS["bert-sequence-classification"](60)
    compressor = LowRankCompressor(LosslessLowRankConfig.from_preset("svd"))
    compressor.calibrate(model, split_batch(batch, 20))
    yield find_targets(model).chosen, compressor.calibration_statistics
    compressor.release()


def test_the_same_layers_of_two_blocks_share_but_those_that_read_alone_and_do_not_widen(calibrated):
    targets, statistics = calibrated
    found = [list(group) for group in sharing_groups(targets, statistics, 2)]
    assert sorted(name for group in found for name in group) == sorted(targets)
    pairs = {group[0].removeprefix(f"{BLOCK}.0.") for group in found if len(group) == 2}
    assert pairs == {f"attention.self.{name}" for name in ("query", "key", "value")} | {"intermediate.dense"}
    assert all(group[1] == group[0].replace(".0.", ".1.") for group in found if len(group) == 2)


def test_blocks_of_a_stage_share_and_stages_do_not():
    names = {f"stages.{stage}.blocks.{block}.{kind}": stage for stage in (0, 1) for block in range(4) for kind in "qk"}
    targets = {name: nn.Linear(8 << stage, 8 << stage) for name, stage in names.items()}
    pairs = [tuple(f"stages.{s}.blocks.{b}.{kind}" for kind in "qk") for s in (0, 1) for b in range(4)]
    found = sharing_groups(targets, SimpleNamespace(groups=pairs), 2)
    assert [tuple(name.replace("stages.", "").replace("blocks.", "") for name in group) for group in found] == [
        (f"{s}.{b}.{kind}", f"{s}.{b + 1}.{kind}")
        for s, kind in ((0, "q"), (0, "k"), (1, "q"), (1, "k"))
        for b in (0, 2)
    ]


def test_of_one_block_alone_nothing_is_shared(calibrated):
    assert all(len(group) == 1 for group in sharing_groups(*calibrated, 1))


def test_the_basis_is_the_best_one_for_both_layers_in_their_common_metric(calibrated):
    """By the eigenvectors of the two weights in the root of the summed moments, in float64."""
    targets, statistics = calibrated
    layers = shared_bases(targets, 0.5, statistics=statistics)
    first, second = (layers[name] for name in QUERIES)
    assert first.down.weight is second.down.weight
    weights = torch.cat([targets[name].weight.detach().double() for name in QUERIES])
    moments = sum(
        statistics.layers[name].tokens * statistics.layers[name].input_covariance[0].double() for name in QUERIES
    )
    moments = moments + LosslessLowRankConfig.damping * moments.diagonal().diag()
    values, vectors = torch.linalg.eigh(moments)
    root = vectors * values.sqrt() @ vectors.T
    left = torch.linalg.svd(weights @ root).U[:, : len(first.down.weight)]
    expected = left @ left.T @ weights
    found = torch.cat([layer.up.weight.double() @ layer.down.weight.double() for layer in (first, second)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_at_full_rank_layers_are_the_dense_ones(calibrated):
    targets, statistics = calibrated
    layers = shared_bases(targets, 1.0, statistics=statistics, together=1)
    wide = [name for name in targets if name.endswith("intermediate.dense")]
    full = shared_bases({name: targets[name] for name in QUERIES}, 2.0, statistics=statistics)
    for name in QUERIES:
        found = full[name].up.weight @ full[name].down.weight
        torch.testing.assert_close(found, targets[name].weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(full[name].bias, targets[name].bias)
    for name in wide:
        assert len(layers[name].down.weight) < min(targets[name].weight.shape)


def test_a_size_that_no_rank_has_is_an_error_that_names_the_layer(calibrated):
    targets, statistics = calibrated
    with pytest.raises(ConfigurationError, match=r"keep_ratio=0.001 cannot be reached in '.*layer\.0\."):
        shared_bases(targets, 0.001, statistics=statistics)


def test_what_is_shared_counts_once():
    model, batch = TINY_MODELS["bert-sequence-classification"](60)
    data = split_batch(batch, 20)
    (found,) = compare(model, data[:2], methods=["basis-sharing"], keep_ratios=[0.5], eval_dataset=data[2:])
    assert 0.4 < found.parameters <= 0.5
