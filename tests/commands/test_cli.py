"""The command `hf-lossless-lr`, from its arguments to the folder that it writes."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, Value
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError
from support.compressions import factorized_layers, folder_content
from support.processes import in_two_processes, needs_processes
from support.tiny_models import TINY_MODELS, build
from support.word_tokenizer import WORDS, word_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ViTImageProcessorPil

from hf_lossless_lr import CompressionReport, LosslessLowRankConfig, __version__
from hf_lossless_lr.checkpoint.options import CompressionOptions
from hf_lossless_lr.commands.cli import main
from hf_lossless_lr.commands.compress import CompressArguments
from hf_lossless_lr.commands.demo import KEEP_RATIO
from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.evaluation.pipelines import TASKS
from hf_lossless_lr.report.tables import comparison_table

COUNT = 20


def sentence(number, words=6):
    """A text of its own for each number: the first two words spell it."""
    spelled = (number, number // len(WORDS), *(number * 7 + position * position for position in range(2, words)))
    return " ".join(WORDS[word % len(WORDS)] for word in spelled)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_rows(count=COUNT, start=0):
    return [{"sentence": sentence(n, 3 + n % 5), "label": n % 3, "idx": n} for n in range(start, start + count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained model's folder and its data: everything that a run reads."""
    folder = tmp_path_factory.mktemp("place")
    TINY_MODELS["bert-sequence-classification"]()[0].save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    return SimpleNamespace(
        model=str(folder / "model"),
        train=write_lines(folder / "train.jsonl", text_rows()),
        validation=write_lines(folder / "validation.jsonl", text_rows(9, 100)),
    )


@pytest.fixture
def command(place, tmp_path):
    """The arguments of a run that works."""
    return [
        *("compress", place.model, "--task", "text-classification", "--dataset", "json"),
        *("--data_files", place.train, "--eval_data_files", place.validation, "--output", str(tmp_path / "out")),
    ]


def changed(command, **options):
    """The arguments with some options replaced, or left out where the value is None."""
    command = list(command)
    for name, value in options.items():
        position = command.index(f"--{name}")
        command[position : position + 2] = [] if value is None else [f"--{name}", value]
    return command


