"""Checkpoints that version 0.1.0 wrote (format 1) load in every later version, and answer as they did then.

Beside each folder lies a file with inputs and the logits that the checkpoint gave to them in float64.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.tolerances import LIBRARIES

from hf_lossless_lr import CompressionReport, FactorizedConv2d, FactorizedLinear, LosslessLowRankConfig

FOLDER = Path(__file__).parent / "stored"
STORED = {
    "pivoted": ("AutoModelForImageClassification", "pivoted", {FactorizedLinear, FactorizedConv2d}),
    "two-factor": ("AutoModelForCausalLM", "two-factor", {FactorizedLinear}),
}


@pytest.mark.parametrize("name", STORED)
class TestAStoredCheckpoint:
    def load(self, name):
        return getattr(transformers, STORED[name][0]).from_pretrained(FOLDER / name, dtype=torch.float64).eval()

    def test_loads_with_its_layers_and_answers_as_it_did(self, name):
        model, stored = self.load(name), load_file(FOLDER / f"{name}.safetensors")
        logits = stored.pop("logits")
        with torch.no_grad():
            answers = model(**{key.removeprefix("inputs."): value for key, value in stored.items()}).logits
        torch.testing.assert_close(answers, logits, rtol=LIBRARIES, atol=LIBRARIES)
        _, storage, kinds = STORED[name]
        layers = [module for module in model.modules() if isinstance(module, tuple(kinds))]
        assert {type(layer) for layer in layers} == kinds
        assert {layer.storage for layer in layers} == {storage}

    def test_keeps_its_choices_under_their_present_names(self, name):
        config = self.load(name).config.quantization_config
        written = json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert (config.size, config.accuracy_margin) == (written["budget"], written["metric_margin"])
        assert config.modules == written["modules"]

    def test_is_written_again_in_the_present_format(self, name, tmp_path):
        self.load(name).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert not {"budget", "metric_margin"} & written.keys()
        assert LosslessLowRankConfig.from_dict(written).modules

    def test_has_a_report_that_can_be_read(self, name):
        report = CompressionReport.from_json((FOLDER / name / "compression_report.json").read_text(encoding="utf-8"))
        assert report.certificate.accuracy_margin == 0.01
        assert report.held_out["examples"] == 40
        assert report.fingerprints["held_out"] == report.certificate.fingerprint
        assert CompressionReport.from_json(report.to_json()) == report
