"""Saving and loading where something around the weights is not as expected: a card, a report, a class, a layer."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support.adapters import takes_adapters
from support.compressions import build, check_same_model, compress, compressed
from support.mixtures import mixture
from support.own_architecture import OwnArchitectureConfig, OwnArchitectureForClassification
from support.tiny_models import llama, split_batch
from torch import nn
from transformers import BertForSequenceClassification

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.errors import CheckpointError
from hf_lossless_lr.report.records import REPORT_NAME

NAME = "bert-sequence-classification"
CARDS = {
    "no YAML": b"---\na: [1\n---\n# mine\n",
    "no UTF-8": b"---\nlicense: mit\n---\n# M\xfcnchen\n",
    "a list": b"---\n- mit\n---\n# mine\n",
    "a number as a key": b"---\n1: mit\n---\n# mine\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model, _ = compressed(NAME)
    model.save_pretrained(path)
    return path


def copied_to(folder, path):
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("card", CARDS)
def test_a_card_that_cannot_be_read_keeps_no_weights_from_loading_and_is_not_replaced(card, folder, tmp_path):
    copied_to(folder, tmp_path)
    (tmp_path / "README.md").write_bytes(CARDS[card])
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == CARDS[card]
    check_same_model(model, BertForSequenceClassification.from_pretrained(tmp_path).eval(), build(NAME)[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["config"].update(objective="of tomorrow"),
        lambda report: report["config"].update(ranks=3),
        lambda report: report.update(calibration={}),
        lambda report: report.update(held_out={"examples": "many"}),
    ],
)
def test_a_report_that_makes_no_card_is_not_saved_again_and_the_model_is(change, folder, tmp_path, caplog):
    copied_to(folder, tmp_path)
    report = json.loads((tmp_path / REPORT_NAME).read_text())
    change(report)
    (tmp_path / REPORT_NAME).write_text(json.dumps(report))
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").exists()
    assert "will not be saved with the model again" in caplog.text or (tmp_path / "again" / REPORT_NAME).exists()


class OwnSaving(BertForSequenceClassification):
    """A user's class, which takes the folder by position and all else by name."""

    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        (save_directory / "own.txt").write_text("mine")


@pytest.mark.parametrize("options", [{}, {"formats": ["int8"], "keep_ratio": 0.2}])
def test_a_class_with_a_way_of_its_own_to_save_is_saved_so(options, tmp_path):
    dense, batch = build(NAME)
    model = OwnSaving(dense.config)
    model.load_state_dict(dense.state_dict())
    compress(model.eval(), batch, **options)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "own.txt").exists()
    check_same_model(model, OwnSaving.from_pretrained(tmp_path).eval(), batch)


@takes_adapters
def test_an_adapter_is_uploaded_without_the_card_of_its_base(tmp_path, monkeypatch):
    model, _ = compressed(NAME)
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["query.up", "classifier"]))
    uploads = []
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *args, **kwargs: uploads.append(folder)
    )
    model.save_pretrained(tmp_path / "adapter")
    model._upload_modified_files(str(tmp_path / "adapter"), "me/adapter", SimpleNamespace())
    assert uploads
    assert not (tmp_path / "adapter" / REPORT_NAME).exists()


class LikeOurs(OwnArchitectureForClassification):
    """A user's class with tensors that are called, and shaped, as those of a factorized layer are."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.weight = nn.Parameter(torch.full((1,), 0.5))
            block.down, block.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
            block.register_buffer("permutation", torch.arange(3))

    def forward(self, values, labels=None):
        for block in self.blocks:
            values = values + block.weight * block.up(block.down(values.mean() + torch.ones(len(values), 32))).mean()
        return super().forward(values, labels)


@pytest.mark.parametrize("options", [{}, {"formats": ["int8"], "keep_ratio": 0.2}])
def test_modules_of_the_model_that_look_like_ours_are_none(options, tmp_path):
    torch.manual_seed(0)
    model = LikeOurs(OwnArchitectureConfig(num_labels=3)).eval()
    batch = {"values": torch.randn(24, 24), "labels": torch.arange(24) % 3}
    config = LosslessLowRankConfig(target_modules=["inner", "outer"], refit=False, **options)
    compressor = LowRankCompressor(config)
    others = batch | {"values": torch.randn(24, 24)}
    compressor.compress(model, split_batch(batch, 4), eval_dataset=[others])
    model.save_pretrained(tmp_path)
    check_same_model(model, LikeOurs.from_pretrained(tmp_path).eval(), batch)
    tensors = load_file(tmp_path / "model.safetensors")
    factors = {key: t for key, t in tensors.items() if not key.startswith("blocks.0.inner.")}
    save_file(factors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.inner"):
        LikeOurs.from_pretrained(tmp_path)


def test_a_layer_of_experts_that_is_doubled_is_saved_and_loads(tmp_path):
    model = mixture("Mixtral")
    compress(model, llama(12)[1], keep_ratio=0.5)
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    model.model.layers[-1].self_attn.layer_idx = 2
    model.config.num_hidden_layers = 3
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(
        torch.equal(x, y) for x, y in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
