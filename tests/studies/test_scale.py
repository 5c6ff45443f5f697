"""The studies of large models: they run at a small size, and what is kept of them is what the documents promise."""

import sys

import numpy as np
import pytest
import torch
from support.studies import RESULTS, ROOT
from transformers import LlamaConfig

GIBIBYTE = 2**30


@pytest.fixture
def records(study):
    return study("records").read_records(RESULTS / "scale.jsonl")


@pytest.fixture
def whole(records):
    """The run at the size of TinyLlama."""
    return max(records, key=lambda record: record["layers"])


def test_runs_that_were_killed_ended_with_the_same_bytes(study):
    found = study("records").read_records(RESULTS / "interruptions.jsonl")
    assert sum(record["kills"] for record in found) >= 30
    assert all(record["same bytes"] for record in found)
    assert {record["repeated"] for record in found} == {0}


def test_tinyllama_fits_into_ten_gibibytes_and_ninety_minutes(whole):
    assert (whole["layers"], whole["tokens"]) == (22, 32 * 256)
    assert whole["peak"] <= 10 * GIBIBYTE
    assert whole["seconds"]["all of it"] <= 90 * 60
    assert whole["equal_after_loading"]


def test_time_and_memory_grow_no_faster_than_the_model_and_the_data(records):
    """Exponents between the smallest and the largest run: of the layers at one number of tokens, and the reverse."""
    limited = [r for r in records if r["max_memory"] is not None]
    same_tokens = {r["layers"]: r for r in limited if r["tokens"] == 8 * 256}
    same_layers = {r["tokens"]: r for r in limited if r["layers"] == 2}
    for found in (same_tokens, same_layers):
        assert len(found) >= 2
        low, high = min(found), max(found)
        for value in (lambda r: r["seconds"]["all of it"], lambda r: r["peak"]):
            growth = np.log(value(found[high]) / value(found[low])) / np.log(high / low)
            assert growth <= 1.1


def test_no_run_took_more_than_it_was_allowed(records):
    limits = [(record["max_memory"], record["peak"]) for record in records if record["max_memory"] is not None]
    assert all(peak <= int(limit.removesuffix("GiB")) * GIBIBYTE for limit, peak in limits)


def test_the_model_is_the_same_with_a_limit_and_without(records):
    found = {r["max_memory"]: r for r in records if r["layers"] == 4}
    assert set(found) == {"6GiB", None}
    assert found["6GiB"]["disk"] > 0 == found[None]["disk"]
    assert found["6GiB"]["fingerprint"] == found[None]["fingerprint"]


def test_the_figures_of_the_document_are_those_of_the_records(records):
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for record in records:
        row = (
            f"| {record['layers']} | {record['tokens']:,} | {record['max_memory'] or 'none'} | {record['passes']} "
            f"| {record['peak'] / GIBIBYTE:.2f} GiB |"
        )
        assert row in text


def test_a_model_is_compressed_within_its_memory(study, monkeypatch, tmp_path, capsys):
    module, file = study("scale"), tmp_path / "records.jsonl"
    tiny = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(module, "config", lambda layers: LlamaConfig(**tiny, num_hidden_layers=layers, vocab_size=100))
    ids = torch.randint(100, (80, 1, 16), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module, "sequences", lambda _, count: [{"input_ids": x, "labels": x} for x in ids[:count]])
    arguments = ["scale.py", "--layers", "2", "--sequences", "8", "--length", "16", "--tokenizer", "", "--text", ""]
    monkeypatch.setattr(sys, "argv", [*arguments, "--records", str(file)])
    module.main()
    (record,) = module_records = study("records").read_records(file)
    assert len(module_records) == 1
    assert record["equal_after_loading"]
    assert (record["layers"], record["tokens"]) == (2, 128)
    assert record["bytes_ratio"] <= 0.4
    assert record["peak"] >= record["calibration_peak"] > 0


def test_larger_models_are_counted_and_not_made(study, monkeypatch, capsys):
    module = study("scale_on_paper")
    monkeypatch.setattr(sys, "argv", ["scale_on_paper.py", "--max-memory", "10GiB", "256GiB"])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(module.MODELS)
    assert lines[2].startswith("| TinyLlama 1.1B | 2.0 GiB |")
    assert "| too little |" in lines[-1]
    documented = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert all(
        line.split(" | ")[:5] == row.split(" | ")[:5] for line, row in zip(lines[2:], rows(documented), strict=True)
    )


def rows(documented):
    """The rows of the table on paper."""
    part = documented[documented.index("## Larger models, on paper") :]
    return [line for line in part.splitlines() if line.startswith(("| TinyLlama", "| Llama"))]


def test_decompositions_predict_what_a_textbook_does(study, monkeypatch, tmp_path):
    file = tmp_path / "records.jsonl"
    command = ["decomposition_time.py", "--scale", "0.02", "--turns", "1", "--records", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    study("decomposition_time").main()
    for path, tolerance in ((file, 1e-10), (RESULTS / "decomposition_time.jsonl", 1e-6)):
        found = study("records").read_records(path)
        assert sum(record["layers"] for record in found) == 7
        assert all(record["difference"] <= tolerance for record in found)
