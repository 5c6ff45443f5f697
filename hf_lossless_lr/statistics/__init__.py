"""Passes over the data with hooks: G, A and B of every target, summed and counted, reduced once over processes.

Also forward passes that wait at a layer, for the refit.
"""

from .collect import collect_statistics, data_fingerprint
from .pooling import with_pooled
from .recomputing import can_recompute
from .records import CalibrationStatistics, Key, LayerStatistics
from .residuals import Residual, find_residuals
from .rows import LARGE, gram, precision_of, real_rows
from .shelf import Shelf, Shelved
from .store import load_statistics, save_statistics
from .streams import Group, Pause, Rows, Stream, Watch, paired_streams, pausing, rows_of
from .windows import collect_in_windows

__all__ = [
    "LARGE",
    "CalibrationStatistics",
    "Group",
    "Key",
    "LayerStatistics",
    "Pause",
    "Residual",
    "Rows",
    "Shelf",
    "Shelved",
    "Stream",
    "Watch",
    "can_recompute",
    "collect_in_windows",
    "collect_statistics",
    "data_fingerprint",
    "find_residuals",
    "gram",
    "load_statistics",
    "paired_streams",
    "pausing",
    "precision_of",
    "real_rows",
    "rows_of",
    "save_statistics",
    "with_pooled",
]
