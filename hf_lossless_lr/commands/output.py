"""The output of a run: claimed before the work, by one run at a time, and written as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list

from ..errors import ConfigurationError, LosslessLowRankError
from ..files import hold_lock, leftovers, sync, temporary_name, this_run
from ..processes import joined_processes

MARKER = "owner.json"
"""File in a temporary folder that says which process made it, and for what; without it, the folder is not ours."""


class Claim:
    """An output that belongs to this run.

    Attributes:
        output: the folder to be.
        temporary: folder beside it for what is not complete.
    """

    def __init__(self, output: Path, temporary: Path) -> None:
        self.output, self.temporary = output, temporary

    def write(self, save: Callable[[Path], None]) -> None:
        """Write the output.

        Args:
            save: writes everything into the folder that it gets.

        Raises:
            OSError: if something cannot be written; then there is no output.
            LosslessLowRankError: as `save` raises it.
        """
        partial = self.temporary / "partial"
        partial.mkdir()
        probe = self.temporary / "probe"
        probe.touch()
        try:
            save(partial)
        except (OSError, LosslessLowRankError):
            raise
        except Exception as error:  # libraries in Rust have one for all
            raise OSError(f"{self.output} cannot be written: {error}") from error
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_file():
                path.chmod(probe.stat().st_mode)  # as any other new file; safetensors has its own ideas
            sync(path)
        sync(partial)
        os.replace(partial, self.output)
        sync(self.output.parent)


@contextmanager
def claimed(output: Path) -> Iterator[Claim | None]:
    """Take an output for this run, and find out whether it can be written, before any work.

    Args:
        output: the folder to be.

    Yields:
        The claim on the main process, None on others.

    Raises:
        ConfigurationError: if the output exists, cannot be written, or belongs to another run.
    """
    processes = joined_processes()
    with ExitStack() as undo:
        problem: list[str | None] = [None]
        claim = None
        if processes.is_main_process:
            try:
                claim = _take(output, undo)
            except LosslessLowRankError as error:
                problem = [str(error)]
            except OSError as error:
                problem = [f"--output: {output} cannot be written: {error.strerror or error}."]
        if processes.num_processes > 1:
            broadcast_object_list(problem)
        if problem[0] is not None:
            raise ConfigurationError(problem[0])
        yield claim


def _take(output: Path, undo: ExitStack) -> Claim:
    if os.path.lexists(output):
        broken = "" if output.exists() else " (a link that leads nowhere)"
        raise ConfigurationError(f"--output: {output} exists already{broken}; choose another folder or remove it.")
    output = output.absolute()
    for parent in reversed(output.parents):
        if not parent.is_dir():
            parent.mkdir(exist_ok=True)
            undo.callback(_remove_if_empty, parent)
    hold_lock(output, f"--output: {output} is being written by another run", undo)
    output.mkdir()  # its name can be too long, for one
    output.rmdir()
    for other in leftovers(output):
        if _is_ours(other, output):
            shutil.rmtree(other, ignore_errors=True)
    temporary = output.with_name(temporary_name(output))
    undo.callback(shutil.rmtree, temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    (temporary / MARKER).write_text(json.dumps(this_run(output)), encoding="utf-8")
    sync(temporary / MARKER)
    return Claim(output, temporary)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # something is in it
        return


def _is_ours(folder: Path, output: Path) -> bool:
    """Return whether a folder has our marker, for this output."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return bool(json.loads((folder / MARKER).read_text(encoding="utf-8"))["output"] == str(output))
    except (OSError, ValueError, KeyError, TypeError):
        return False
