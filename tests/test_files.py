"""Files that are replaced as a whole."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lossless_lr.files import replacing, write_atomically

FAILURES = {
    "the disk is full": ("os.replace", OSError(errno.ENOSPC, "broken on purpose")),
    "it is interrupted": ("os.replace", KeyboardInterrupt("broken on purpose")),
    "the mode cannot be set": ("os.chmod", OSError(errno.EPERM, "broken on purpose")),
}


class TestWriting:
    def test_replaces_the_old_content(self, tmp_path):
        path = tmp_path / "file.json"
        path.write_text("old and longer")
        assert write_atomically(path, "new") == path
        assert path.read_text() == "new"
        assert list(tmp_path.iterdir()) == [path]

    def test_takes_a_path_as_text(self, tmp_path):
        assert write_atomically(str(tmp_path / "a"), "é").read_bytes() == "é".encode()

    @pytest.mark.parametrize("case", FAILURES)
    def test_that_fails_keeps_the_old_content_and_leaves_nothing_behind(self, case, tmp_path, monkeypatch):
        target, error = FAILURES[case]

        def fail(*_):
            raise error

        path = tmp_path / "file.json"
        path.write_text("old")
        monkeypatch.setattr(target, fail)
        with pytest.raises(type(error), match="broken on purpose"):
            write_atomically(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_of_text_that_cannot_be_encoded_keeps_the_old_content(self, tmp_path):
        path = tmp_path / "file.json"
        path.write_text("old")
        with pytest.raises(UnicodeEncodeError):
            write_atomically(path, "new \ud800")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_is_never_seen_half_done(self, tmp_path, monkeypatch):
        path, seen = tmp_path / "file.json", []
        path.write_text("old")
        replace_file = os.replace

        def spy(source, target):
            seen.append((path.read_text(), Path(source).read_text()))
            replace_file(source, target)

        monkeypatch.setattr("os.replace", spy)
        write_atomically(path, "new")
        assert seen == [("old", "new")]

    def test_into_a_folder_that_does_not_exist_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            write_atomically(tmp_path / "nowhere" / "file", "new")

    def test_gives_the_file_the_mode_of_any_other(self, tmp_path):
        plain = tmp_path / "plain"
        plain.write_text("")
        path = write_atomically(tmp_path / "file", "new")
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

    @pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
    def test_keeps_the_mode_of_the_file_that_it_replaces(self, mode, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        path.chmod(mode)
        with replacing(path) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            temporary.write_text("new")
        assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)

    @pytest.mark.parametrize("exists", [True, False])
    def test_through_a_link_replaces_what_it_leads_to(self, exists, tmp_path):
        target, link = tmp_path / "folder" / "target", tmp_path / "link"
        target.parent.mkdir()
        if exists:
            target.write_text("old")
        link.symlink_to("folder/target")
        assert write_atomically(link, "new") == link
        assert link.is_symlink()
        assert target.read_text() == "new"
        assert sorted(tmp_path.rglob("*")) == [target.parent, target, link]

    def test_into_a_pipe_goes_through_it(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            write_atomically(pipe, "new")
            assert os.read(reader, 99) == b"new"
        finally:
            os.close(reader)
        assert pipe.is_fifo()
        assert list(tmp_path.iterdir()) == [pipe]

    def test_takes_a_name_as_long_as_the_file_system_allows(self, tmp_path):
        path = tmp_path / ("n" * 255)
        assert write_atomically(path, "new").read_text() == "new"
        assert list(tmp_path.iterdir()) == [path]

    def test_to_the_standard_output_of_a_process_prints(self):
        code = "from hf_lossless_lr.files import write_atomically; write_atomically('/dev/stdout', 'new')"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (process.stdout, process.stderr) == ("new", "")
        assert Path("/dev/stdout").is_symlink()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_by_a_body_that_fails_keeps_the_old_content(self, error, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")

        def write_half():
            with replacing(path) as temporary:
                temporary.write_text("half")
                raise error("broken on purpose")

        with pytest.raises(error, match="broken on purpose"):
            write_half()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