class TestCompress:
    def test_writes_a_checkpoint_that_answers_as_the_measured_model(self, command, place, tmp_path, capsys):
        assert main(command) == 0
        out = tmp_path / "out"
        assert {path.name for path in out.iterdir()} >= {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "compression_report.json",
        }
        report = CompressionReport.from_json((out / "compression_report.json").read_text())
        model = AutoModelForSequenceClassification.from_pretrained(out).eval()
        assert factorized_layers(model)
        assert model.num_parameters() == report.compressed.parameters
        assert report.keep_ratio <= 0.5
        assert report.calibration["examples"] == COUNT
        tokenizer = AutoTokenizer.from_pretrained(out)
        rows = text_rows(9, 100)
        encoded = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            loss = model(**encoded, labels=torch.tensor([row["label"] for row in rows])).loss.item()
        assert report.compressed.loss == pytest.approx(loss, rel=1e-5)
        text = capsys.readouterr().out
        assert f"measured on 9 held-out examples; written to {out}" in text
        for label in ("targeted parameters", "parameters", "loss (nats)", "accuracy"):
            assert any(line.startswith(label) for line in text.splitlines())
        assert f"{report.compressed.loss:.4f}" in text
        assert f"{report.compressed.parameters:,d}" in text
        assert (out.stat().st_mode & 0o777) == 0o755

    def test_leaves_nothing_but_the_output(self, command, tmp_path):
        assert main(command) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("flag", ["--keep_ratio", "--keep-ratio"])
    def test_takes_both_spellings_of_an_option(self, command, tmp_path, flag):
        assert main([*command, flag, "0.3"]) == 0
        report = CompressionReport.from_json((tmp_path / "out" / "compression_report.json").read_text())
        assert report.config["keep_ratio"] == 0.3
        assert 0.2 < report.keep_ratio <= 0.3

    def test_passes_every_option_on(self, command, tmp_path):
        options = {
            "objective": "uniform",
            "keep_ratio": 0.6,
            "metric": "activation",
            "damping": 0.1,
            "storage": "two-factor",
            "rank_multiple": 2,
            "refit": False,
            "selection_fraction": 0.25,
            "seed": 3,
            "batch_size": 5,
            "loss_margin": 0.5,
            "accuracy_margin": 0.1,
            "confidence": 0.9,
            "epsilon_tolerance": 0.01,
            "target_modules": ["query", "key", "value"],
            "ignore": ["bert.encoder.layer.1.attention.self.key"],
        }
        flags = []
        for name, value in options.items():
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        assert main([*command, *flags]) == 0
        report = CompressionReport.from_json((tmp_path / "out" / "compression_report.json").read_text())
        config = LosslessLowRankConfig(**options)
        assert report.config == {f.name: getattr(config, f.name) for f in fields(CompressionOptions)}
        assert all(options[name] != getattr(LosslessLowRankConfig(), name) for name in options)
        assert report.calibration["examples"] == COUNT - COUNT // 4
        assert len(report.trials) == 1
        assert not report.refitted
        assert len(report.layers) == 5

    def test_holds_out_a_fifth_without_evaluation_data(self, command, tmp_path, capsys):
        assert main(changed(command, eval_data_files=None)) == 0
        report = CompressionReport.from_json((tmp_path / "out" / "compression_report.json").read_text())
        assert (report.calibration["examples"], report.held_out["examples"]) == (16, 4)
        assert "measured on 4 held-out examples" in capsys.readouterr().out

    @pytest.mark.parametrize("named", [False, True])
    def test_needs_no_labels_where_the_model_gives_them(self, named, command, tmp_path):
        kept = "text" if named else "sentence"
        bare = [{kept: row["sentence"]} for row in text_rows()]
        given = ["--columns", kept] if named else []
        train = write_lines(tmp_path / "bare.jsonl", bare)
        bare = changed(command, data_files=train, eval_data_files=None)
        assert main([*bare, "--labels", "model", *given]) == 0
        report = CompressionReport.from_json((tmp_path / "out" / "compression_report.json").read_text())
        assert report.config["labels"] == "model"
        assert report.calibration["examples"] + report.held_out["examples"] == COUNT

    def test_reads_the_splits_of_a_folder(self, place, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        write_lines(folder / "train.jsonl", text_rows(12))
        write_lines(folder / "test.jsonl", text_rows(11, 50))
        arguments = ["compress", place.model, "--task", "text-classification", "--dataset", str(folder)]
        arguments += ["--eval_split", "test", "--eval_examples", "10", "--calibration_examples", "11"]
        assert main([*arguments, "--output", str(tmp_path / "deep" / "out")]) == 0
        report = CompressionReport.from_json((tmp_path / "deep" / "out" / "compression_report.json").read_text())
        assert (report.calibration["examples"], report.held_out["examples"]) == (11, 10)

    def test_writes_the_report_to_a_second_place(self, command, tmp_path):
        assert main([*command, "--json", str(tmp_path / "report.json")]) == 0
        assert (tmp_path / "report.json").read_text() == (tmp_path / "out" / "compression_report.json").read_text()

    def test_keeps_within_its_memory_and_goes_on_from_a_work_folder(self, command, tmp_path, capsys):
        options = ["--max-memory", "8GiB", "--work", str(tmp_path / "work")]
        assert main([*command, *options]) == 0
        report = json.loads((tmp_path / "out" / "compression_report.json").read_text())
        assert report["memory"]["limit"] == 8 * 2**30
        content = folder_content(tmp_path / "out")
        files = folder_content(tmp_path / "work")
        assert "journal.json" in files
        shutil.rmtree(tmp_path / "out")
        assert main([*command, *options]) == 0
        assert folder_content(tmp_path / "work") == files
        assert folder_content(tmp_path / "out")["model.safetensors"] == content["model.safetensors"]
        shutil.rmtree(tmp_path / "out")
        assert main([*command, *options, "--damping", "0.2"]) == 1
        assert "what changed: damping" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("memory", ["little", "1KB"])
    def test_refuses_a_memory_that_is_none_or_too_small(self, memory, command, tmp_path, capsys):
        assert main([*command, "--max-memory", memory]) == 1
        assert "max_memory" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "options",
        [
            ("--formats", "int8", "--keep_ratio", "0.3"),
            ("--formats", "auto", "--keep_ratio", "0.99", "--rank_multiple", "8"),
        ],
    )
    def test_writes_a_model_whose_layers_are_rounded_and_not_factorized(self, options, command, tmp_path, capsys):
        assert main([*command, *options, "--refit", "false"]) == 0
        written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
        assert written
        assert {record["rank"] for record in written.values()} == {None}
        assert "written to" in capsys.readouterr().out

    def test_takes_more_data_for_the_refit(self, command, tmp_path):
        lines = write_lines(tmp_path / "more.jsonl", text_rows(24, 900))
        assert main([*command, "--refit-data-files", str(lines), "--refit-examples", "20"]) == 0
        report = json.loads((tmp_path / "out" / "compression_report.json").read_text())
        assert len(report["fingerprints"]["refit"]) == 64

    def test_writes_json_also_where_one_example_gives_no_bound(self, command, tmp_path):
        assert main(command) == 0
        text = (tmp_path / "out" / "compression_report.json").read_text()
        report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert [trial["loss_increase_upper"] for trial in report["trials"]] == [None]

    @pytest.mark.parametrize("truncates", [False, True])
    def test_saves_the_tokenizer_of_the_model_as_it_was(self, truncates, command, place, tmp_path):
        """With a cold cache of datasets and with a warm one; a tokenizer remembers how it was last called."""
        model = shutil.copytree(place.model, tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(model)
        if truncates:
            tokenizer.backend_tokenizer.enable_truncation(17, stride=2)
            tokenizer.backend_tokenizer.enable_padding(length=17)
        tokenizer.save_pretrained(model)
        AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "own")
        own = folder_content(tmp_path / "own")
        assert own["tokenizer.json"] == folder_content(Path(model))["tokenizer.json"]
        lines = write_lines(tmp_path / "own.jsonl", text_rows(COUNT + truncates, 300))
        for name in ("cold", "warm"):
            run = changed(command, output=str(tmp_path / name), data_files=lines)
            assert main([run[0], str(model), *run[2:]]) == 0
            saved = folder_content(tmp_path / name)
            assert {file: saved[file] for file in own} == own
        warm, cold = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("warm", "cold"))
        assert warm.backend_tokenizer.to_str() == cold.backend_tokenizer.to_str()

    def test_works_in_a_lower_precision(self, command, tmp_path):
        assert main([*command, "--dtype", "bfloat16"]) == 0
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert model.dtype == torch.bfloat16
        assert factorized_layers(model)

    def test_gives_the_same_files_twice(self, command, tmp_path):
        assert main(command) == 0
        assert main(changed(command, output=str(tmp_path / "again"))) == 0
        first, second = (folder_content(tmp_path / name) for name in ("out", "again"))
        for name in ("compression_report.json", "README.md"):
            assert first.pop(name) != second.pop(name)  # the times differ
        assert first == second


