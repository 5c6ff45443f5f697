"""Time the decompositions of a block of TinyLlama, as they are and as a textbook has them, in turns.

    python studies/decomposition_time.py --records studies/results/decomposition_time.jsonl

The textbook's way: float64, a symmetric root of the metric, and all products in full. Ours: a triangular root, float32
with a check in float64, and products that are symmetric computed by half. Both give factors and the predicted loss at
every rank. Weights and moments are random. Prints seconds of one thread, and how much the predictions differ.
"""

import argparse
import time
from pathlib import Path

import torch
from records import Record, write_records

from hf_lossless_lr import LosslessLowRankConfig
from hf_lossless_lr.factors import damped, factorize, loss_curve
from hf_lossless_lr.statistics import LayerStatistics

# Outputs, inputs, and how many layers of a block have this shape: q and o, k and v, gate and up, down.
LAYERS = ((2048, 2048, 2), (256, 2048, 2), (5632, 2048, 2), (2048, 5632, 1))
TOKENS = 8192
DAMPING = LosslessLowRankConfig.damping


def moments(features: int) -> torch.Tensor:
    """Return second moments of correlated channels of different scales."""
    rows = torch.randn(TOKENS, features) @ torch.randn(features, features).mul_(features**-0.5)
    rows *= torch.logspace(-1, 1, features)
    return rows.T @ rows / TOKENS


def textbook(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the left and right factors of a weight, and the predicted loss at each rank."""
    weight, A, B = weight.double(), A.double(), B.double()
    if len(weight) > weight.shape[1]:
        left, right, costs = textbook(weight.T, B, A)
        return right.T, left.T, costs
    values, vectors = torch.linalg.eigh(damped(B, DAMPING))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    outputs = torch.linalg.eigh(root @ weight @ damped(A, DAMPING) @ weight.T @ root)[1].flip(-1)
    left, right = inverse @ outputs, outputs.T @ root @ weight
    terms = (left.T @ B @ left) * (right @ A @ right.T)
    tails = terms.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return left, right, 0.5 * torch.cat([tails, tails.new_zeros(1)])


def ours(stats: LayerStatistics, weight: torch.Tensor) -> torch.Tensor:
    factors = factorize(weight[None], stats, "kronecker", DAMPING)
    return torch.from_numpy(loss_curve(weight[None], factors, stats).second_order)


def measure(out_features: int, in_features: int, turns: int) -> Record:
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    A, B = moments(in_features), moments(out_features)
    stats = LayerStatistics(None, A[None], B[None], TOKENS, TOKENS)
    seconds: list[list[float]] = [[], []]
    for _ in range(turns):
        start = time.process_time()
        found = ours(stats, weight)
        middle = time.process_time()
        exact = textbook(weight, A, B)[-1]
        for side, passed in zip(seconds, (middle - start, time.process_time() - middle), strict=True):
            side.append(passed)
    return {
        "shape": (out_features, in_features),
        "seconds": min(seconds[0]),
        "textbook_seconds": min(seconds[1]),
        "difference": float((found - exact).abs().max() / exact[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the widths")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--records", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for one another take seconds of the processor, too
    records, total = [], [0.0, 0.0]
    for out_features, in_features, count in LAYERS:
        sizes = (int(size * arguments.scale) for size in (out_features, in_features))
        records.append({**measure(*sizes, arguments.turns), "layers": count})
        print(records[-1], flush=True)
        for side, key in enumerate(("seconds", "textbook_seconds")):
            total[side] += count * records[-1][key]
    print(
        f"a block: {total[0]:.1f} seconds of a processor, by the textbook {total[1]:.1f}, {total[1] / total[0]:.2f}×"
    )
    if arguments.records:
        write_records(arguments.records, records)


if __name__ == "__main__":
    main()
