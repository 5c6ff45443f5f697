"""The examples, each as a user runs it, on a tiny model and a few lines of data."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from support.mmlu_questions import byte_tokenizer, dev_rows, questions
from support.mmlu_questions import llama as tiny_llama
from support.processes import in_two_processes, needs_processes
from support.tiny_models import FIRST_WORD, VOCABULARY, bert_sequence_classification, generator, llama
from support.word_tokenizer import word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_lossless_lr import CompressionReport

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STORIES = ("compress_and_verify", "your_own_task", "llama_mmlu", "distributed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run(name, *arguments):
    """Run an example as the main module, and return what it defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentences(count, seed):
    """Different texts of six words."""
    words = torch.randint(FIRST_WORD, VOCABULARY, (count, 6), generator=generator(seed))
    return [" ".join(f"w{word}" for word in row) for row in words.tolist()]


def report_of(folder):
    return CompressionReport.from_json((folder / "compression_report.json").read_text())


def targeted(report):
    layers = report.layers.values()
    return sum(layer.parameters for layer in layers) / sum(layer.dense_parameters for layer in layers)


def test_there_are_four():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(STORIES)


@pytest.mark.parametrize("name", STORIES)
def test_each_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(name, "--help")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "--model" in printed
    assert "--data" in printed
    assert f"examples/{name}.py --model" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")


def test_compress_and_verify_judges_what_it_has_written(tmp_path, capsys):
    model, _ = bert_sequence_classification()
    for seed, (part, count) in enumerate({"calibration": 48, "validation": 80}.items()):
        rows = [{"sentence": text, "label": n % 3} for n, text in enumerate(sentences(count, seed))]
        write_lines(tmp_path / "data" / f"{part}.jsonl", rows)
    folder, out, figures = save(tmp_path / "model", model), tmp_path / "out", tmp_path / "figures.json"
    options = ["--data", tmp_path / "data", "--calibration-examples", 48, "--keep-ratio", 0.5]
    run("compress_and_verify", "--model", folder, *options, "--output", out, "--json", figures)
    printed, found = capsys.readouterr().out, json.loads(figures.read_text())
    report = report_of(out)
    assert 0.4 < targeted(report) <= 0.5
    assert found["keep_ratio"] == report.keep_ratio
    assert found["verdict"] == report.verdict
    assert AutoModelForSequenceClassification.from_pretrained(out).num_parameters() == report.compressed.parameters
    lines = [line for line in printed.splitlines() if "on 80 held-out examples" in line]
    assert lines[0].startswith(f"{report.verdict}: on 80 held-out examples, with 95 % confidence")
    assert lines[1] == f"reloaded from {out}: {lines[0]}"
    assert len(lines) == 2


def test_your_own_task_trains_compresses_and_reloads_its_own_class(tmp_path, capsys):
    model, _ = bert_sequence_classification()
    for seed, (part, count) in enumerate({"train": 64, "validation": 256}.items()):
        texts = sentences(count, seed)
        rows = [{"text": text, "score": sum(int(word[1:]) for word in text.split()) / 100} for text in texts]
        write_lines(tmp_path / "data" / f"{part}.jsonl", rows)
    folder, out = save(tmp_path / "model", model), tmp_path / "out"
    options = ["--data", tmp_path / "data", "--epochs", 1, "--keep-ratio", 0.6, "--output", out]
    defined = run("your_own_task", "--model", folder, *options)
    printed, report = capsys.readouterr().out, report_of(out)
    assert 0.5 < targeted(report) <= 0.6
    assert report.certificate.clusters == "batches"
    assert f"verdict: {report.verdict}\n" in printed
    assert all(name.startswith("bert.encoder.") for name in report.layers)
    reloaded = defined["BertForRating"].from_pretrained(out)
    data = defined["Ratings"](tmp_path / "data" / "validation.jsonl", word_tokenizer())
    assert f" -> {defined['mean_error'](reloaded, data):.4f}, reloaded from {out}" in printed


def test_llama_mmlu_scores_other_questions_than_it_calibrates_on(tmp_path, capsys):
    folder = save(tmp_path / "model", tiny_llama(num_hidden_layers=2), byte_tokenizer())
    for name, rows in (("dev", dev_rows()), ("test", questions((40, 40, 40)))):
        write_lines(tmp_path / "data" / f"{name}.jsonl", rows)
    out, file = tmp_path / "out", tmp_path / "figures.json"
    options = ["--data", tmp_path / "data", "--examples", 60, "--keep-ratio", 0.5, "--output", out, "--json", file]
    defined = run("llama_mmlu", "--model", folder, *options)
    printed, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert "60 questions to calibrate on, 60 others to score" in printed
    assert figures["verdict"] in printed
    calibration, scored = defined["split_questions"](defined["load_questions"](tmp_path / "data")[1], 60)
    assert not {row["question"] for row in calibration} & {row["question"] for row in scored}
    assert len({row["question"] for row in [*calibration, *scored]}) == 120
    task = defined["mmlu"](defined["load_questions"](tmp_path / "data")[0])
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    again = task.score(reloaded, scored, byte_tokenizer(), defined["ScoringOptions"](4, 1024)).values()
    for name in ("accuracy", "loss"):
        assert again[name] == pytest.approx(tuple(figures["metrics"][name]["values"][1].values()), rel=1e-5)
    before, after = (figures["metrics"]["accuracy"]["values"][index]["value"] for index in (0, 1))
    assert figures["metrics"]["accuracy"]["drop"]["mean"] == pytest.approx(before - after)


def compress_distributed(folder, output):
    options = ["--keep-ratios", 0.5, 0.7, "--max-length", 8, "--examples", 40, "--batch-size", 4]
    run("distributed", "--model", folder / "model", "--data", folder, "--output", folder / output, *options)


def in_one_of_two(folder, number):
    compress_distributed(folder, "two")


@needs_processes
def test_distributed_writes_the_models_of_one_process(tmp_path, capfd):
    save(tmp_path / "model", llama()[0])
    for seed, name in enumerate(("calibration", "heldout")):
        (tmp_path / f"{name}.txt").write_text(" ".join(sentences(70, seed)))
    in_two_processes(in_one_of_two, tmp_path)
    compress_distributed(tmp_path, "one")
    lines = [line for line in capfd.readouterr().out.splitlines() if "process(es), kept " in line]
    assert [line.partition(",")[0] for line in lines] == ["2 process(es)"] * 2 + ["1 process(es)"] * 2
    for keep in ("0.7", "0.5"):
        folders = [tmp_path / name / f"keep-{keep}" for name in ("two", "one")]
        two, one = (report_of(folder) for folder in folders)
        assert float(keep) - 0.1 < targeted(two) <= float(keep)
        assert two.layers.keys() == one.layers.keys()
        assert [layer.rank for layer in two.layers.values()] == [layer.rank for layer in one.layers.values()]
        assert two.compressed.loss == pytest.approx(one.compressed.loss, rel=1e-4)
        assert AutoModelForCausalLM.from_pretrained(folders[0]).num_parameters() == two.compressed.parameters