def compress_in_each(folder: Path, process: int) -> None:
    """What each launched process runs; its exit code and what it prints go to files of its own."""
    command = json.loads((folder / "command.json").read_text())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(command)
    (folder / f"printed-{process}").write_text(printed.getvalue())
    (folder / f"code-{process}").write_text(str(code))


@needs_processes
class TestTwoProcesses:
    @pytest.mark.parametrize(
        ("options", "code"),
        [
            ([], 0),
            (["--require", "improved"], 4),
            (["--objective", "compact", "--loss_margin", "0", "--accuracy_margin", "0"], 3),
        ],
    )
    def test_write_and_print_once_and_exit_alike(self, options, code, command, tmp_path):
        where = tmp_path / "processes"
        where.mkdir()
        (where / "command.json").write_text(json.dumps([*command, *options, "--json", str(where / "report.json")]))
        in_two_processes(compress_in_each, where)
        assert [(where / f"code-{process}").read_text() for process in (0, 1)] == [str(code)] * 2
        first, second = ((where / f"printed-{process}").read_text() for process in (0, 1))
        assert ("nothing written" if code == 3 else f"written to {tmp_path / 'out'}") in first
        assert second == ""
        assert {path.name for path in tmp_path.iterdir()} == {"processes", *(["out"] if code != 3 else [])}
        report = (where / "report.json").read_text()
        if code != 3:
            assert (tmp_path / "out" / "compression_report.json").read_text() == report
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
            assert model.num_parameters() == CompressionReport.from_json(report).compressed.parameters


