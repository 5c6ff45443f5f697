"""`hf-lossless-lr compare`: methods on the same data, found once, and no results of something else."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from support.tiny_models import TINY_MODELS, split_batch
from support.word_tokenizer import WORDS, word_tokenizer
from transformers import AutoModelForSequenceClassification

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.baselines import compare
from hf_lossless_lr.commands.cli import main
from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.fingerprint import tensors_fingerprint
from hf_lossless_lr.pipeline import LowRankCompressor
from hf_lossless_lr.report import MethodResult, methods_table

METHODS = ("default", "svd", "aa-svd", "separable", "gptq-int4", "paper-compact")


def lines(start, count):
    texts = [f"{WORDS[n % 13]} {WORDS[n // 13 % 13]} {WORDS[n * 5 % 13]}" for n in range(start, start + count)]
    return [{"text": text, "label": n % 3} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    TINY_MODELS["bert-sequence-classification"]()[0].save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("train", lines(0, 48)), ("validation", lines(60, 40))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(
        model=str(folder / "model"), train=str(folder / "train.jsonl"), validation=str(folder / "validation.jsonl")
    )


def arguments(place, *extra, methods=METHODS):
    return [
        *("compare", place.model, "--task", "text-classification", "--dataset", "json"),
        *("--data-files", place.train, "--eval-data-files", place.validation),
        *("--methods", *methods, "--keep-ratios", "0.5", "0.7", *extra),
    ]


def test_finds_each_method_at_each_size_once_and_goes_on(place, tmp_path, capsys, monkeypatch):
    records, plot = tmp_path / "records.jsonl", tmp_path / "plot.png"
    assert main(arguments(place, "--records", str(records), methods=METHODS[:2])) == 0
    first = records.read_text()
    assert len(first.splitlines()) == 4
    capsys.readouterr()
    again = ("--records", str(records), "--plot", str(plot), "--json", str(tmp_path / "all.json"))
    assert main(arguments(place, *again)) == 0
    assert records.read_text().startswith(first)
    found = [MethodResult.from_dict(json.loads(line)) for line in records.read_text().splitlines()]
    keys = [(result.method, result.keep_ratio) for result in found]
    sized = [(name, ratio) for name in METHODS[:4] for ratio in (0.7, 0.5)]
    assert sorted(keys, key=str) == sorted([*sized, ("gptq-int4", None), ("paper-compact", None)], key=str)
    assert all(result.parameters <= result.keep_ratio for result in found if result.keep_ratio is not None)
    shown = capsys.readouterr().out
    assert shown.count("\n") == len(found) + 2
    assert plot.stat().st_size > 0
    assert len(json.loads((tmp_path / "all.json").read_text())) == len(found)
    monkeypatch.setattr(LowRankCompressor, "calibrate", None)
    assert main(arguments(place, "--records", str(records))) == 0
    assert capsys.readouterr().out == shown


def test_results_are_those_of_the_method_alone(place):
    model = AutoModelForSequenceClassification.from_pretrained(place.model)
    before = tensors_fingerprint(model.state_dict())
    tokenizer = word_tokenizer()

    def encoded(start, count):
        rows = lines(start, count)
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return split_batch({**batch, "labels": torch.tensor([row["label"] for row in rows])}, 4)

    calibration, held_out = encoded(0, 48), encoded(60, 40)
    options = {"eval_dataset": held_out, "rank_multiple": 1}
    results = list(compare(model, calibration, methods=["svd", "gptq-int4"], keep_ratios=[0.6], **options))
    assert tensors_fingerprint(model.state_dict()) == before
    svd, rounded = results
    assert svd.parameters <= 0.6
    assert rounded.parameters == 1.0
    assert rounded.bytes < svd.bytes
    layer = model.bert.encoder.layer[0].output.dense
    u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    config = {"keep_ratio": 0.6, "metric": "identity", "objective": "uniform", "storage": "two-factor"}
    compressor = LowRankCompressor(LosslessLowRankConfig(rank_multiple=1, **config))
    compressor.compress(model, calibration, eval_dataset=held_out)
    compressed = model.bert.encoder.layer[0].output.dense
    best = (u[:, : compressed.rank] * s[: compressed.rank]) @ v[: compressed.rank]
    assert torch.allclose(compressed.dense_weight().double(), best, atol=1e-6)
    assert svd.loss_increase == pytest.approx(compressor.report.compressed.loss - compressor.report.dense.loss)


def test_leaves_out_a_size_that_a_method_cannot_reach(caplog):
    model, batch = TINY_MODELS["bert-sequence-classification"](40)
    data = split_batch(batch, 4)
    options = {"methods": ["svd", "no-refit"], "keep_ratios": [0.6, 0.001], "eval_dataset": data[-2:]}
    with caplog.at_level("WARNING"):
        found = list(compare(model, data[:-2], rank_multiple=1, **options))
    assert [(result.method, result.keep_ratio) for result in found] == [("svd", 0.6), ("no-refit", 0.6)]
    assert sum("is left out at 0.001" in record.getMessage() for record in caplog.records) == 2


def test_refuses_results_of_another_model_data_or_options(place, tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    assert main(arguments(place, "--records", str(records), methods=["svd"])) == 0
    before = records.read_text()
    assert main(arguments(place, "--records", str(records), "--batch-size", "7", methods=["svd"])) == 1
    assert "of another model, other data, or other options" in capsys.readouterr().err
    assert records.read_text() == before
    records.write_text('{"method": "svd"}\n')
    assert main(arguments(place, "--records", str(records), methods=["svd"])) == 1
    assert "is no file of such records" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--records", "--plot", "--json"])
def test_refuses_a_file_that_cannot_be_written_before_any_work(place, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr("hf_lossless_lr.commands.compare.load_model", None)
    assert main(arguments(place, option, str(tmp_path / "nowhere" / "file"), methods=["svd"])) == 1
    assert f"{option}: there is no folder" in capsys.readouterr().err


def test_refuses_a_size_that_is_none_before_any_work(place, capsys, monkeypatch):
    monkeypatch.setattr("hf_lossless_lr.commands.compare.load_model", None)
    assert main([*arguments(place, methods=["svd"]), "--keep-ratios", "50"]) == 1
    assert "keep_ratio: " in capsys.readouterr().err


def test_refuses_to_fine_tune_without_labels_before_any_work(place, capsys, monkeypatch):
    monkeypatch.setattr("hf_lossless_lr.commands.compare.load_model", None)
    assert main([*arguments(place, methods=["svd", "lpaf"]), "--task", "feature-extraction"]) == 1
    assert "the method 'lpaf' fine-tunes on labelled data, and labels='model' has none" in capsys.readouterr().err


def test_answers_to_an_old_option_with_the_new_one(place, capsys):
    with pytest.raises(SystemExit):
        main(arguments(place, "--metric-margin", "0.1", methods=["svd"]))
    assert "accuracy_margin" in capsys.readouterr().err


def test_refuses_a_method_that_there_is_not():
    with pytest.raises(ConfigurationError, match="no method 'sdv'"):
        next(compare(None, None, methods=["sdv"], keep_ratios=[0.5]))


def test_the_table_has_a_dash_where_nothing_is_known():
    result = MethodResult("svd", None, 0.5, 0.6, 0.1, None, None, "none", None, 1.0, "x")
    assert methods_table([result]).splitlines()[-1] == "| svd | - | 0.500 | 0.600 | +0.1000 | - | - | none | - | 1.0 |"


def test_of_which_no_method_reaches_a_size_says_so(place, capsys):
    command = arguments(place, methods=("svd",))
    command[command.index("0.5")], command[command.index("0.7")] = "0.001", "0.002"
    assert main(command) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("hf-lossless-lr: no method reaches any of the sizes\n")


def test_shows_the_sizes_that_are_asked_for_alone(place, tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    assert main(arguments(place, "--records", str(records), methods=("svd",))) == 0
    command = arguments(place, "--records", str(records), methods=("svd",))
    capsys.readouterr()
    assert main([each for each in command if each != "0.7"]) == 0
    assert [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[2:]] == ["0.5"]
    assert len(records.read_text().splitlines()) == 2


def test_leaves_layers_dense(place, capsys):
    assert main(arguments(place, "--ignore", "query", "Conv2d", methods=("svd",))) == 1
    assert "ignore: 'Conv2d' matches no layer" in capsys.readouterr().err
    assert main(arguments(place, "--ignore", "query", methods=("svd",))) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "plot.png"], "figures need matplotlib"),
        (["--methods", "svd-lm"], "there is no method 'svd-lm'.* Did you mean 'svd-llm'"),
    ],
)
def test_refuses_what_cannot_be_before_it_loads_anything(place, options, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("hf_lossless_lr.commands.compare.load_model", None)
    assert main(arguments(place, *options, methods=("svd",))) == 1
    assert re.search(message, capsys.readouterr().err)


def test_has_no_verdict_to_require(place, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments(place, "--require", "lossless"))
    assert "unrecognized arguments: --require" in capsys.readouterr().err
