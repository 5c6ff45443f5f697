"""Time of named stages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Seconds of named stages, added up.

    Args:
        seconds: what earlier stages took.

    Attributes:
        seconds: name of a stage to its seconds.
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds that the body takes to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
