"""Time random BERT encoders of two widths, dense and at half of their parameters, in turns.

    python studies/encoder_time.py --records studies/results/encoder_time.jsonl

Weights are random: the time does not depend on them, nor here on the data. All linear layers are factorized with the
same share of their parameters kept. Prints the ratio of the compressed to the dense time, with its quartiles.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from records import Record, write_records
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from hf_lossless_lr.layers import find_targets, in_place, layout_of, weight_matrices
from hf_lossless_lr.ranks import default_multiple, speed_in_turns

SHAPES = ((1, 16), (1, 128), (8, 128), (32, 128))
WIDTHS = {384: 6, 768: 12}  # to the number of heads; 12 layers each
KEEP = 0.5
FEW_ROWS, MORE_TURNS = 64, 10


def factorized_layers(model: PreTrainedModel, storage: str) -> dict[str, nn.Module]:
    """Return a layer for each linear one that keeps the same share of its parameters."""
    layers = {}
    for name, module in find_targets(model).chosen.items():
        out_features, in_features = weight_matrices(module).shape[1:]
        multiple = default_multiple("cpu", min(out_features, in_features))
        total = out_features + in_features
        budget = KEEP * out_features * in_features
        rank = budget / total
        if storage == "pivoted":  # k (N + M - k) = budget
            rank = (total - (total**2 - 4 * budget) ** 0.5) / 2
        layer = layout_of(module).factorized(module, int(rank) // multiple * multiple, storage)
        for factor in (layer.down, layer.up):
            nn.init.normal_(factor.weight, std=0.02)
        layers[name] = layer
    return layers


def measure(width: int, storage: str, turns: int) -> list[Record]:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=WIDTHS[width], intermediate_size=4 * width
    )
    model = BertModel(config).eval()
    layers, found = factorized_layers(model, storage), []
    for shape in SHAPES:
        ids = torch.randint(1000, config.vocab_size, shape)
        run = partial(model, input_ids=ids)
        runs = [(nullcontext, run), (partial(in_place, model, layers), run)]
        more = MORE_TURNS if shape[0] * shape[1] < FEW_ROWS else 1  # short runs vary more, and cost little
        speed = speed_in_turns(runs, shape, torch.device("cpu"), turns=turns * more)
        setting = {"width": width, "storage": storage, "batch": shape[0], "length": shape[1], "threads": speed.threads}
        ratio = {"ratio": speed.ratio, "ratio_quartiles": speed.ratio_quartiles}
        found.append({**setting, "seconds": speed.seconds, **ratio})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: as many as PyTorch takes")
    parser.add_argument("--records", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    records = [
        record
        for width in arguments.widths
        for storage in ("two-factor", "pivoted")
        for record in measure(width, storage, arguments.turns)
    ]
    if arguments.records:
        write_records(arguments.records, records)


if __name__ == "__main__":
    main()
