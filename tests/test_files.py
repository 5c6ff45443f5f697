"""Files that are replaced as a whole."""

import errno
import os
import stat
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
