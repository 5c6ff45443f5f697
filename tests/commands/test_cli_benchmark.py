"""`hf-lossless-lr benchmark`: settings, table, files, and what is refused."""

import json

import pytest
from support.tiny_models import llama, vit

from hf_lossless_lr.commands.cli import main


@pytest.fixture
def models(tmp_path):
    for seed, name in enumerate(("dense", "other")):
        llama(seed=seed)[0].save_pretrained(tmp_path / name)
    vit()[0].save_pretrained(tmp_path / "pictures")
    return tmp_path


def test_measures_each_combination_of_settings(models, capsys):
    file = models / "times.json"
    command = ["benchmark", str(models / "dense"), str(models / "other"), "--turns", "3", "--json", str(file)]
    assert main([*command, "--batch-sizes", "1", "2", "--sizes", "4", "6", "--threads", "1"]) == 0
    records = json.loads(file.read_text())
    assert [record["shape"] for record in records] == [[1, 4], [2, 4], [1, 6], [2, 6]]
    assert all(record["threads"] == 1 and len(record["seconds"]) == 2 and record["ratio"] > 0 for record in records)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["dense", "(ms)", "compressed", "(ms)"]
    assert [line.split(",")[0] for line in lines[1:]] == ["1 × 4", "2 × 4", "1 × 6", "2 × 6"]


def test_measures_one_model_with_its_layers_and_memory(models, capsys):
    command = ["benchmark", str(models / "pictures"), "--turns", "3", "--batch_sizes", "2", "--layers", "--memory"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "2 × 3 × 12 × 12, cpu" in out
    assert "vit.layers.0.mlp.fc1" in out
    assert "peak (MB)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--turns", "2"], "--turns: must be at least 3, got 2."),
        (["--batch-sizes", "0"], "--batch_sizes: must be at least 1."),
        (["--threads", "1", "1025"], "--threads: must be at most 1,024."),
        (["--sizes", "99"], "takes at most 40 tokens, not 99"),
        (["--device", "meta"], "--device: there are no numbers on the meta device"),
        (["--device", "nowhere"], "--device: 'nowhere' cannot be used"),
    ],
)
def test_refuses_settings_that_cannot_be(models, capsys, options, message):
    assert main(["benchmark", str(models / "dense"), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_refuses_a_file_that_cannot_be_written_before_any_work(models, capsys, monkeypatch, option):
    monkeypatch.setattr("hf_lossless_lr.commands.benchmark.measure_speed", None)
    assert main(["benchmark", str(models / "dense"), option, str(models / "nowhere" / "file")]) == 1
    assert f"{option}: there is no folder" in capsys.readouterr().err


def test_refuses_models_of_different_inputs_and_classes_that_transformers_lacks(models, capsys):
    assert main(["benchmark", str(models / "dense"), str(models / "pictures")]) == 1
    assert "other kinds of input" in capsys.readouterr().err
    larger = llama()[0]
    larger.resize_token_embeddings(larger.config.vocab_size + 8)
    larger.save_pretrained(models / "other words")
    assert main(["benchmark", str(models / "dense"), str(models / "other words")]) == 1
    assert "other kinds of input" in capsys.readouterr().err
    config = models / "dense" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["MyOwn"]}))
    assert main(["benchmark", str(models / "dense")]) == 1
    assert "measure_speed" in capsys.readouterr().err
