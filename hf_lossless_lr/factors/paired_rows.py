"""Rows that a layer gets in the dense and in the compressed model, in pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..statistics import Stream

CHUNK = 4096  # rows that small batches are joined to, for their products


class Chunk(NamedTuple):
    """Rows of a group, of some streams.

    Attributes:
        dense: what the dense layer gets, or its outputs.
        shifted: what the compressed one gets.
        errors: of what is added to its outputs, where that is known.
    """

    dense: torch.Tensor
    shifted: torch.Tensor
    errors: torch.Tensor | None


def chunks(streams: Sequence[tuple[Stream, Stream]]) -> Iterator[Chunk | None]:
    """Yield the rows of pairs of streams, those of small batches joined: one product of many rows costs less.

    Args:
        streams: of the dense and of the compressed model, waiting at the same group.

    Yields:
        Rows, made one pair after the other; None for a pair of which one has other rows than the other.
    """
    chunk: list[Chunk] = []
    for index, (dense, compressed) in enumerate(streams):
        rows = _paired(dense, compressed)
        if rows is None:
            yield None
        else:
            chunk.append(rows)
        if chunk and (sum(rows.dense.shape[-2] for rows in chunk) >= CHUNK or index == len(streams) - 1):
            errors = [rows.errors for rows in chunk if rows.errors is not None]
            yield Chunk(
                torch.cat([rows.dense for rows in chunk], dim=-2),
                torch.cat([rows.shifted for rows in chunk], dim=-2),
                torch.cat(errors, dim=-2) if len(errors) == len(chunk) else None,
            )
            chunk = []


def _paired(dense: Stream, compressed: Stream) -> Chunk | None:
    """Return the rows of two streams that are the same ones; None where that is not known.

    A router may send an expert other rows in the compressed model than in the dense one: those that it gets in both
    are a pair.
    """
    if dense.rows is None or compressed.rows is None:
        return None
    rows, shifted = dense.rows.values(), compressed.rows.values()
    ours, theirs = dense.rows.routed(), compressed.rows.routed()
    if ours is not None and theirs is not None:
        rows, shifted = rows[:, torch.isin(ours, theirs)], shifted[:, torch.isin(theirs, ours)]
    if rows.shape[-2] != shifted.shape[-2]:
        return None
    added, added_now = (stream.added.get(stream.group or ()) for stream in (dense, compressed))
    if added is None or added_now is None or ours is not None:
        return Chunk(rows, shifted, None)
    return Chunk(rows, shifted, dense.rows.outputs(added) - compressed.rows.outputs(added_now))
