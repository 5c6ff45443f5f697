"""`hf-lossless-lr report`, and what `compress` says about its verdict."""

import json
import random
import sys
from dataclasses import replace

import pytest
from support.reports import REPORT, certified, uncertified
from support.tiny_models import TINY_MODELS
from support.word_tokenizer import WORDS, word_tokenizer

from hf_lossless_lr import CompressionReport
from hf_lossless_lr.commands.cli import main
from hf_lossless_lr.report.figures import figures
from hf_lossless_lr.report.records import REPORT_NAME
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

    def test_without_matplotlib_says_how_to_get_it(self, folder, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["report", str(folder)]) == 0
        assert main(["report", str(folder), "--plots"]) == 1
        assert "error: figures need matplotlib: pip install hf-lossless-lr[plots]." in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "error: cannot read compression_report.json in"),
            (b"\xff\xfe", "error: cannot read compression_report.json in"),
            (b"{}", "error: this is no compression report"),
        ],
    )
    def test_of_a_folder_without_one_is_an_error(self, content, message, tmp_path, capsys):
        if content is not None:
            (tmp_path / REPORT_NAME).write_bytes(content)
        assert main(["report", str(tmp_path)]) == 1
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.out == ""


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
            return replace(certify(*args, **kwargs), status=status, reasons=("it rained",))

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
