"""Writing files so that readers see the old content or the whole new one, also after a crash; one run at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .errors import ConfigurationError

PREFIX = ".hf-lossless-lr-"
"""How the name of each temporary file or folder begins, which stands beside what it will become."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the body another file to write, which then takes the place of `path` at once; not after an exception.

    A link stays, and what it leads to is replaced. A replaced file keeps its mode, a new one has that of any other.
    The content is on the disk before it counts as written. What a killed process left behind is removed.

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
    own = temporary_name(path)
    for other in leftovers(path):
        if other.is_file() and not other.is_symlink():
            other.unlink(missing_ok=True)
    temporary = path.with_name(own)
    # Unlike those of `tempfile`, a new file is as public as any other; until it is complete, a replaced one is not.
    file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else 0o600)
    try:
        mode = os.fstat(file).st_mode if mode is None else mode
        os.close(file)
        yield temporary
        sync(temporary)
        if stat.S_IMODE(temporary.stat().st_mode) != stat.S_IMODE(mode):
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, path)
        sync(path.parent)
    finally:  # also after an interrupt
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    Args:
        path: the file or folder.

    Raises:
        OSError: if the disk has no room for it, or is broken.
    """
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # file systems without it
            raise
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Find out whether a file could be written, by writing another one beside it.

    Args:
        path: the file; if it is there already, it is not touched.

    Raises:
        OSError: if it could not.
    """
    path = Path(os.path.realpath(path))
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return
    except FileNotFoundError:  # but not: its name is too long
        pass
    probe = path.with_name(temporary_name(path))
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    probe.unlink()


def temporary_name(path: Path) -> str:
    """Return a new name that says what it stands for and which process made it; short, for any file system."""
    pid = os.getpid()
    return f"{PREFIX}{_key(path.name)}-{_key(socket.gethostname())}-{pid}-{_started(pid)}-{secrets.token_hex(4)}.tmp"


def is_temporary(path: Path) -> bool:
    """Return whether a file has a name from `temporary_name` or `lock_name`."""
    return path.name.startswith(PREFIX)


def lock_name(path: Path) -> str:
    """Return the name of the lock of a path."""
    return f"{PREFIX}{_key(path.name)}.lock"


def hold_lock(path: Path, problem: str, undo: ExitStack) -> None:
    """Hold the lock beside a path to the end of the run; the system lets go of it even if the process is killed.

    Args:
        path: what is locked; its directory exists.
        problem: what it means that another run has it.
        undo: lets go of it.

    Raises:
        ConfigurationError: if another run has it.
    """
    place = path.with_name(lock_name(path))
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        undo.callback(os.close, handle)
        if not _try_lock(handle):
            raise ConfigurationError(f"{problem}: {_holder(place)}.")
        try:
            if os.path.samestat(os.fstat(handle), place.stat()):
                break
        except FileNotFoundError:
            pass  # the last holder has just removed it
    undo.callback(place.unlink, missing_ok=True)
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(this_run(path)).encode())


def this_run(path: Path) -> dict[str, Any]:
    """Return which process writes a path, and since when."""
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "output": str(path)}


def _try_lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "one that has just begun"


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files and folders beside a path that stand for it, and whose process is dead.

    Args:
        path: what they stand for.

    Returns:
        Those of this machine: of another one's processes nobody can tell here.
    """
    found = []
    for other in path.parent.glob(f"{PREFIX}{_key(path.name)}-{_key(socket.gethostname())}-*.tmp"):
        parts = other.name.removesuffix(".tmp").split("-")
        if len(parts) == 8 and parts[5].isdigit() and is_dead(int(parts[5]), parts[6]):
            found.append(other)
    return found


def is_dead(pid: int, started: str) -> bool:
    """Return whether a process of this machine has ended, although another may have its number by now.

    Args:
        pid: its number.
        started: when it was started, as in `temporary_name`.

    Returns:
        Whether it certainly has.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's, or no number of a process
        return False
    return "0" not in (started, _started(pid)) and _started(pid) != started


def _started(pid: int) -> str:
    """Return the start of a process in the clock ticks of Linux; 0 where it is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"


def _key(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:12]


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
