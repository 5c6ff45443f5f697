"""The campaign of faults: each kind runs, and the records and the document say that nothing was lost or accepted."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "studies" / "results" / "faults.jsonl"


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "studies")
        return importlib.import_module("faults")


@pytest.fixture(scope="module")
def place(study, tmp_path_factory):
    return study.prepare(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_every_kind_runs_and_loses_nothing(study, monkeypatch, tmp_path, capsys):
    file = tmp_path / "faults.jsonl"
    monkeypatch.setattr("sys.argv", ["faults.py", "--seed", "1", "--share", "0.02", "--records", str(file)])
    study.main()
    records = study.known_records(file)
    assert [record["fault"] for record in records] == list(study.CAMPAIGN)
    assert capsys.readouterr().out.endswith("\n".join(study.table(records)) + "\n")


TAKEN_AWAY = {  # a check, what stands in its place, and the fault that is accepted without it
    "of a report's status": ("report.records.contradiction", lambda _: None, "damaged report"),
    "of the weights": ("commands.report.doubt_about_weights", lambda *_: None, "damaged weights"),
    "of statistics": (
        "statistics.store._checksum",
        lambda description, _: description["checksum"],
        "damaged statistics",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TAKEN_AWAY)
def test_a_check_that_is_taken_away_is_missed(case, study, place, monkeypatch):
    target, instead, kind = TAKEN_AWAY[case]
    found = study.CAMPAIGN[kind][0](place, study.random.Random(0))
    first = next(found)
    monkeypatch.setattr(f"hf_lossless_lr.{target}", instead)
    assert first not in study.WRONG
    assert any(next(found) in study.WRONG for _ in range(1000))


def test_the_document_has_the_table_of_the_records(study):
    records = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    assert [record["fault"] for record in records] == list(study.CAMPAIGN)
    assert [record["tries"] for record in records] == [tries for _, tries in study.CAMPAIGN.values()]
    assert not {name for record in records for name in record["outcomes"]} & set(study.WRONG)
    assert all(sum(record["outcomes"].values()) == record["tries"] for record in records)
    documented = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in study.table(records) if line not in documented] == []
