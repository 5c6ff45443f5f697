"""`hf-lossless-lr report`, and what `compress` says about its verdict."""

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import compressions
from support.reports import REPORT, certified, uncertified
from support.tiny_models import TINY_MODELS
from support.word_tokenizer import WORDS, word_tokenizer

from hf_lossless_lr import CompressionReport
from hf_lossless_lr.commands.cli import main
from hf_lossless_lr.report.figures import figures
from hf_lossless_lr.report.records import REPORT_NAME, Difference
from hf_lossless_lr.report.sentence import verdict_sentence
from hf_lossless_lr.report.tables import comparison_table, report_rows


@pytest.fixture
def folder(tmp_path):
    REPORT.save(tmp_path)
    return tmp_path


class TestReport:
    @pytest.mark.parametrize("report", [REPORT, certified(status="inconclusive"), uncertified("it rained")])
    def test_shows_the_table_and_the_verdict(self, report, tmp_path, capsys):
        report.save(tmp_path)
        assert main(["report", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{comparison_table(report_rows(report))}\n{verdict_sentence(report)}\n"
        assert [path.name for path in tmp_path.iterdir()] == [REPORT_NAME]

    def test_writes_figures_into_the_folder(self, folder, capsys):
        assert main(["report", str(folder), "--plots"]) == 0
        names = [f"{name}.png" for name in figures(REPORT)]
        assert sorted(path.name for path in (folder / "figures").iterdir()) == sorted(names)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("written")] == [
            f"written: {folder / 'figures' / name}" for name in names
        ]
        assert lines[-1] == verdict_sentence(REPORT)

    def test_writes_figures_elsewhere_if_asked(self, folder, capsys):
        assert main(["report", str(folder), "--plots", str(folder / "else" / "where")]) == 0
        assert (folder / "else" / "where" / "rank_per_layer.png").exists()
        assert not (folder / "figures").exists()

    def test_does_not_write_figures_into_a_file(self, folder, capsys):
        assert main(["report", str(folder), "--plots", str(folder / REPORT_NAME)]) == 1
        shown = capsys.readouterr()
        assert f"--plots: {folder / REPORT_NAME} is no folder." in shown.err
        assert not shown.out

    def test_does_not_write_figures_through_a_link(self, folder, tmp_path_factory, capsys):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        (folder / "figures").symlink_to(elsewhere)
        assert main(["report", str(folder), "--plots"]) == 1
        assert "figures is a link, which figures are not written through; name a folder." in capsys.readouterr().err
        assert list(elsewhere.iterdir()) == []
        assert main(["report", str(folder), "--plots", str(folder / "figures")]) == 0  # named by the user

    def test_without_matplotlib_says_how_to_get_it(self, folder, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["report", str(folder)]) == 0
        assert main(["report", str(folder), "--plots"]) == 1
        assert "error: figures need matplotlib: pip install hf-lossless-lr[plots]." in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "error: {folder} has no compression_report.json, which a checkpoint has that this package"),
            (b"\xff\xfe", "error: {folder}/compression_report.json cannot be read"),
            (b"{}", "error: {folder}/compression_report.json: this is no compression report"),
        ],
    )
    def test_of_a_folder_without_one_is_an_error(self, content, message, tmp_path, capsys):
        assert main(["report", str(tmp_path / "nowhere")]) == 1
        assert f"error: there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
        if content is not None:
            (tmp_path / REPORT_NAME).write_bytes(content)
        assert main(["report", str(tmp_path)]) == 1
        shown, message = capsys.readouterr(), message.format(folder=tmp_path)
        assert message in shown.err
        assert shown.out == ""