def token_case(folder):
    TINY_MODELS["bert-token-classification"]()[0].save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [{"tokens": sentence(n).split(), "ner_tags": [(n + i) % 5 for i in range(6)]} for n in range(COUNT)]
    return ["--dataset", "json", "--data_files", write_lines(folder / "a.jsonl", rows)], COUNT


def embedding_case(folder):
    build(
        "BertModel",
        "BertConfig",
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    ).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [{"text": sentence(n)} for n in range(COUNT)]
    return ["--dataset", "json", "--data_files", write_lines(folder / "a.jsonl", rows)], COUNT


def generation_case(folder):
    TINY_MODELS["llama"]()[0].save_pretrained(folder / "model")
    word_tokenizer(eos=True).save_pretrained(folder / "model")
    (folder / "a.txt").write_text("\n".join(sentence(n) for n in range(40)))  # 40 * (6 + 1) tokens
    return ["--dataset", "text", "--data_files", str(folder / "a.txt"), "--max_length", "10"], 28


def image_case(folder):
    vit = {"image_size": 12, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build("ViTForImageClassification", "ViTConfig", intermediate_size=48, num_labels=4, **vit)
    model.save_pretrained(folder / "model")
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder / "model")
    pictures = [np.random.default_rng(n).integers(0, 255, (9, 9), dtype=np.uint8) for n in range(COUNT)]
    features = Features({"image": Image(), "label": Value("int64")})
    data = Dataset.from_dict({"image": pictures, "label": [n % 4 for n in range(COUNT)]}, features=features)
    data.save_to_disk(str(folder / "data"))
    return ["--dataset", str(folder / "data")], COUNT


CASES = {
    "token-classification": token_case,
    "feature-extraction": embedding_case,
    "text-generation": generation_case,
    "image-classification": image_case,
}


class TestTasks:
    @pytest.mark.parametrize("task", CASES)
    def test_are_compressed_end_to_end(self, task, tmp_path, capsys):
        arguments, examples = CASES[task](tmp_path)
        model = str(tmp_path / "model")
        assert main(["compress", model, "--task", task, *arguments, "--output", str(tmp_path / "out")]) == 0
        report = CompressionReport.from_json((tmp_path / "out" / "compression_report.json").read_text())
        rest = examples - examples // 5
        assert report.held_out["examples"] == examples // 5
        assert report.calibration["examples"] == rest
        assert report.keep_ratio <= 0.5
        again = getattr(transformers, TASKS[task].auto_model).from_pretrained(tmp_path / "out")
        assert factorized_layers(again).keys() == {name for name, layer in report.layers.items() if layer.rank}
        getattr(transformers, TASKS[task].processor).from_pretrained(tmp_path / "out")

    def test_of_words_need_no_tags_where_the_model_gives_them(self, tmp_path):
        arguments, _ = token_case(tmp_path)
        rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        write_lines(tmp_path / "a.jsonl", [{"tokens": row["tokens"]} for row in rows])
        given = ["--task", "token-classification", "--labels", "model", "--output", str(tmp_path / "out")]
        assert main(["compress", str(tmp_path / "model"), *given, *arguments]) == 0

    def test_have_each_an_end_to_end_case(self):
        assert {*CASES, "text-classification"} == set(TASKS)


