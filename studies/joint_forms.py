"""Forms that layers could share, against each layer by itself: what they are predicted to cost at the same size.

    python studies/joint_forms.py --testbed ../shared/testbed

On the statistics of a calibration: fewer dimensions between `v` and `o` of an attention head, and one `down` for all
layers that read the same, which checkpoints do not have. The predicted cost of a block is the least one at
which its layers take a share of their parameters, each by itself or in the form, in either storage. Forms may be
mixed: what `v` and `o` are with fewer dimensions may be factorized as well.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from testbed_tasks import Task, language, sentiment

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.factors import DenseLayer, LossCurve, factorize, fewer_dimensions, loss_curve
from hf_lossless_lr.ranks import compression_path, second_order_cost
from hf_lossless_lr.statistics import LayerStatistics

TASKS = {"minilm-sst2": sentiment, "llama-small": language}
LAYERS = {  # of a block: those that read the same, and the two around the context
    "minilm-sst2": (("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense"),
    "llama-small": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
}
BLOCKS = {"minilm-sst2": "bert.encoder.layer", "llama-small": "model.layers"}
STORAGES, SHARES = ("two-factor", "pivoted"), (0.8, 0.65, 0.5, 0.35)
DIMENSIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)  # shares of those between `v` and `o`
DAMPING = LosslessLowRankConfig.damping

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # W, A, B


def curve(layer: Layer, storage: str) -> LossCurve:
    """Return what a layer is predicted to cost at every rank."""
    weight, A, B = (each.double()[None] for each in layer)
    stats = LayerStatistics(None, A, B, 1, 1)
    return loss_curve(weight, factorize(weight, stats, "kronecker", DAMPING), stats, storage)


def least_cost(curves: Sequence[LossCurve], budget: float) -> float:
    """Return the least cost of layers that fit into a budget, with points between neighbours of the path."""
    path = compression_path({str(n): each for n, each in enumerate(curves)}, second_order_cost)
    costs = [path.predicted_cost_after(count) for count in range(len(path) + 1)]
    if budget < path.targeted[-1]:
        return np.inf
    return float(np.interp(budget, path.targeted[::-1], costs[::-1]))


def shared(layers: Sequence[Layer]) -> Layer:
    """Return the layers that read the same as one, of which a truncation has one `down`."""
    weights, inputs, outputs = zip(*layers, strict=True)
    return torch.cat(weights), inputs[0], torch.block_diag(*outputs)


def narrowed(v: Layer, o: Layer, heads: tuple[int, int], share: float) -> tuple[Layer, Layer, float]:
    """Return `v` and `o` with a share of the dimensions between them, and what that alone is predicted to cost."""
    if share == 1:
        return v, o, 0.0
    values, output = (DenseLayer(W[None], LayerStatistics(None, A[None], B[None], 1, 1)) for W, A, B in (v, o))
    found = fewer_dimensions(values, output, heads, round(share * len(v[0])), DAMPING)
    narrow_v, narrow_o = (
        (each.weight[0], each.statistics.input_covariance[0], each.statistics.grad_covariance[0])
        for each in (found.values, found.output)
    )
    return narrow_v, narrow_o, found.cost


def costs(layers: dict[str, Layer], names: Any, heads: tuple[int, int]) -> dict[tuple[str, str, float], float]:
    """Return the predicted costs of a block in each storage: of its layers by themselves, and in the forms."""
    readers, output = names
    read, v, o = [layers[name] for name in readers], layers[readers[-1]], layers[output]
    pairs = [narrowed(v, o, heads, share) for share in DIMENSIONS]
    found = {}
    for storage in STORAGES:
        alone = [curve(layer, storage) for layer in read]
        together = curve(shared(read), storage)
        narrow = [([curve(each, storage) for each in pair[:2]], pair[2]) for pair in pairs]
        for share in SHARES:
            budget = share * sum(layer[0].numel() for layer in read)
            found[storage, "q, k, v", share] = least_cost(alone, budget)
            found[storage, "one down", share] = least_cost([together], budget)
            budget = share * (v[0].numel() + o[0].numel())
            by_dimensions = [least_cost(parts, budget) + cost for parts, cost in narrow]
            found[storage, "v, o", share] = by_dimensions[0]
            found[storage, "fewer dimensions", share] = min(by_dimensions)
    return found


def measured(name: str, task: Task) -> dict[tuple[str, str, float], float]:
    """Return the predicted costs of all blocks of a model."""
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
    compressor.calibrate(task.model, task.calibration, processing_class=task.processing_class)
    statistics, config, total = compressor.calibration_statistics.layers, task.model.config, dict[Any, float]()
    queries = config.num_attention_heads
    heads = queries, getattr(config, "num_key_value_heads", queries)
    for block in range(config.num_hidden_layers):
        layers = {}
        for each in (*LAYERS[name][0], LAYERS[name][1]):
            path = f"{BLOCKS[name]}.{block}.{each}"
            stats = statistics[path]
            weight = task.model.get_submodule(path).weight.detach().double()
            layers[each] = (weight, stats.input_covariance[0].double(), stats.grad_covariance[0].double())
        for key, cost in costs(layers, LAYERS[name], heads).items():
            total[key] = total.get(key, 0.0) + cost
    compressor.release()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, required=True, help="folder of the trained models and their data")
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    arguments = parser.parse_args()
    print("| model | storage | share | one `down` for q, k, v | fewer dimensions between v and o |")
    print("|---" * 5 + "|")
    for name in arguments.models:
        found = measured(name, TASKS[name](arguments.testbed))
        for storage in STORAGES:
            for share in SHARES:
                down = found[storage, "one down", share] / found[storage, "q, k, v", share] - 1
                fewer = found[storage, "fewer dimensions", share] / found[storage, "v, o", share] - 1
                print(f"| {name} | {storage} | {share} | {down:+.0%} | {fewer:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
