"""Number formats: which there are, the grids of a matrix, rounding to them, and the bytes that hold the result.

Knows tensors only.
"""

from .grids import SHRINKS, Grid, decode, encode, search_grid, stored_grid
from .kinds import FLOAT, FORMATS, NumberFormat
from .rounding import free_variances, round_matrix

__all__ = [
    "FLOAT",
    "FORMATS",
    "SHRINKS",
    "Grid",
    "NumberFormat",
    "decode",
    "encode",
    "free_variances",
    "round_matrix",
    "search_grid",
    "stored_grid",
]
