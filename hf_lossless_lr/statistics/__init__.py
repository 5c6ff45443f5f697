"""Passes over the data with hooks: G, A and B of every target, summed and counted, reduced once over processes.

Also forward passes that wait at a layer, for the refit.
"""

from .collector import collect_statistics, data_fingerprint
from .records import CalibrationStatistics, LayerStatistics
from .rows import gram, real_rows
from .store import load_statistics, save_statistics
from .streams import Group, Pause, Stream, pausing

__all__ = [
    "CalibrationStatistics",
    "Group",
    "LayerStatistics",
    "Pause",
    "Stream",
    "collect_statistics",
    "data_fingerprint",
    "gram",
    "load_statistics",
    "pausing",
    "real_rows",
    "save_statistics",
]
