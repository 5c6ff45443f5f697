"""The folder of a calibration that does not stay in memory, or is to be resumed: a journal of what is finished."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import ConfigurationError
from ..files import hold_lock, is_temporary, write_atomically
from ..statistics import Shelf

JOURNAL = "journal.json"


class Workspace:
    """A folder for statistics and factors, which belongs to one run at a time.

    Attributes:
        shelf: what is in it.
        stays: whether it is there after this run, and whatever ends it.

    Args:
        folder: the folder; None for one that is removed at the end.
        accelerator: the processes, of which the main one makes the folder.
        inputs: what the results depend on: fingerprints and options.

    Raises:
        ConfigurationError: if another run has the folder, it cannot be written, or has results for other inputs.
    """

    def __init__(self, folder: Path | None, accelerator: Accelerator, inputs: Mapping[str, Any]) -> None:
        self._undo, self.stays = ExitStack(), folder is not None
        answer: list[Any] = [None, None]
        if accelerator.is_main_process:
            try:
                answer = [str(self._make(folder, inputs)), None]
            except ConfigurationError as error:
                answer = [None, str(error)]
            except OSError as error:
                answer = [None, f"work_dir: {folder} cannot be written: {error.strerror or error}."]
        broadcast_object_list(answer)
        if answer[1] is not None:
            self.close()
            raise ConfigurationError(answer[1])
        self.shelf = Shelf(Path(answer[0]))

    def close(self) -> None:
        """Let go of the folder, and remove it if it is temporary."""
        self._undo.close()

    def _make(self, folder: Path | None, inputs: Mapping[str, Any]) -> Path:
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="hf-lossless-lr-", ignore_cleanup_errors=True)
            self._undo.callback(temporary.cleanup)
            return Path(temporary.name)
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        hold_lock(folder, f"work_dir: {folder} is in use by another run", self._undo)
        journal, present = folder / JOURNAL, json.loads(json.dumps(dict(inputs)))
        if journal.exists():
            try:
                before = json.loads(journal.read_text(encoding="utf-8"))
                changed = [name for name in present if before.get(name) != present[name]]
            except (ValueError, AttributeError):
                raise ConfigurationError(f"work_dir: {journal} is damaged. Remove {folder}, and run again.") from None
            if changed:
                raise ConfigurationError(
                    f"work_dir: {folder} has results for other inputs; what changed: {', '.join(changed)}. "
                    "Choose another folder, or remove it."
                )
        elif any(not is_temporary(path) for path in folder.iterdir()):  # one may be left of a run that was killed here
            raise ConfigurationError(f"work_dir: {folder} has other files. Choose another folder.")
        write_atomically(journal, json.dumps(present, indent=2, sort_keys=True) + "\n")
        return folder
