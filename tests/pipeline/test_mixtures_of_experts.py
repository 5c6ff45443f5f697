"""Mixtures of experts, compressed expert by expert: what it costs, what is left of the model, and what it survives."""

import copy

import pytest
import torch
from support.compressions import check_same_answers, check_same_state
from support.mixtures import mixture, words
from support.tiny_models import FIRST_WORD, VOCABULARY, generator
from support.tolerances import FLOAT32

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.layers import UnfusedExperts, is_factorized
from hf_lossless_lr.pipeline import compressor as compressor_module

EXPERTS = ["re:.*experts.*"]
STEPS = 90


def sentences(count, seed, length=24):
    """Chains of words, each drawn by the one before; the chances are the same in all of them."""
    chances = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator(99)), -1)
    ids = torch.empty(count, length, dtype=torch.long)
    ids[:, 0] = torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator(seed))
    for place in range(1, length):
        ids[:, place] = torch.multinomial(chances[ids[:, place - 1]], 1, generator=generator(seed + place)).squeeze(1)
    return {"input_ids": ids, "labels": ids}


CALIBRATION = [sentences(8, 10_000 + 100 * i) for i in range(24)]
HELD_OUT = [sentences(16, 20_000 + 100 * i) for i in range(6)]


@pytest.fixture(scope="module")
def trained():
    """A small Mixtral that has learned the chances; not to be changed."""
    model = mixture("Mixtral").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**sentences(16, 50_000 + 100 * step)).loss.backward()
        optimizer.step()
    return model.eval()


def compressed(model, **options):
    options = {"keep_ratio": 0.4, "target_modules": EXPERTS} | options
    compressor = LowRankCompressor(LosslessLowRankConfig(**options))
    model = compressor.compress(copy.deepcopy(model), CALIBRATION, eval_dataset=HELD_OUT)
    return model, compressor.report


def test_experts_cost_far_less_than_by_plain_svd_at_the_same_size(trained, caplog):
    _, plain = compressed(trained, metric="identity", objective="uniform", refit=False, keep_ratio=0.44)
    _, report = compressed(trained)
    assert report.keep_ratio <= plain.keep_ratio
    increase, by_svd = (r.compressed.loss - r.dense.loss for r in (report, plain))
    assert by_svd > 0.1
    assert increase < by_svd / 3
    assert report.refitted
    assert "closed-form" not in caplog.text


@pytest.fixture
def gpt_oss():
    """A model whose last expert never gets a row."""
    model = mixture("GptOss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[-1] = -1e4
    return model


def test_an_expert_without_rows_is_compressed_by_what_the_others_get(gpt_oss):
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.6, target_modules=EXPERTS, refit=False))
    data, held_out = [words(4, seed) for seed in range(4)], [words(8, 9)]
    dense = copy.deepcopy(gpt_oss)
    model = compressor.compress(gpt_oss, data, eval_dataset=held_out)
    idle = {name: layer for name, layer in compressor.report.layers.items() if ".experts.3." in name}
    assert len(idle) == 4
    assert all(layer.rank for layer in idle.values())
    found, experts = model.model.layers[0].mlp.experts, dense.model.layers[0].mlp.experts
    wanted = experts.gate_up_proj[3].T.detach()
    kept = found.get_submodule("3.in_proj").dense_weight()
    assert (kept - wanted).norm() < wanted.norm()


def test_a_failure_leaves_fused_experts_as_they_were(monkeypatch):
    model = mixture("Mixtral")
    experts, before = model.model.layers[0].mlp.experts, copy.deepcopy(model.state_dict())

    def fail(*_):
        assert isinstance(model.model.layers[0].mlp.experts, UnfusedExperts)
        raise KeyboardInterrupt

    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5, refit=False))
    compressor.calibrate(model, [words(4, seed) for seed in range(4)], eval_dataset=[words(8, 9)])
    with monkeypatch.context() as patched:
        patched.setattr(compressor_module, "make_report", fail)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress_to()
    assert model.model.layers[0].mlp.experts is experts
    check_same_state(model.state_dict(), before)
    compressor.compress_to()  # nothing of the first try is left in what takes the place of the experts
    assert compressor.report.keep_ratio <= 0.5


def test_one_calibration_serves_several_sizes_and_the_model_is_dense_in_between():
    model, batch = mixture("Qwen3Moe"), words()
    dense = copy.deepcopy(model)
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
    compressor.calibrate(model, [words(4, seed) for seed in range(4)], eval_dataset=[words(8, 9)])
    check_same_state(model.state_dict(), dense.state_dict())
    sizes = []
    for keep_ratio in (0.6, 0.4):
        compressor.compress_to(keep_ratio)
        assert any(is_factorized(module) and ".experts." in name for name, module in model.named_modules())
        sizes.append(model.num_parameters())
    assert sizes[1] < sizes[0] < dense.num_parameters()
    answer = model(**batch)
    compressor.restore()
    check_same_state(model.state_dict(), dense.state_dict())
    assert not hasattr(model.config, "quantization_config")
    compressor.compress_to(0.4)
    torch.testing.assert_close(model(**batch).logits, answer.logits)
    compressor.release()
    again = copy.deepcopy(model)
    check_same_answers(again.dequantize() and again, model, batch, tolerance=FLOAT32)
    assert type(again.model.layers[0].mlp.experts) is type(dense.model.layers[0].mlp.experts)
    assert again.model.layers[0].mlp.experts.config is again.config
