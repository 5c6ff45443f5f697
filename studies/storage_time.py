"""Time pivoted and two-factor layers of one rank, in turns: from which rank on do pivots save time?

    python studies/storage_time.py --records studies/results/storage_time.jsonl

For each row of the input, pivots save k² multiply-adds of two factors, and move the numbers of the narrower side to
their places. Prints, for each shape and rank, the multiply-adds saved for each number moved, and the ratio of times.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from records import Record, write_records
from torch import nn

from hf_lossless_lr.layers import layout_of
from hf_lossless_lr.ranks.latency import run_seconds

SHAPES = ((384, 384), (384, 1536), (768, 768), (3072, 768), (2048, 2048), (5632, 2048))  # outputs, inputs
ROWS = (16, 128, 1024)
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of the full rank
RUN_SECONDS, MOST_CALLS = 3e-3, 50


@torch.no_grad()
def measure(shape: tuple[int, int], rows: int, turns: int) -> Iterator[Record]:
    torch.manual_seed(0)
    dense, x = nn.Linear(shape[1], shape[0]), torch.randn(rows, shape[1])
    calls = int(np.clip(RUN_SECONDS / run_seconds(dense, x, 1), 1, MOST_CALLS))
    for share in SHARES:
        rank = int(share * min(shape)) // 8 * 8
        layers = [dense, *(layout_of(dense).factorized(dense, rank, storage) for storage in ("two-factor", "pivoted"))]
        for layer in layers[1:]:
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.02)
        times = np.array([[run_seconds(layer, x, calls) for layer in layers] for _ in range(turns + 2)])[2:]
        to_dense = np.median(times / times[:, :1], axis=0)
        yield {
            "shape": shape,
            "rows": rows,
            "rank": rank,
            "saved_per_moved": rank**2 / min(shape),
            "two_factor": to_dense[1],
            "pivoted": to_dense[2],
            "ratio": float(np.median(times[:, 2] / times[:, 1])),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, nargs="+", help="pairs of outputs and inputs")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--records", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    given = arguments.shapes or []
    shapes = tuple(zip(given[::2], given[1::2], strict=True)) or SHAPES
    records = []
    for shape in shapes:
        for rows in ROWS:
            for record in measure(shape, rows, arguments.turns):
                print(record, flush=True)
                records.append(record)
    if arguments.records:
        write_records(arguments.records, records)


if __name__ == "__main__":
    main()
