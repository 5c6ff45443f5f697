"""Writing files so that readers see the old content or the whole new one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the body another file to write, which then takes the place of `path` at once; not after an exception.

    Args:
        path: the file; its directory exists.

    Yields:
        An empty file in the same directory, which is removed if the body fails.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600; a report is as public as its checkpoint
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
