"""The demonstration, shortened to two epochs on half of the digits to train on."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from support.compressions import count_parameters, factorized_layers
from transformers import AutoModelForImageClassification

from hf_lossless_lr import CompressionReport, DataError
from hf_lossless_lr.commands import demo
from hf_lossless_lr.commands.demo import (
    BATCH,
    HELD_OUT,
    TRAIN,
    load_digits,
    logits_of,
    reload_in_new_process,
    run_demo,
)

pytestmark = pytest.mark.slow  # all but one test take the run, which trains

ROWS = [
    "targeted parameters",
    "parameters",
    "bytes of the tensors",
    "loss (nats)",
    "accuracy",
    f"batch of {BATCH} (ms)",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run, with what it printed."""
    folder, printed = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch:
        train, held_out = load_digits()
        patch.setattr(demo, "EPOCHS", 2)
        patch.setattr(demo, "load_digits", lambda: (train[:10], held_out))
        patch.setattr("builtins.print", lambda *texts: printed.append(" ".join(texts)))
        result = run_demo(folder, 0.2)
    return SimpleNamespace(folder=folder, result=result, text="\n".join(printed))


@pytest.fixture(scope="module")
def models(run):
    return [AutoModelForImageClassification.from_pretrained(run.folder / n).eval() for n in ("dense", "compressed")]


class TestDemo:
    def test_prints_a_table_of_dense_against_compressed(self, run):
        lines = run.text.splitlines()
        assert lines[0].split() == ["dense", "compressed", "ratio"]
        for line, label in zip(lines[1:], ROWS, strict=False):
            assert line.startswith(label)
            dense, compressed, ratio = (float(number.replace(",", "")) for number in line.split()[-3:])
            assert ratio == pytest.approx(compressed / dense, abs=2e-3)
        assert "500 held-out digits; reloaded in a new process: the same logits, to rounding" in run.text
        assert str(run.folder) in run.text

    def test_prints_what_the_models_on_disk_are(self, run, models):
        rows = run.result["rows"]
        assert list(rows) == ROWS
        assert rows["parameters"] == tuple(count_parameters(model) for model in models)
        files = [(run.folder / name / "model.safetensors").stat().st_size for name in ("dense", "compressed")]
        for stated, file in zip(rows["bytes of the tensors"], files, strict=True):
            assert stated <= file <= 1.02 * stated  # which begins with the names of the tensors
        assert files[1] < 0.25 * files[0]
        assert 0.15 < run.result["bytes_ratio"] <= 0.22

    def test_measures_on_digits_that_were_not_trained_on(self, run, models):
        train, held_out = load_digits()
        assert sum(len(batch["labels"]) for batch in train) == TRAIN
        assert sum(len(batch["labels"]) for batch in held_out) == HELD_OUT
        seen = {row.numpy().tobytes() for batch in train for row in batch["pixel_values"]}
        repeated = sum(row.numpy().tobytes() in seen for batch in held_out for row in batch["pixel_values"])
        assert repeated <= 1  # the data set itself has no more than that
        labels = torch.cat([batch["labels"] for batch in held_out])
        for model, shown in zip(models, run.result["rows"]["accuracy"], strict=True):
            assert float((logits_of(model, held_out).argmax(-1) == labels).double().mean()) == pytest.approx(shown)
        assert run.result["rows"]["accuracy"][0] > 0.5

    def test_keeps_its_result_and_the_report(self, run, models):
        stored = json.loads((run.folder / "demo.json").read_text())
        assert stored == json.loads(json.dumps(run.result))
        report = CompressionReport.from_json((run.folder / "compressed" / "compression_report.json").read_text())
        assert report.bytes_ratio == run.result["bytes_ratio"]
        assert factorized_layers(models[1]).keys() == {name for name, layer in report.layers.items() if layer.rank}
        assert set(run.result["seconds"]) == {"train", "compress", "total"}

    def test_compares_bit_for_bit(self, run, models, monkeypatch):
        """That the new process loads and answers is what lets `run_demo` return at all; here it is this process."""

        def run_here(command, **_):
            interpreter, option, code, *arguments = command
            assert (interpreter, option) == (sys.executable, "-c")
            monkeypatch.setattr(sys, "argv", [option, *arguments])
            exec(code, {})

        monkeypatch.setattr("subprocess.run", run_here)
        batches = load_digits()[1][:1]
        logits = logits_of(models[1], batches)
        assert reload_in_new_process(run.folder / "compressed", batches, logits)
        logits[3, 4] += 1e-4 * logits.abs().max()
        assert not reload_in_new_process(run.folder / "compressed", batches, logits)

    def test_fails_if_the_reloaded_model_answers_otherwise(self, tmp_path, monkeypatch, models):
        data = tuple(batches[:2] for batches in load_digits())
        asked = []
        monkeypatch.setattr(demo, "load_digits", lambda: data)
        monkeypatch.setattr(demo, "train_vit", lambda batches: models[0])
        monkeypatch.setattr(demo, "reload_in_new_process", lambda *arguments: bool(asked.append(arguments)))
        with pytest.raises(DataError, match="the reloaded model does not answer as the model in memory did"):
            run_demo(tmp_path)
        ((folder, batches, _),) = asked
        assert folder == tmp_path / "compressed"
        assert batches is data[1]

    def test_without_scikit_learn_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(DataError, match=r"pip install 'hf-lossless-lr\[demo\]'"):
            load_digits()
