"""The number formats by name: bits of a code, which columns share a scale, and the tensors that a matrix becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .packing import packed_width

FLOAT = "float"
"""Name of the format in which a matrix stays what it is."""


@dataclass(frozen=True)
class NumberFormat:
    """Integers of a few bits on a grid `scale · (code − zero)`, one grid for each group of columns of a row.

    The scale is a bfloat16 number, and the zero one of the codes. Their bytes lie in integer tensors, which a cast of
    the model does not touch.

    Attributes:
        bits: bits of a code.
        group: columns that share a grid; None for all of a row.
        symmetric: whether the grid is symmetric about 0, with signed codes and no zero.
        pivots: whether pivoted factors stand it: errors of the pivots pass into all that is computed from them.
    """

    bits: int
    group: int | None
    symmetric: bool
    pivots: bool

    @property
    def lowest(self) -> int:
        """Lowest code."""
        return -self.highest if self.symmetric else 0

    @property
    def highest(self) -> int:
        """Highest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def groups(self, columns: int) -> int:
        """Return the number of groups of a row."""
        return 1 if self.group is None else -(-columns // self.group)

    def width(self, columns: int) -> int:
        """Return the columns of a group."""
        return columns if self.group is None else self.group

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the tensors that a matrix becomes: name to shape and dtype."""
        groups = self.groups(columns)
        if self.symmetric:
            return {"codes": ((rows, columns), torch.int8), "scale": ((rows, groups), torch.int16)}
        return {
            "codes": ((rows, packed_width(columns, self.bits)), torch.uint8),
            "scale": ((rows, groups), torch.int16),
            "zero": ((rows, packed_width(groups, self.bits)), torch.uint8),
        }

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of those tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors(rows, columns).values())


FORMATS = {
    "int8": NumberFormat(bits=8, group=None, symmetric=True, pivots=True),
    **{f"int{bits}": NumberFormat(bits, group=64, symmetric=False, pivots=False) for bits in (6, 5, 4, 3)},
}
"""Name to format, finest first."""
