"""Writing files so that readers see the old content or the whole new one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the body another file to write, which then takes the place of `path` at once; not after an exception.

    A link stays, and what it leads to is replaced. A replaced file keeps its mode.

    Args:
        path: the file; its directory exists.

    Yields:
        An empty file in the same directory, which is removed if the body fails; `path` itself if that is a pipe, a
        terminal or another thing with no content to replace.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        yield path
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".hf-lossless-lr-{secrets.token_hex(8)}.tmp")  # short, for names as long as allowed
    # Unlike those of `tempfile`, a new file is as public as any other; until it is complete, a replaced one is not.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else 0o600))
    try:
        yield temporary
        if mode is not None:
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, path)
    finally:  # also after an interrupt
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file as a whole.

    Args:
        path: the file; its directory exists.
        text: the content.

    Returns:
        The path.

    Raises:
        OSError: if the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)
