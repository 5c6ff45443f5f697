"""`hf-lossless-lr evaluate`, and the published tasks as tasks of `compress`."""

import json
from types import SimpleNamespace

import pytest
from tiny_models import TINY_MODELS
from word_tokenizer import WORDS, word_tokenizer

from hf_lossless_lr import CompressionReport
from hf_lossless_lr.cli import main
from hf_lossless_lr.report import REPORT_NAME

COUNT = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A multiple-choice model and questions in SWAG's schema."""
    folder = tmp_path_factory.mktemp("place")
    TINY_MODELS["bert-multiple-choice"]()[0].save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")

    def question(n):
        spelled = {"sent1": f"{WORDS[n % 12]} {WORDS[n // 12]}", "sent2": WORDS[5], "label": n % 4}
        return spelled | {f"ending{choice}": WORDS[(3 * n + choice) % 12] for choice in range(4)}

    data = folder / "data"
    data.mkdir()
    for split, start in (("train", 0), ("validation", COUNT)):
        lines = [json.dumps(question(n)) + "\n" for n in range(start, start + COUNT)]
        (data / f"{split}.jsonl").write_text("".join(lines))
    return SimpleNamespace(model=str(folder / "model"), data=str(data))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def compressed(place, tmp_path):
    out = str(tmp_path / "out")
    arguments = ["--task", "swag", "--dataset", place.data, "--eval_split", "validation", "--output", out]
    assert main(["compress", place.model, *arguments]) == 0
    return out


class TestEvaluate:
    def test_prints_and_writes_the_scores_of_a_model(self, place, tmp_path, capsys):
        file = tmp_path / "scores.json"
        assert main(["evaluate", place.model, "--task", "swag", "--dataset", place.data, "--json", str(file)]) == 0
        (entry,) = json.loads(file.read_text())["accuracy"]["values"]
        assert (entry["value"] * COUNT) == pytest.approx(round(entry["value"] * COUNT))
        assert f"{entry['value']:.4f} ± {entry['standard_error']:.4f}" in capsys.readouterr().out

    def test_compares_two_models_on_the_same_examples(self, place, compressed, tmp_path, capsys):
        file, where = tmp_path / "scores.json", ["--task", "swag", "--dataset", place.data]
        assert main(["evaluate", place.model, compressed, *where, "--json", str(file)]) == 0
        found = json.loads(file.read_text())["accuracy"]
        dense, other = (entry["value"] for entry in found["values"])
        assert found["drop"]["mean"] == pytest.approx(dense - other, abs=1e-9)
        assert found["drop"]["lower"] <= found["drop"]["mean"] <= found["drop"]["upper"]
        report = CompressionReport.from_json((tmp_path / "out" / REPORT_NAME).read_text())
        assert (report.dense.accuracy, report.compressed.accuracy) == pytest.approx((dense, other))
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(("lossy", "inconclusive", "lossless", "improved"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--split", "nothing"), "has no split 'nothing'"),
            (("--confidence", "0.2"), "confidence: must be a number in"),
            (("--json", "/no/such/file"), "--json: there is no folder /no/such"),
            (("--shots_files", "x.jsonl"), "--shots_files is for mmlu, not for swag"),
        ],
    )
    def test_explains_what_is_wrong(self, options, message, place, capsys):
        assert main(["evaluate", place.model, "--task", "swag", "--dataset", place.data, *options]) == 1
        assert message in capsys.readouterr().err


class TestCompress:
    def test_of_a_task_without_a_data_set_asks_for_one(self, place, tmp_path, capsys):
        arguments = ["--task", "text-classification", "--output", str(tmp_path / "out")]
        text = tmp_path / "text"
        TINY_MODELS["bert-sequence-classification"]()[0].save_pretrained(text)
        word_tokenizer().save_pretrained(text)
        assert main(["compress", str(text), *arguments]) == 1
        assert "--dataset: name the data set" in capsys.readouterr().err
