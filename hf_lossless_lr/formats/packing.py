"""Codes of a few bits, packed into bytes without gaps: each row begins with a new byte, low bits come first."""

from __future__ import annotations

import torch


def packed_width(columns: int, bits: int) -> int:
    """Return the bytes that a row of codes takes."""
    return -(-columns * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes.

    Args:
        codes: integers from 0 to `2^bits − 1`.  # shape: (rows, columns)
        bits: bits of a code, from 1 to 8.

    Returns:
        Bytes in uint8.  # shape: (rows, packed_width(columns, bits))
    """
    rows, columns = codes.shape
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    single = (codes.to(torch.uint8)[..., None] >> places) & 1
    row = single.new_zeros(rows, packed_width(columns, bits) * 8)
    row[:, : columns * bits] = single.reshape(rows, -1)
    eights = row.reshape(rows, -1, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return eights.sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """Undo `pack`.

    Args:
        packed: bytes.  # shape: (rows, packed_width(columns, bits))
        columns: number of codes in a row.
        bits: bits of a code.

    Returns:
        Codes in uint8.  # shape: (rows, columns)
    """
    single = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    codes = single.reshape(len(packed), -1)[:, : columns * bits].reshape(len(packed), columns, bits)
    return (codes << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1, dtype=torch.uint8)
