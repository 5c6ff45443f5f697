"""What a layer receives and returns, as the rows of its matrices, and the products of these."""

from __future__ import annotations

import torch

LARGE = 1024  # features from which on sums are kept in float32: half of the memory, and of the time of what uses them
SLABS = 4  # column slabs of a Gram matrix


def real_rows(rows: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Return the rows that the mask keeps, flattened, in float32, matrix by matrix.

    Args:
        rows: what a layout gives.  # shape: (..., groups, features)
        mask: which of the leading rows count, or None for all.  # shape: (rows,)
        positions: which rows of each example these are, where they are not all.  # shape: (positions,)

    Returns:
        The rows.  # shape: (groups, rows, features)
    """
    if mask is not None and positions is not None:
        mask = mask.reshape(len(rows), -1)[:, positions].flatten()
    rows = rows.flatten(0, -3)
    return (rows if mask is None else rows[mask]).float().movedim(-2, 0)


def gram(rows: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """Return `XᵀX`, of which only the part above the diagonal is computed (in slabs of columns) and then mirrored.

    So the result is symmetric bit for bit, whatever order the processor's matrix product sums in.

    Args:
        rows: X.  # shape: (..., rows, features)
        others: Y, of the same shape, for `XᵀY` where that is symmetric, as it is for `Y = M X` of a symmetric M.

    Returns:
        The symmetric product, in the dtype of its input.  # shape: (..., features, features)
    """
    others = rows if others is None else others
    size = rows.shape[-1]
    width = max(1, -(-size // SLABS))
    product = rows.new_empty((*rows.shape[:-2], size, size))
    for start in range(0, size, width):
        slab = slice(start, start + width)
        upper = (rows[..., slab].mT @ others[..., start:]).triu()
        upper[..., : upper.shape[-2]] += upper[..., : upper.shape[-2]].triu(1).mT
        product[..., slab, start:] = upper
        product[..., start:, slab] = upper.mT
    return product


def precision_of(features: int) -> torch.dtype:
    """Return the dtype in which sums over batches are kept, of second moments of so many features."""
    return torch.float64 if features < LARGE else torch.float32
