"""What a calibration was planned to take."""

from __future__ import annotations

from dataclasses import dataclass

UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


@dataclass(frozen=True)
class MemoryPlan:
    """How a calibration keeps within its memory.

    Attributes:
        limit: bytes that a process may have.
        expected: bytes that it was expected to have at most.
        passes: passes over the calibration data, each for a window of layers.
        disk: bytes of statistics and factors on disk; 0 where they stay in memory.
        seconds: expected time of the passes; None where nothing was measured.
        refit_batches: how many batches of a process the refit takes, and of how many; None for all of them.
        recomputes: whether blocks run again in the backward passes, rather than keep what they computed.
    """

    limit: int
    expected: int
    passes: int
    disk: int
    seconds: float | None = None
    refit_batches: tuple[int, int] | None = None
    recomputes: bool = False

    @property
    def fits(self) -> bool:
        """Whether nothing has to give way: all of it fits into memory at once, with all batches of a refit."""
        return self.seconds is None and self.refit_batches is None

    @property
    def sentence(self) -> str:
        """The plan in words."""
        where = f"statistics and factors on disk ({readable_size(self.disk)})" if self.disk else "all of it in memory"
        time = "" if self.seconds is None else f", about {self.seconds / 60:.1f} minutes for the passes"
        passes = f"{self.passes} {'pass' if self.passes == 1 else 'passes'} over the data"
        passes += " with gradient checkpointing" if self.recomputes else ""
        refit = ""
        if self.refit_batches is not None:
            refit = "; the refit takes the first {} of {} batches".format(*self.refit_batches)
        more = " (which is less: give more, or a smaller batch_size)" if self.expected > self.limit else ""
        expected, limit = readable_size(self.expected), readable_size(self.limit)
        return f"calibration in {passes}, {where}; {expected} of memory expected, {limit} allowed{more}{time}{refit}"


def readable_size(size: float) -> str:
    """Return a number of bytes as text."""
    unit = next((unit for unit, count in UNITS.items() if abs(size) >= count / 16), "GiB")
    return f"{size / UNITS[unit]:.2f} {unit}"