WRONG = {  # options to change or add, and the message
    "model": (
        lambda command: [command[0], "/nowhere/model", *command[2:]],
        "cannot load '/nowhere/model': there is no such folder.",
    ),
    "data": (
        lambda command: changed(command, data_files="/nowhere/x.jsonl"),
        "cannot load the data set 'json': Unable",
    ),
    "column": (
        lambda command: [*command, "--columns", "txt", "label"],
        "the data set has no column 'txt'; it has sent",
    ),
    "keep ratio": (
        lambda command: [*command, "--keep_ratio", "1.5"],
        r"keep_ratio: must be a number in (0, 1], got 1.5",
    ),
    "contradiction": (
        lambda command: [*command, "--objective", "compact", "--keep_ratio", "0.5"],
        "keep_ratio=0.5 contradicts objective='compact'",
    ),
    "pattern": (lambda command: [*command, "--target_modules", "q_proj"], "target_modules: 'q_proj' matches no layer"),
    "few examples": (lambda command: [*command, "--calibration_examples", "5"], "calib_dataset: has 5 examples; at"),
    "no examples": (
        lambda command: [*command, "--calibration_examples", "0"],
        "--calibration_examples: must be at least 1, got 0.",
    ),
    "no evaluation examples": (
        lambda command: [*command, "--eval_examples", "-1"],
        "--eval_examples: must be at least 1, got -1.",
    ),
    "no tokens": (lambda command: [*command, "--max_length", "0"], "--max_length: must be at least 1, got 0."),
    "a number of no evaluation examples": (
        lambda command: [*changed(command, eval_data_files=None), "--eval_examples", "9"],
        "--eval_examples: name the held-out data with --eval_split or --eval_data_files",
    ),
    "task": (
        lambda command: changed(command, task="image-classification"),
        "cannot load ",
    ),
    "columns of a published task": (
        lambda command: [*changed(command, task="sst2"), "--columns", "sentence", "label"],
        "--columns is for text-classification, token-classification, feature-extraction, "
        "text-generation, image-classification; sst2 has",
    ),
    "memory": (
        lambda command: [*changed(command, data_files="/nowhere/x.jsonl"), "--max_memory", "little"],
        "max_memory: 'little' is no number of bytes",
    ),
    "nothing": (lambda command: [command[0], "", *command[2:]], "the argument behind 'compress' is empty."),
    "a name of nothing": (
        lambda command: [*command, "--columns", "sentence", " "],
        "the argument behind 'sentence' is empty.",
    ),
    "no folder": (
        lambda command: [command[0], "./nowhere", *command[2:]],
        "cannot load './nowhere': there is no such folder.",
    ),
    "files of solved examples": (
        lambda command: changed(command, task="mmlu"),
        "--shots_files: name the files of MMLU's solved examples (dev), too.",
    ),
    "solved examples": (lambda command: [*command, "--shots_files", "x"], "--shots_files is for mmlu, not for text-"),
    "size": (lambda command: [*command, "--keep_ratio", "0.0001"], "keep_ratio=0.0001 cannot be reached"),
}


