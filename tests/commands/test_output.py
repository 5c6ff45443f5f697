"""The output of `compress`: found out about before the work, one run's at a time, and never left half done."""

import json
import os
import signal
import socket
import stat
import warnings
from pathlib import Path

import pytest
from support.tiny_models import TINY_MODELS
from support.word_tokenizer import WORDS, word_tokenizer

from hf_lossless_lr import files
from hf_lossless_lr.commands.cli import main
from hf_lossless_lr.commands.output import MARKER, claimed
from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.files import leftovers, replacing, temporary_name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    TINY_MODELS["bert-sequence-classification"]()[0].save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [{"sentence": f"{WORDS[n]} {WORDS[n // 2]}", "label": n % 3} for n in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def command(place):
    """The arguments of a run, but for its output."""
    return [
        *("compress", str(place / "model"), "--task", "text-classification", "--dataset", "json"),
        *("--data_files", str(place / "data.jsonl"), "--refit", "false", "--output"),
    ]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def no_work(*_, **__):
    pytest.fail("the work began")


def in_a_child(work):
    """Run work in a forked process, and return how that ended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(77)
    return os.waitpid(child, 0)[1]


def kill_in(monkeypatch, target, number):
    monkeypatch.setattr(target, lambda *_, **__: os.kill(os.getpid(), number))


PLACES = [
    "hf_lossless_lr.commands.compress.load_auto",
    "transformers.PreTrainedModel.save_pretrained",
    "hf_lossless_lr.commands.output.os.replace",
]


class TestSignals:
    @pytest.mark.parametrize("target", PLACES)
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_that_ask_to_stop_leave_nothing(self, number, target, command, out, monkeypatch, request):
        def stop(*_, **__):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # impatient

        before = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored
        request.addfinalizer(lambda: signal.signal(number, before))
        with monkeypatch.context() as patch:
            patch.setattr(target, stop)
            with pytest.raises(SystemExit) as caught:
                main([*command, str(out)])
        assert caught.value.code == 128 + number
        assert list(out.parent.iterdir()) == []
        assert signal.getsignal(number) is signal.SIG_DFL

    def test_that_are_ignored_stay_so(self, command, out, monkeypatch):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            kill_in(monkeypatch, "hf_lossless_lr.commands.compress.check_arguments", signal.SIGHUP)
            assert main([*command, str(out)]) == 0
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_that_kill_leave_what_the_next_run_removes(self, command, out, monkeypatch, tmp_path):
        stranger, mine = tmp_path / ".hf-lossless-lr-mine", tmp_path / temporary_name(tmp_path / "other")
        for folder in (stranger, mine):
            folder.mkdir()
        with monkeypatch.context() as patch:
            kill_in(patch, "hf_lossless_lr.commands.output.os.replace", signal.SIGKILL)
            assert in_a_child(lambda: main([*command, str(out)])) == signal.SIGKILL
        (left,) = leftovers(out)
        assert (left / "partial" / "model.safetensors").stat().st_size > 10_000
        unmarked = tmp_path / f"{left.name[:-12]}00000000.tmp"  # as if it were ours
        unmarked.mkdir()
        assert leftovers(out) == [left, unmarked] or leftovers(out) == [unmarked, left]
        assert main([*command, str(out)]) == 0
        assert set(tmp_path.iterdir()) == {out, stranger, mine, unmarked}

    def test_that_kill_while_a_file_is_replaced_leave_what_the_next_one_removes(self, out):
        out.write_text("old")

        def die():
            with replacing(out) as temporary:
                temporary.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)

        assert in_a_child(die) == signal.SIGKILL
        assert len(list(out.parent.iterdir())) == 2
        with replacing(out) as temporary:
            temporary.write_text("new")
        assert (out.read_text(), list(out.parent.iterdir())) == ("new", [out])


class TestLeftovers:
    def test_of_a_process_that_lives_are_kept(self, out, monkeypatch):
        kept = out.with_name(temporary_name(out))
        kept.touch()
        assert leftovers(out) == []
        again = kept.with_name(kept.name.replace(f"-{os.getpid()}-", "-999999999-"))
        again.touch()
        assert leftovers(out) == [again]
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        assert leftovers(out) == []

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="starts of processes are known on Linux alone")
    def test_of_a_process_whose_number_was_given_again_are_told(self):
        pid = os.getpid()
        assert not files.is_dead(pid, files._started(pid))
        assert files.is_dead(pid, "1")
        assert not files.is_dead(pid, "0")

    @pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", json.dumps({"output": "/another"})])
    def test_without_the_marker_of_this_output_are_kept(self, content, out):
        left = out.with_name(temporary_name(out).replace(f"-{os.getpid()}-", "-999999999-"))
        left.mkdir()
        if content is not None:
            (left / MARKER).write_text(content)
        with claimed(out):
            assert left.exists()
        (left / MARKER).write_text(json.dumps({"output": str(out)}))
        with claimed(out):
            assert not left.exists()


class TestTwoRuns:
    def test_into_one_output_do_not_both_begin(self, command, out, monkeypatch, capsys):
        with claimed(out):
            with monkeypatch.context() as patch:
                patch.setattr("hf_lossless_lr.commands.compress.load_auto", no_work)
                assert main([*command, str(out)]) == 1
            error = capsys.readouterr().err
            assert f"--output: {out} is being written by another run: process {os.getpid()} on " in error
            assert f"{socket.gethostname()}, since 20" in error
            assert main([*command, str(out.with_name("else"))]) == 0
        assert main([*command, str(out)]) == 0
        assert {path.name for path in out.parent.iterdir()} == {"out", "else"}

    def test_one_of_which_was_killed_are_one(self, out):
        def die():
            with claimed(out):
                os.kill(os.getpid(), signal.SIGKILL)

        assert in_a_child(die) == signal.SIGKILL
        with claimed(out) as claim:
            assert [path.name for path in claim.temporary.iterdir()] == [MARKER]
        assert list(out.parent.iterdir()) == []


def dangling(folder):
    (folder / "link").symlink_to(folder / "nowhere" / "else")
    return folder / "link"


def below_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "out"


IMPOSSIBLE = {
    "a link that leads nowhere": (dangling, r"exists already (a link that leads nowhere); choose another folder"),
    "a name too long": (lambda folder: folder / ("n" * 256), "File name too long"),
    "a folder's name too long": (lambda folder: folder / ("n" * 256) / "out", "File name too long"),
    "below a file": (below_a_file, ""),
    "a place without writing": (lambda _: Path("/proc/hf-lossless-lr/out"), "cannot be written: "),
    "a path too long": (lambda folder: folder.joinpath(*["n" * 200] * 25), "File name too long"),
}


@pytest.mark.parametrize("option", ["output", "json", "statistics"])
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_written_is_one_sentence_before_the_work(case, option, command, tmp_path, monkeypatch, capsys):
    make, message = IMPOSSIBLE[case]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("hf_lossless_lr.commands.compress.load_auto", no_work)
    arguments = [str(path)] if option == "output" else [str(tmp_path / "out"), f"--{option}", str(path)]
    assert main([*command, *arguments]) == 1
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith("hf-lossless-lr: error: ")
    assert option != "output" or message in shown.err
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_made_for_nothing_are_removed(command, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lossless_lr.commands.output.hold_lock", lambda *_: exec("raise OSError('no locks')"))
    assert main([*command, str(tmp_path / "a" / "b" / "out")]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o027, 0o750), (0o002, 0o775), (0o077, 0o700)])
def test_modes_follow_the_umask(mask, mode, command, out):
    before = os.umask(mask)
    try:
        assert main([*command, str(out), "--statistics", str(out.with_name("statistics"))]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == mode
    written = [*(path for path in out.rglob("*") if path.is_file()), out.with_name("statistics")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {mode & 0o666}
    assert out / "model.safetensors" in written


def test_everything_is_on_the_disk_before_it_has_its_name(command, out, monkeypatch):
    synced, log, fsync, put = set(), [], os.fsync, os.replace

    def note(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def replace(source, target):
        parts = [str(path) for path in (Path(source), *Path(source).rglob("*"))]
        log.append([part for part in parts if part not in synced])
        put(source, target)
        synced.discard(str(Path(target).parent))

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", replace)
    assert main([*command, str(out), "--json", str(out.with_name("report.json"))]) == 0
    assert len(log) >= 2
    assert log == [[]] * len(log)
    assert str(out.parent) in synced


def test_a_claim_says_whose_it_is(out):
    with claimed(out) as claim:
        who = json.loads((claim.temporary / MARKER).read_text())
        assert (who["pid"], who["host"], who["output"]) == (os.getpid(), socket.gethostname(), str(out))
        with pytest.raises(ConfigurationError, match="is being written by another run"), claimed(out):
            pass
    assert list(out.parent.iterdir()) == []
