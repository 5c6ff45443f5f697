"""What a layer receives and returns, as the rows of its matrices, and the products of these."""

from __future__ import annotations

import torch

SLABS = 4  # column slabs of a Gram matrix


def real_rows(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the rows that the mask keeps, flattened, in float32, matrix by matrix.

    Args:
        rows: what a layout gives.  # shape: (..., groups, features)
        mask: which of the leading rows count, or None for all.  # shape: (rows,)

    Returns:
        The rows.  # shape: (groups, rows, features)
    """
    rows = rows.flatten(0, -3)
    return (rows if mask is None else rows[mask]).float().movedim(-2, 0)


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Return `XᵀX`, of which only the part above the diagonal is computed (in slabs of columns) and then mirrored.

    So the result is symmetric bit for bit, whatever order the processor's matrix product sums in.

    Args:
        rows: X.  # shape: (..., rows, features)

    Returns:
        The symmetric product, in the dtype of its input.  # shape: (..., features, features)
    """
    size = rows.shape[-1]
    width = max(1, -(-size // SLABS))
    upper = rows.new_zeros((*rows.shape[:-2], size, size))
    for start in range(0, size, width):
        upper[..., start : start + width, start:] = rows[..., start : start + width].mT @ rows[..., start:]
    upper = upper.triu()
    return upper + upper.triu(1).mT
