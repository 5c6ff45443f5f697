"""`hf-lossless-lr evaluate`, and the published tasks as tasks of `compress`."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from support.mmlu_questions import byte_tokenizer, dev_rows, llama, questions
from support.tiny_models import TINY_MODELS
from support.word_tokenizer import WORDS, word_tokenizer

from hf_lossless_lr import CompressionReport
from hf_lossless_lr.commands.cli import main
from hf_lossless_lr.errors import DataError
from hf_lossless_lr.report.records import REPORT_NAME

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

    def test_certifies_nothing_on_data_that_a_model_was_made_from(self, place, compressed, capsys):
        where = ["--task", "swag", "--dataset", place.data, "--split"]
        for split, made_from in (("train", True), ("validation", False)):
            assert main(["evaluate", place.model, compressed, *where, split]) == 0
            out = capsys.readouterr().out
            assert ("no certificate: eval_dataset is data that the compressed model was made from" in out) is made_from

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

    def test_examples_of_a_text_are_blocks(self, tmp_path, capsys):
        llama().save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "test.jsonl").write_text(json.dumps({"text": "a few words of text " * 80}) + "\n")
        model, file = str(tmp_path / "model"), tmp_path / "scores.json"
        where = ["--task", "wikitext2", "--dataset", str(tmp_path / "data"), "--max_length", "32"]
        losses = []
        for count in (3, 29, 60):
            assert main(["evaluate", model, *where, "--examples", str(count), "--json", str(file)]) == 0
            losses.append(json.loads(file.read_text())["loss"]["values"][0]["value"])
        assert len(set(losses)) == 3
        capsys.readouterr()
        assert main(["evaluate", model, model, *where, "--examples", "29"]) == 0
        assert "29 examples are too few for a certificate" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--split", "nothing"), "has no split 'nothing'"),
            (("--confidence", "0.2"), "confidence: must be a number in"),
            (("--max_length", "0"), "--max_length: must be at least 1, got 0."),
            (("--examples", "0"), "--examples: must be at least 1, got 0."),
            (("--json", "/no/such/file"), "--json: there is no folder /no/such"),
            (("--shots_files", "x.jsonl"), "--shots_files is for mmlu, not for swag"),
        ],
    )
    def test_explains_what_is_wrong(self, options, message, place, capsys):
        assert main(["evaluate", place.model, "--task", "swag", "--dataset", place.data, *options]) == 1
        assert message in capsys.readouterr().err


class TestData:
    @pytest.mark.parametrize("command", ["evaluate", "verify", "compress"])
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ((), ("nyu-mll/glue", "sst2")),
            (("--dataset_config", "mine"), ("nyu-mll/glue", "mine")),
            (("--dataset", "my/data"), ("my/data", None)),
            (("--dataset", "my/data", "--dataset_config", "mine"), ("my/data", "mine")),
        ],
    )
    def test_are_those_of_the_task_unless_others_are_named(self, command, options, expected, tmp_path, monkeypatch):
        for load in ("load_auto", "load_model"):
            monkeypatch.setattr(f"hf_lossless_lr.commands.{command}.{load}", lambda *_, **__: None)
        asked = []

        def load_split(*arguments):
            asked.append(arguments)
            raise DataError("enough")

        monkeypatch.setattr("hf_lossless_lr.commands.data_options.load_split", load_split)
        rest = {"evaluate": ("m",), "verify": ("m", "m"), "compress": ("m", "--output", str(tmp_path / "out"))}
        assert main([command, *rest[command], "--task", "sst2", *options]) == 1
        assert [arguments[:2] for arguments in asked] == [expected]


class TestOrderOfLabels:
    NAMES = ("entailment", "neutral", "contradiction")

    @pytest.fixture
    def pair(self, tmp_path):
        """A model, the same one with its classes in another order, and data for both."""
        one, _ = TINY_MODELS["bert-sequence-classification"]()
        other, order = copy.deepcopy(one), [2, 0, 1]
        with torch.no_grad():
            other.classifier.weight.copy_(one.classifier.weight[order])
            other.classifier.bias.copy_(one.classifier.bias[order])
        for name, model, places in (("one", one, [0, 1, 2]), ("other", other, order)):
            model.config.id2label = {index: self.NAMES[place] for index, place in enumerate(places)}
            model.config.label2id = {label: index for index, label in model.config.id2label.items()}
            model.save_pretrained(tmp_path / name)
            word_tokenizer().save_pretrained(tmp_path / name)
        rows = [{"premise": WORDS[n % 12], "hypothesis": WORDS[n // 12], "label": n % 3} for n in range(COUNT)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ("--task", "mnli", "--dataset", "json", "--data_files", str(tmp_path / "data.jsonl"))
        return (str(tmp_path / "one"), str(tmp_path / "other")), data

    def test_that_differs_leaves_the_scores_alone_but_gives_no_certificate(self, pair, tmp_path, capsys):
        models, data = pair
        assert main(["evaluate", *models, *data, "--json", str(tmp_path / "scores.json")]) == 0
        first, second = json.loads((tmp_path / "scores.json").read_text())["accuracy"]["values"]
        assert first == second
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("no certificate: the models order their labels differently")

    def test_that_differs_is_refused_by_verify(self, pair, capsys):
        models, data = pair
        assert main(["verify", *models, *data]) == 1
        assert "error: the models order their labels differently" in capsys.readouterr().err

    def test_that_is_the_same_is_no_obstacle_even_if_it_is_not_that_of_the_data(self, pair, capsys):
        (_, other), data = pair
        for command in ("evaluate", "verify"):
            assert main([command, other, other, *data]) == 0
            assert " on 60 held-out examples" in capsys.readouterr().out.splitlines()[-1]


class TestSolvedExamples:
    """MMLU from local files, the solved examples included."""

    @pytest.fixture
    def local(self, tmp_path):
        llama().save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        for name, rows in (("dev", dev_rows()), ("test", questions((16, 16, 16)))):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ("--task", "mmlu", "--dataset", "json", "--data_files", str(tmp_path / "test.jsonl"))
        return str(tmp_path / "model"), (*data, "--shots_files", str(tmp_path / "dev.jsonl"), "--max_length", "400")

    def test_are_taken_from_files_by_every_command(self, local, tmp_path, capsys):
        model, data = local
        out = str(tmp_path / "out")
        assert main(["compress", model, *data, "--output", out, "--keep_ratio", "0.8"]) == 0
        assert main(["verify", model, out, *data, "--examples", "40"]) == 0
        assert "on 40 held-out examples" in capsys.readouterr().out
        assert main(["evaluate", model, *data]) == 0
        assert "accuracy_by_subject" in capsys.readouterr().out


class TestCompress:
    def test_of_longer_blocks_of_text_than_the_model_takes_is_refused_before_any_work(self, tmp_path, capsys):
        model = llama()
        model.save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "text.txt").write_text("some words of a text\n" * 400)
        limit = model.config.max_position_embeddings
        where = ["--task", "wikitext2", "--dataset", "text", "--data_files", str(tmp_path / "text.txt")]
        command = ["compress", str(tmp_path / "model"), *where, "--output", str(tmp_path / "out")]
        assert main(command) == 1
        assert (
            f"blocks of 2048 tokens, but the model takes {limit}; give --max_length {limit}" in capsys.readouterr().err
        )
        assert main([*command, "--max_length", str(limit + 1)]) == 1
        assert "--max_length: the text is read in blocks" in capsys.readouterr().err

    def test_of_a_task_without_a_data_set_asks_for_one(self, place, tmp_path, capsys):
        arguments = ["--task", "text-classification", "--output", str(tmp_path / "out")]
        text = tmp_path / "text"
        TINY_MODELS["bert-sequence-classification"]()[0].save_pretrained(text)
        word_tokenizer().save_pretrained(text)
        assert main(["compress", str(text), *arguments]) == 1
        assert "--dataset: name the data set" in capsys.readouterr().err
