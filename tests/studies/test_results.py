"""The results of the studies, as they are kept: documents show these figures, and plots can be drawn of them."""

import json
import sys
import time
from itertools import pairwise

import pytest
from datasets import Dataset
from support.studies import RESULTS, ROOT, STUDIES, needs_matplotlib, tiny_task
from support.tiny_models import bert_sequence_classification
from support.word_tokenizer import WORDS, word_tokenizer

from hf_lossless_lr.data import make_dataloader


def rows(text):
    """The rows of all tables, without their columns' names."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if "---" not in line and "| method |" not in line and "examples | loss" not in line]


@pytest.mark.parametrize("path", sorted(RESULTS.iterdir()), ids=lambda path: path.name)
def test_each_line_of_a_result_is_one_record(path):
    assert (STUDIES / path.name).with_suffix(".py").is_file()
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert records
    assert all(isinstance(record, dict) for record in records)


def test_the_methods_compared_are_those_of_the_records(study):
    compared = study("compare_methods")
    records = study("records").read_records(RESULTS / "compare_methods.jsonl")
    shown = rows(compared.tables(records))
    documented = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) == len(records) > 30
    assert [row for row in shown if row not in documented] == []
    missing = {
        (name, method)
        for name in {record["model"] for record in records}
        for method in compared.TASKS[name][2]
        if not any((record["model"], record["method"]) == (name, method) for record in records)
    }
    assert missing == set()


@pytest.mark.parametrize("model", ["minilm-sst2", "llama-small", "swin-mnist", "cnn-resnet"])
def test_the_default_costs_least_at_every_size_in_parameters(study, model):
    records = [r for r in study("records").read_records(RESULTS / "compare_methods.jsonl") if r["model"] == model]
    sizes = {record["keep_ratio"] for record in records} - {None}
    for size in sizes:
        found = {record["method"]: record["divergence"] for record in records if record["keep_ratio"] == size}
        assert min(found, key=found.get) == "default", size


def test_the_rates_of_wrong_verdicts_are_those_of_the_records(study):
    rates = study("verdict_error_rates")
    results = rates.from_records(study("records").read_records(RESULTS / "verdict_error_rates.jsonl"))
    documented = (ROOT / "docs" / "certificate.md").read_text(encoding="utf-8").splitlines()
    shown = rows("\n".join(rates.false_rates(results)))
    assert len(shown) == len(rates.SIZES)
    assert [row for row in shown if row not in documented] == []


def test_the_figures_of_training_are_those_of_the_records(study):
    records = study("records").read_records(RESULTS / "train_compressed.jsonl")
    shown = [line for line in study("train_compressed").tables(records).splitlines() if line]
    documented = (ROOT / "docs" / "after_compression.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) == 3 * 2 + 6 + 6 + 7
    assert [line for line in shown if line not in documented] == []


def test_the_terms_of_single_layers_are_those_of_the_records(study):
    claims = study("paper_claims")
    shown = [
        line
        for line in claims.tables(study("records").read_records(RESULTS / "paper_claims.jsonl")).splitlines()
        if line
    ]
    documented = (ROOT / "docs" / "reproducing_the_paper.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) == 2 * 2 + 2 * 3 + 2 * 2
    assert [line for line in shown if line not in documented] == []


@needs_matplotlib
def test_plots_are_drawn_of_the_records(study, tmp_path):
    read = study("records").read_records
    study("plot_quality").draw(read(RESULTS / "compare_methods.jsonl"), tmp_path / "quality.png")
    rates = study("verdict_error_rates")
    rates.plot(rates.from_records(read(RESULTS / "verdict_error_rates.jsonl")), tmp_path / "rates.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("quality.png", "rates.png"))


def test_methods_are_compared_and_continued(study, monkeypatch, tmp_path, capsys):
    compared = study("compare_methods")
    file = tmp_path / "records.jsonl"
    for methods in (("no-refit",), ("no-refit", "svd")):
        monkeypatch.setattr(compared, "TASKS", {"tiny": (tiny_task, (0.7, 0.5), methods)})
        options = ["--testbed", str(tmp_path), "--records", str(file), "--models", "tiny"]
        monkeypatch.setattr(sys, "argv", ["compare_methods.py", *options])
        compared.main()
    found = [(record["method"], record["keep_ratio"]) for record in study("records").read_records(file)]
    assert found == [(method, keep) for method in ("no-refit", "svd") for keep in (0.7, 0.5)]
    assert capsys.readouterr().out.count("| no-refit |") == 4


def test_terms_and_changes_of_single_layers_are_measured(study, monkeypatch, tmp_path, capsys):
    claims = study("paper_claims")
    monkeypatch.setattr(claims, "TASKS", {"tiny": (tiny_task, ("layer.0.attention.",), 128)})
    file = tmp_path / "records.jsonl"
    monkeypatch.setattr(sys, "argv", ["paper_claims.py", "--testbed", str(tmp_path), "--records", str(file)])
    claims.main()
    records = study("records").read_records(file)
    assert len(records) == 4 * len(claims.SHARES)
    for one, other in pairwise(records):  # a lower rank is more noise, and a higher cost
        if one["layer"] == other["layer"]:
            assert one["noise"] < other["noise"]
            assert one["second"] < other["second"]
    assert all(abs(record["calibration"]) > 0 for record in records)
    assert capsys.readouterr().out.count("| tiny |") == 5


def test_the_answers_of_both_models_are_collected(study, monkeypatch, tmp_path):
    rates = study("verdict_error_rates")
    monkeypatch.setattr(rates, "TASKS", {"tiny": (tiny_task,)})
    monkeypatch.setattr(rates, "CASES", {"tiny": (0.7, 0.5)})
    answers = rates.collect(tmp_path)
    assert list(answers) == ["tiny, keep 0.7", "tiny, keep 0.5"]
    assert all(pair.clusters == 80 and pair.tempered is not None for pair in answers.values())
    assert (answers["tiny, keep 0.5"].loss[0] == answers["tiny, keep 0.7"].loss[0]).all()


def test_a_model_is_trained_in_each_storage(study, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    bert_sequence_classification()[0].save_pretrained(tmp_path / "minilm-sst2")
    word_tokenizer().save_pretrained(tmp_path / "minilm-sst2")
    sentences = [{"sentence": f"{WORDS[n]} {WORDS[2 * n % 50]}", "label": n % 3} for n in range(32)]
    words = [{"tokens": [WORDS[n], WORDS[n + 1]], "ner_tags": [n % 7, 0]} for n in range(16)]
    for folder, names, rows in (
        ("sst2", ("calibration", "validation"), sentences),
        ("wikiann", ("train", "validation"), words),
    ):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in names:
            file = tmp_path / "data" / folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "records.jsonl"
    options = ["--testbed", tmp_path, "--records", file, "--examples", 32, "--steps", 1, "--held-out", 16]
    monkeypatch.setattr(sys, "argv", ["train_compressed.py", *map(str, options)])
    study("train_compressed").main()
    kept = study("records").read_records(RESULTS / "train_compressed.jsonl")
    measured = study("records").read_records(file)
    assert [list(record) for record in measured] == [list(record) for record in kept]
    assert "| pivoted | `up` |" in capsys.readouterr().out


def test_times_are_written_for_each_stage(study, monkeypatch, tmp_path, capsys):
    times, records = study("benchmark_time"), study("records")

    def task(name, testbed, examples):
        found = tiny_task(testbed)
        return found.model.eval(), make_dataloader(found.calibration[:16], found.model, batch_size=8)

    monkeypatch.setattr(times, "task", task)
    file = tmp_path / "times.jsonl"
    options = ["--testbed", tmp_path, "--repeats", 1, "--records", file]
    monkeypatch.setattr(sys, "argv", ["benchmark_time.py", *map(str, options)])
    times.main()
    kept, measured = (records.read_records(path) for path in (RESULTS / "benchmark_time.jsonl", file))
    assert [list(record) for record in measured] == [list(record) for record in kept]
    assert [(r["model"], r["stage"]) for r in measured] == [(r["model"], r["stage"]) for r in kept]
    printed = capsys.readouterr().out
    assert all(f"{record['stage']} " in printed for record in measured)


def test_times_of_one_and_two_processes_are_written(study, monkeypatch, tmp_path, capsys):
    processes, records = study("two_processes"), study("records")
    monkeypatch.setattr(processes, "sentiment", lambda testbed, examples: tiny_task(testbed))
    monkeypatch.setattr(processes, "measured", lambda testbed, examples, number: 3.0 / number)
    file = tmp_path / "times.jsonl"
    monkeypatch.setattr(sys, "argv", ["two_processes.py", "--testbed", str(tmp_path), "--records", str(file)])
    processes.main()
    assert "two are 2.00 times as fast as one" in capsys.readouterr().out
    kept, found = (records.read_records(path) for path in (RESULTS / "two_processes.jsonl", file))
    assert [record["processes"] for record in found] == [record["processes"] for record in kept]
    assert processes.seconds_of_a_pass(tmp_path, 8) > 0


def test_methods_that_fine_tune_are_compared_with_the_default(study, monkeypatch, tmp_path, capsys):
    tuned, kept = study("fine_tuned"), study("records").read_records(RESULTS / "fine_tuned.jsonl")

    def task(testbed, examples):
        found = tiny_task(testbed)
        found.calibration, found.evaluation = found.calibration[:16], Dataset.from_list(found.evaluation)
        return found

    monkeypatch.setattr(tuned, "sentiment", task)
    monkeypatch.setattr(tuned, "RATES", {name: rates[:1] for name, rates in tuned.RATES.items()})
    monkeypatch.setattr(tuned, "LINES", (16, 4096))
    monkeypatch.setattr("hf_lossless_lr.pipeline.speed.MAX_SECONDS", 0.0)
    monkeypatch.setattr("hf_lossless_lr.timing.time", time)  # which the study changes
    file = tmp_path / "records.jsonl"
    options = ["--testbed", tmp_path, "--records", file, "--lines", 16, "--keep-ratios", 0.5]
    monkeypatch.setattr(sys, "argv", ["fine_tuned.py", *map(str, options), "--methods", "default", "svd"])
    tuned.main()
    measured = study("records").read_records(file)
    assert [r["part"] for r in measured] == ["choice"] * 2 + ["statistics"] + ["result"] * 2
    fields = {record["part"]: list(record) for record in kept}
    assert all(list(record) == fields[record["part"]] for record in measured)
    assert "| 0.5 | default | 16 |" in capsys.readouterr().out


def test_the_figures_of_fine_tuning_are_those_of_the_records(study):
    tuned = study("fine_tuned")
    shown = [
        line for line in tuned.tables(study("records").read_records(RESULTS / "fine_tuned.jsonl")).splitlines() if line
    ]
    documented = (ROOT / "docs" / "reproducing_the_paper.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) > 2 * 2 + sum(map(len, tuned.RATES.values())) + 3 * len(tuned.METHODS) + 1
    assert [line for line in shown if line not in documented] == []