class TestErrors:
    @pytest.mark.parametrize("case", WRONG)
    def test_give_exit_code_1_a_message_and_no_output(self, case, command, tmp_path, capsys):
        change, text = WRONG[case]
        assert main(change(command)) == 1
        shown = capsys.readouterr()
        assert f"hf-lossless-lr: error: {text}" in shown.err
        assert "held-out" not in shown.out
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
    def test_of_an_output_that_exists_leave_it_alone(self, kind, command, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(
            "hf_lossless_lr.commands.compress.load_model", lambda *_, **__: pytest.fail("the model was loaded")
        )
        out = tmp_path / "out"
        if kind == "file":
            out.write_text("mine")
        else:
            out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
        before = folder_content(tmp_path)
        assert main(command) == 1
        assert f"--output: {out} exists already; choose another folder or remove it." in capsys.readouterr().err
        assert folder_content(tmp_path) == before
        assert out.exists()

    @pytest.mark.parametrize("option", ["json", "statistics"])
    def test_of_a_file_that_cannot_be_written_come_before_the_work(
        self, option, command, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr(
            "hf_lossless_lr.commands.compress.load_model", lambda *_, **__: pytest.fail("the model was loaded")
        )
        assert main([*command, f"--{option}", str(tmp_path / "nowhere" / "file")]) == 1
        assert f"error: --{option}: there is no folder {tmp_path / 'nowhere'}; make it" in capsys.readouterr().err
        assert main([*command, f"--{option}", str(tmp_path)]) == 1
        assert f"error: --{option}: {tmp_path} is a folder; name a file in it." in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("method", [["lossless_lr"], None, {}])
    def test_of_a_configuration_that_transformers_cannot_read_are_one_sentence(
        self, method, command, place, tmp_path, capsys
    ):
        model = Path(shutil.copytree(place.model, tmp_path / "model"))
        config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
        (model / "config.json").write_text(json.dumps(config))
        assert main([command[0], str(model), *command[2:]]) == 1
        assert f"hf-lossless-lr: error: cannot load {str(model)!r} with Auto" in capsys.readouterr().err

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_of_a_model_that_was_cut_off_are_one_sentence(self, share, command, place, tmp_path, capsys):
        model = Path(shutil.copytree(place.model, tmp_path / "model"))
        data = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(data[: int(share * len(data))])
        assert main([command[0], str(model), *command[2:]]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"hf-lossless-lr: error: cannot load {str(model)!r} with Auto")
        assert error.count("\n") == 1

    def test_while_writing_the_second_report_keep_the_checkpoint(self, command, tmp_path, monkeypatch, capsys):
        replace_file = os.replace

        def fail(source, target):
            if str(target).endswith("second.json"):
                raise OSError("the disk is full")
            replace_file(source, target)

        monkeypatch.setattr("os.replace", fail)
        assert main([*command, "--json", str(tmp_path / "second.json")]) == 1
        assert "hf-lossless-lr: error: the disk is full (--debug" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")

    @pytest.mark.parametrize(
        ("target", "error"),
        [
            *(
                (target, error)
                for target in (
                    "transformers.PreTrainedModel.save_pretrained",
                    "hf_lossless_lr.report.CompressionReport.save",
                    "hf_lossless_lr.commands.output.os.replace",
                )
                for error in (OSError("the disk is full"), SafetensorError("full"), KeyboardInterrupt())
            ),
        ],
    )
    def test_while_writing_leave_no_part_of_the_output(self, target, error, command, tmp_path, monkeypatch, capsys):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(target, fail)
        interrupted = isinstance(error, KeyboardInterrupt)
        assert main(command) == (130 if interrupted else 1)
        message = "hf-lossless-lr: interrupted\n" if interrupted else "hf-lossless-lr: error: "
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["compres"],
            ["compress"],
            ["compress", "model", "--task", "text-classification"],
            ["compress", "model", "--task", "nonsense", "--dataset", "json", "--output", "x"],
            ["compress", "m", "--task", "text-generation", "--dataset", "json", "--output", "x", "--objective", "no"],
            [
                "compress",
                "m",
                "--task",
                "text-generation",
                "--dataset",
                "json",
                "--output",
                "x",
                "--keep_ratio",
                "half",
            ],
            ["compress", "m", "--task", "text-generation", "--dataset", "json", "--output", "x", "--unknown", "1"],
            ["demo", "--keep_ratio", "half"],
        ],
    )
    def test_of_usage_give_exit_code_2_and_the_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "usage: hf-lossless-lr" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "shown"),
        [
            (OSError("the disk is full"), "the disk is full"),
            (SafetensorError("header too\n  large"), "SafetensorError: header too large"),
            (DatasetsError("no rows"), "DatasetsError: no rows"),
            (RuntimeError("mat1 and mat2 shapes " + "x" * 600), "RuntimeError: mat1 and mat2 shapes x"),
            (KeyError(), "KeyError"),
        ],
    )
    def test_of_libraries_are_one_line_unless_the_traceback_is_asked_for(
        self, error, shown, command, capsys, monkeypatch
    ):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("hf_lossless_lr.commands.compress.load_model", fail)
        assert main(command) == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"hf-lossless-lr: error: {shown}")
        assert printed.endswith("(--debug shows where)\n")
        assert printed.count("\n") == 1
        assert len(printed) < 600
        for asked in ([*command, "--debug"], ["--debug", *command]):
            with pytest.raises(type(error)):
                main(asked)

    def test_of_mistakes_in_this_package_have_a_traceback(self, command, monkeypatch):
        def fail(*_, **__):
            raise AttributeError

        monkeypatch.setattr("hf_lossless_lr.commands.compress.load_model", fail)
        with pytest.raises(AttributeError):
            main(command)

    def test_of_our_own_have_a_traceback_on_demand(self, command, tmp_path):
        (tmp_path / "out").mkdir()
        with pytest.raises(ConfigurationError, match="--output"):
            main([*command, "--debug"])

    def test_of_files_that_are_cut_short_are_explained(self, command, place, tmp_path, capsys):
        model = shutil.copytree(place.model, tmp_path / "model")
        weights = Path(model, "model.safetensors")
        for content in (weights.read_bytes()[:-100], b"", b"not a checkpoint"):
            weights.write_bytes(content)
            assert main([command[0], str(model), *command[2:]]) == 1
            assert "hf-lossless-lr: error: " in capsys.readouterr().err

    @pytest.mark.parametrize(
        "content", ["", "{", '{"sentence": "w5", "label": 0}\n{"sentence": ["w5"], "label": 0}\n']
    )
    def test_of_data_that_cannot_be_read_are_explained(self, content, command, tmp_path, capsys):
        (tmp_path / "a.jsonl").write_text(content)
        assert main(changed(command, data_files=str(tmp_path / "a.jsonl"))) == 1
        assert "hf-lossless-lr: error: " in capsys.readouterr().err

    def test_in_a_process_of_its_own_show_no_traceback(self, command, tmp_path):
        (tmp_path / "out").mkdir()
        process = subprocess.run(
            [sys.executable, "-m", "hf_lossless_lr.commands.cli", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 1
        assert process.stdout == ""
        assert process.stderr.startswith("hf-lossless-lr: error: --output: ")
        assert "Traceback" not in process.stderr


class TestHelp:
    @pytest.mark.parametrize(
        "arguments", [["--help"], ["compress", "--help"], ["demo", "--help"], ["benchmark", "--help"]]
    )
    def test_gives_exit_code_0(self, arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert "usage: hf-lossless-lr" in capsys.readouterr().out

    def test_lists_every_option_with_its_text(self, capsys):
        with pytest.raises(SystemExit):
            main(["compress", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for option in (*fields(CompressionOptions), *fields(CompressArguments)):
            assert f"--{option.name}" in text
            assert " ".join(option.metadata["help"].split()) in text, option.name

    def test_has_the_version(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["--version"])
        assert caught.value.code == 0
        assert capsys.readouterr().out == f"hf-lossless-lr {__version__}\n"


class TestDemo:
    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        monkeypatch.setattr("hf_lossless_lr.commands.demo.run_demo", lambda *arguments: calls.append(arguments))
        return calls

    @pytest.mark.parametrize("flag", ["--keep_ratio", "--keep-ratio"])
    def test_runs_in_the_folder_that_is_given(self, calls, tmp_path, flag):
        assert main(["demo", "--output", str(tmp_path / "deep" / "demo"), flag, "0.3"]) == 0
        assert calls == [(tmp_path / "deep" / "demo", 0.3)]
        assert (tmp_path / "deep" / "demo").is_dir()

    def test_runs_in_a_temporary_folder_that_is_removed(self, calls):
        assert main(["demo"]) == 0
        ((folder, keep_ratio),) = calls
        assert keep_ratio == KEEP_RATIO
        assert not folder.exists()

    def test_refuses_a_file_as_folder(self, calls, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        assert main(["demo", "--output", str(tmp_path / "file")]) == 1
        assert f"--output: {tmp_path / 'file'} is not a folder." in capsys.readouterr().err
        assert calls == []


class TestTable:
    def test_aligns_labels_numbers_and_ratios(self):
        table = comparison_table({"parameters": (12345678, 6172839), "loss": (0.5, 0.25), "accuracy": (None, None)})
        assert table.splitlines() == [
            "                     dense    compressed    ratio",
            "parameters      12,345,678     6,172,839    0.500",
            "loss                0.5000        0.2500    0.500",
            "accuracy                 -             -        -",
        ]

    def test_has_no_ratio_to_nothing(self):
        rows = comparison_table({"a": (0, 3), "b": (None, 2.0), "c": (2.0, None), "d": (2.0, 0.0)}).splitlines()
        assert [row.split()[-1] for row in rows[1:]] == ["-", "-", "-", "0.000"]