def paths_in(data, path=()):
    """Every place in JSON."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from paths_in(value, (*path, key))


JUNK = (
    *(None, True, -1, 0, 1, 10**40, 1e308, -1e-320, float("nan"), float("inf"), "", "\x1b[2J", "$\\frac{$"),
    *("\ud800", [], {}, [[]], {"a": None}, "x" * 5000),
)


def fuzzed(seed):
    """A report as text, changed at random: values, entries that are dropped or doubled, bytes."""
    drawn = random.Random(seed)
    data = json.loads(certified(status=drawn.choice(("lossless", "inconclusive"))).to_json())
    for _ in range(drawn.randint(1, 4)):
        *way, last = drawn.choice(list(paths_in(data)))
        place = data
        for key in way:
            place = place[key]
        if drawn.random() < 0.2:
            del place[last]
        elif isinstance(place, dict) and drawn.random() < 0.3:
            place[drawn.choice([name for name in JUNK if isinstance(name, str)])] = place.pop(last)
        else:
            place[last] = drawn.choice(JUNK)
    text = json.dumps(data).encode()
    if drawn.random() < 0.2:
        position = drawn.randrange(len(text))
        text = drawn.choice((text[:position], text[:position] + bytes([drawn.randrange(256)]) + text[position + 1 :]))
    return text


class TestFuzz:
    def test_of_200_reports_gives_no_traceback_and_drives_no_terminal(self, tmp_path, capsys):
        codes = []
        for seed in range(200):
            (tmp_path / REPORT_NAME).write_bytes(fuzzed(seed))
            codes.append(main(["report", str(tmp_path)]))
            shown = capsys.readouterr()
            assert (shown.err.count("\n") == 1) == (codes[-1] == 1), shown.err
            assert all(c.isprintable() or c.isspace() for c in shown.out + shown.err)
        assert set(codes) == {0, 1}
        assert codes.count(0) > 8

    @pytest.mark.slow
    def test_of_those_that_can_be_read_can_be_drawn(self, tmp_path, capsys):
        drawn = 0
        for seed in range(500):
            (tmp_path / REPORT_NAME).write_bytes(fuzzed(seed))
            drawn += main(["report", str(tmp_path), "--plots"]) == 0
            if drawn == 5:
                break
        assert drawn == 5


def edited(folder, **changes):
    data = json.loads((folder / REPORT_NAME).read_text()) | changes
    (folder / REPORT_NAME).write_text(json.dumps(data))


def noise(folder):
    """Every second factor becomes noise of its own size, which is finite and of the right shape."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("up.weight")][::2]:
        tensors[name] = tensors[name].std() * torch.randn(tensors[name].shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TestWeights:
    """A report is about the weights that were measured."""

    @pytest.fixture(params=["bert-sequence-classification", "bert-masked-lm", "gpt2", "t5", "resnet"])
    def checkpoint(self, request, tmp_path):
        model, batch = TINY_MODELS[request.param](12)
        model = compressions.compress(model, batch)[0]
        model.save_pretrained(tmp_path / "out", max_shard_size="20KB" if request.param == "gpt2" else "1GB")
        return tmp_path / "out"

    def test_that_are_its_own_are_passed_over_in_silence(self, checkpoint, capsys):
        report = CompressionReport.from_json((checkpoint / REPORT_NAME).read_text())
        assert f"`{report.compressed_fingerprint}`" in (checkpoint / "README.md").read_text()
        assert main(["report", str(checkpoint)]) == 0
        shown = capsys.readouterr()
        assert shown.out.splitlines()[-1] == verdict_sentence(report)
        assert "hf-lossless-lr:" not in shown.err

    @pytest.mark.parametrize("checkpoint", ["bert-sequence-classification", "t5"], indirect=True)
    def test_that_are_others_are_refused(self, checkpoint, capsys):
        noise(checkpoint)
        assert main(["report", str(checkpoint)]) == 1
        shown = capsys.readouterr()
        assert f"error: the weights in {checkpoint} are not those that its report is about" in shown.err
        assert shown.out == ""

    @pytest.mark.parametrize("checkpoint", ["bert-sequence-classification"], indirect=True)
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"compressed_fingerprint": None}, "the report does not say which weights it is about"),
            ({"compressed_fingerprint": "0" * 64, "model": "MyModel"}, "MyModel is no class of Transformers, so the"),
        ],
    )
    def test_that_cannot_be_told_are_said_to_be_so(self, changes, message, checkpoint, capsys):
        edited(checkpoint, **changes)
        assert main(["report", str(checkpoint)]) == 0
        assert f"hf-lossless-lr: {message}" in capsys.readouterr().err

    @pytest.mark.parametrize("checkpoint", ["bert-sequence-classification"], indirect=True)
    def test_that_were_cut_off_are_one_sentence(self, checkpoint, capsys):
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        assert main(["report", str(checkpoint)]) == 1
        assert capsys.readouterr().err.startswith(f"hf-lossless-lr: error: cannot read the weights in {checkpoint}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    TINY_MODELS["bert-sequence-classification"]()[0].save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for name, start, count in (("train", 0, 24), ("validation", 50, 40)):
        rows = [
            {"sentence": " ".join(random.Random(n).choices(WORDS, k=8)), "label": n % 3}
            for n in range(start, start + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def compress(place, tmp_path, monkeypatch):
    """Run `compress` with more arguments, and let the certificate come to a given status."""

    def run(status, *arguments):
        from hf_lossless_lr.pipeline import summary as reporting

        certify = reporting.certify

        def decide(*args, **kwargs):
            found = replace(certify(*args, **kwargs), status=status, reasons=("it rained",))
            if status == "improved":
                better = Difference(-0.2, -0.3, -0.1)
                found = replace(found, loss_increase=better, tempered_loss_increase=better)
            return found

        monkeypatch.setattr(reporting, "certify", decide)
        data = ["--data_files", str(place / "train.jsonl"), "--eval_data_files", str(place / "validation.jsonl")]
        command = ["compress", str(place / "model"), "--task", "text-classification", "--dataset", "json", *data]
        options = ["--refit", "False", "--loss_margin", "10", "--accuracy_margin", "1"]
        return main([*command, *options, "--output", str(tmp_path / "out"), *arguments])

    return run


class TestRequire:
    @pytest.mark.parametrize(
        ("status", "required", "code"),
        [
            ("improved", "improved", 0),
            ("improved", "lossless", 0),
            ("lossless", "lossless", 0),
            ("lossless", "improved", 4),
            ("inconclusive", "lossless", 4),
            ("inconclusive", "improved", 4),
        ],
    )
    def test_gives_the_exit_code_and_writes_the_checkpoint_anyway(
        self, status, required, code, compress, tmp_path, capsys
    ):
        assert compress(status, "--require", required) == code
        report = CompressionReport.from_json((tmp_path / "out" / REPORT_NAME).read_text())
        assert report.certificate.status == status
        assert (tmp_path / "out" / "model.safetensors").exists()
        shown = capsys.readouterr()
        assert shown.out.splitlines()[-1] == verdict_sentence(report)
        message = f"the verdict is {status}, not {required}; {tmp_path / 'out'} is written all the same\n"
        assert (f"hf-lossless-lr: {message}" in shown.err) == (code == 4)

    def test_is_not_met_without_a_certificate(self, compress, tmp_path, capsys):
        assert compress("lossless", "--require", "lossless", "--eval_examples", "20") == 4
        assert "the verdict is none, not lossless" in capsys.readouterr().err

    def test_left_out_asks_for_nothing(self, compress, tmp_path, capsys):
        assert compress("inconclusive") == 0
        assert "the verdict is" not in capsys.readouterr().err

    def test_does_not_know_other_words(self, compress, tmp_path):
        with pytest.raises(SystemExit) as caught:
            compress("lossless", "--require", "perfect")
        assert caught.value.code == 2
        assert not (tmp_path / "out").exists()


def test_compress_writes_the_card_with_its_verdict(compress, tmp_path):
    assert compress("lossless") == 0
    report = CompressionReport.from_json((tmp_path / "out" / REPORT_NAME).read_text())
    assert verdict_sentence(report) in (tmp_path / "out" / "README.md").read_text()


class TestWeightsThatAreNotWhereTheyUsuallyAre:
    @pytest.fixture
    def saved(self, tmp_path):
        model, _ = compressions.compressed("bert-sequence-classification")
        model.save_pretrained(tmp_path)
        return model, tmp_path

    def test_an_index_of_before_does_not_count(self, saved, capsys):
        model, folder = saved
        model.save_pretrained(folder, max_shard_size="20KB")
        model.save_pretrained(folder)
        index = {"weight_map": {"x": "model-00001-of-00003.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert main(["report", str(folder)]) == 0
        assert "cannot read" not in capsys.readouterr().err

    def test_of_a_variant_are_said_not_to_be_compared(self, saved, capsys):
        _, folder = saved
        (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
        assert main(["report", str(folder)]) == 0
        assert "was not compared" in "".join(capsys.readouterr())
