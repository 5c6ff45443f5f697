"""What larger models would need, by the formulas of docs/scaling.md and the rates of a measured run.

    python studies/scale_on_paper.py --records studies/results/scale.jsonl --max-memory 10GiB 64GiB 256GiB

Models are made on the meta device, so nothing is allocated. Memory is what the plan counts; time is that of the
largest measured run, scaled by the work of each stage: parameters times tokens for passes over the data,
`min(N, M) (N + M)²` for what is decomposed and solved.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from records import RESULTS, read_records
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.layers import weight_matrices
from hf_lossless_lr.pipeline.memory import memory_limit, needs_of, windows_of

MODELS = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "TinyLlama 1.1B": (2048, 5632, 22, 32, 4, 32_000),
    "Llama 2 7B": (4096, 11_008, 32, 32, 32, 32_000),
    "Llama 3 8B": (4096, 14_336, 32, 32, 8, 128_256),
    "Llama 3 70B": (8192, 28_672, 80, 64, 8, 128_256),
}
GIBIBYTE = 2**30


def needs(shape: tuple[int, ...]) -> SimpleNamespace:
    """Return bytes and work of a model in bfloat16."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**dict(zip((*names, "vocab_size"), shape, strict=True)))).bfloat16()
    layers = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: needs_of(module) for name, module in layers.items()}
    shapes = [weight_matrices(module).shape[1:] for module in layers.values()]
    return SimpleNamespace(
        weights=2 * model.num_parameters(),
        targeted=2 * sum(rows * columns for rows, columns in shapes),
        statistics={name: each.statistics for name, each in found.items()},
        factors=sum(each.factors for each in found.values()),
        work=max(each.work for each in found.values()),
        solving=sum(min(shape) * sum(shape) ** 2 for shape in shapes),
    )


def passes(model: SimpleNamespace, limit: int) -> str:
    """Return the passes over the data, beside the model, a tenth of it for activations, and one product."""
    room = limit - 1.1 * model.weights - max(model.statistics.values())
    peak = model.weights + 2 * model.targeted + model.work
    try:
        count = len(windows_of(model.statistics, int(room)))
    except ConfigurationError:
        return "too little"
    return str(count) if peak <= limit else f"{count}, but the refit takes {peak / GIBIBYTE:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RESULTS / "scale.jsonl", help="of studies/scale.py")
    parser.add_argument("--max-memory", nargs="+", default=["10GiB", "64GiB", "256GiB"])
    arguments = parser.parse_args()
    measured = max(read_records(arguments.records), key=lambda record: (record["layers"], record["tokens"]))
    models = {name: needs(shape) for name, shape in MODELS.items()}
    base, seconds = needs((*MODELS["TinyLlama 1.1B"][:2], measured["layers"], 32, 4, 32_000)), measured["seconds"]
    solving = sum(seconds[stage] for stage in ("factorization", "replacement", "refit_solves"))
    passing = seconds["all of it"] - solving
    limits = [memory_limit(text, torch.device("cpu")) for text in arguments.max_memory]
    columns = [f"passes with {text}" for text in arguments.max_memory]
    head = ["model", "weights", "statistics", "on disk", "factors on disk", *columns, "solving", "data"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, model in models.items():
        statistics = sum(model.statistics.values())
        sizes = (model.weights, statistics, statistics * 9 // 16, model.factors)
        cells = [f"{size / GIBIBYTE:.1f} GiB" for size in sizes] + [passes(model, limit) for limit in limits]
        hours = (solving * model.solving / base.solving, passing * model.weights / base.weights)
        print("| " + " | ".join([name, *cells, *(f"{each / 3600:.1f} h" for each in hours)]) + " |")


if __name__ == "__main__":
    main()
