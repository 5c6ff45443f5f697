"""Data and models at the edges: parts without labels, layers that some data do not reach, inputs changed in place."""

import copy
import itertools

import pytest
import torch
import transformers
from support.tiny_models import as_examples, bert_sequence_classification, other_inputs
from torch import nn

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.data import make_dataloader
from hf_lossless_lr.errors import TargetError
from hf_lossless_lr.layers import find_targets
from hf_lossless_lr.processes import make_accelerator
from hf_lossless_lr.statistics import collect_statistics


def compressor(**options):
    return LowRankCompressor(LosslessLowRankConfig(**{"keep_ratio": 0.8, "refit": False, **options}))


def mixture(experts=16):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    routed = {"num_local_experts": experts, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=61, max_position_embeddings=40, initializer_range=0.2, **small, **routed
    )
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("labelled", [0, 1, 3])
def test_a_refit_is_judged_by_the_examples_that_have_labels(labelled):
    """Folds without any are passed over; too few labels show nothing, and the refit is left out."""
    model, batch = bert_sequence_classification(60)
    others = other_inputs(batch)
    others["labels"] = torch.randint(0, 3, (60,))
    batch["labels"][labelled + 1 :] = -100
    made = compressor(refit=True)
    made.compress(model, as_examples(batch), eval_dataset=as_examples(others))
    assert made.report.refitted is False


def test_the_papers_rules_take_layers_that_their_first_examples_do_not_reach():
    model = mixture()
    ids = torch.randint(5, 61, (24, 3))
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    made = compressor(objective="paper-compact", keep_ratio=None)
    made.compress(model, batches[:10], eval_dataset=batches[14:])
    assert made.report.compressed.parameters <= made.report.dense.parameters


class Residual(nn.Module):
    """Two layers around a residual, which may be added in place."""

    def __init__(self, in_place):
        super().__init__()
        self.first, self.second, self.in_place = nn.Linear(32, 32), nn.Linear(32, 32), in_place

    def forward(self, x):
        x = 2 * x
        y = self.first(x)
        if self.in_place:
            x += y
        else:
            x = x + y
        return self.second(x)


def test_inputs_that_are_changed_in_place_count_as_they_were():
    plain, batch = bert_sequence_classification(16)
    plain.bert.pooler.dense = Residual(False)
    changed = copy.deepcopy(plain)
    changed.bert.pooler.dense.in_place = True
    found = []
    for model in (plain, changed):
        targets = dict(find_targets(model).chosen) | {
            f"bert.pooler.dense.{n}": model.bert.pooler.dense.get_submodule(n) for n in ("first", "second")
        }
        loader = make_dataloader(as_examples(batch), model, batch_size=4)
        found.append(collect_statistics(model, targets, loader, make_accelerator()))
    for name, layer in found[0].layers.items():
        torch.testing.assert_close(
            layer.input_covariance, found[1].layers[name].input_covariance, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(layer.grad_covariance, found[1].layers[name].grad_covariance, rtol=1e-5, atol=1e-9)
    assert found[0].groups == found[1].groups


def test_a_rank_for_a_layer_that_is_never_called_is_passed_over():
    model, batch = bert_sequence_classification(16)
    model.bert.add_module("idle", nn.Linear(32, 24))
    made = compressor(ranks={"idle": 4, "query": 8}, keep_ratio=None)
    made.compress(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
    assert made.report.skipped["bert.idle"].reason == "never called by the calibration data"
    assert {layer.rank for layer in made.report.layers.values()} == {8, None}


def test_a_frozen_bias_stays_frozen():
    model, batch = bert_sequence_classification(16)
    for parameter in model.bert.encoder.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    made = compressor()
    model = made.compress(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
    names = [name for name, layer in made.report.layers.items() if layer.rank is not None]
    assert names
    for name in names:
        layer = model.get_submodule(name)
        assert (layer.bias.requires_grad, layer.up.weight.requires_grad) == (False, True)


def test_a_compressor_calibrates_again_in_its_own_work_folder(tmp_path):
    model, batch = bert_sequence_classification(16)
    made = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.8, refit=False), work_dir=tmp_path / "work")
    for _ in range(2):
        made.calibrate(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
    made.compress_to()
    made.release()
    assert made.report.keep_ratio <= 0.8
    assert (tmp_path / "work" / "journal.json").is_file()


def test_a_work_folder_of_a_run_that_was_killed_at_its_start_is_used(tmp_path):
    model, batch = bert_sequence_classification(16)
    (tmp_path / ".hf-lossless-lr-1234.tmp").touch()
    made = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.8, refit=False), work_dir=tmp_path)
    made.compress(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
    assert made.report.keep_ratio <= 0.8
    assert (tmp_path / "journal.json").is_file()


def test_ratios_are_in_the_order_of_the_bytes_that_they_ask_for():
    """With number formats, fewer bytes may be more parameters."""
    model, batch = bert_sequence_classification(200)
    made = compressor(formats=["float", "int4"])
    made.calibrate(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
    kept, doubts = [], []
    for ratio in (0.9, 0.8, 0.7, 0.6, 0.5, 0.9):
        made.compress_to(ratio)
        kept.append(made.report.keep_ratio)
        doubts.append(made.report.uncertified)
    assert any(later > earlier for earlier, later in itertools.pairwise(kept[:5]))
    assert doubts[:5] == [None] * 5
    assert "for a model that keeps less" in doubts[5]


def test_a_ratio_under_inference_mode_is_refused():
    """Its parameters would never get gradients."""
    model, batch = bert_sequence_classification(16)
    made = compressor()
    made.calibrate(model, as_examples(batch), eval_dataset=as_examples(other_inputs(batch)))
    with torch.inference_mode(), pytest.raises(TargetError, match="inference_mode"):
        made.compress_to(0.8)
    made.compress_to(0.8)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_a_layer_with_two_names_is_counted_in_flops():
    model, batch = bert_sequence_classification(64)
    others = as_examples(other_inputs(batch))
    layer = model.bert.encoder.layer[0].intermediate.dense
    made = compressor(size="flops", keep_ratio=0.5)
    made.compress(copy.deepcopy(model), as_examples(batch), eval_dataset=others)
    model.bert.also = layer
    again = compressor(size="flops", keep_ratio=0.5)
    again.compress(model, as_examples(batch), eval_dataset=others)
    ranks = [{layer.rank for layer in each.report.layers.values()} for each in (made, again)]
    assert ranks[0] == ranks[1]
