"""What else could be done to a compressed model: tried on calibration data that nothing was chosen on.

    python studies/variations.py --testbed ../shared/testbed --records studies/results/variations.jsonl
    python studies/variations.py

* `clamped ranks`: at most so many times, and at least that fraction of, the rank of a uniform share.
* `singular values`: those of all refitted layers corrected together, by a Gauss–Newton step towards the dense model's
  logits (of two classes).
* `blocks`: factors and norms of each block trained, one block after the other, so that its outputs become those of
  the dense one (of a Llama).
* `curvature`: B of the gradients of the labels, instead of the Gauss-Newton matrix.
* `rounding`: what the predicted cost of rounding counts for beside that of truncation; shares are of the bytes.
* `removal`: most of the ranks of one layer are taken away, in the hope that the loss falls.
* `dimensions`: fewer of them between values and output of attention, in floating point; `rounded dimensions` with all
  number formats, where shares are of the bytes.

Models are calibrated on the first lines of the calibration data, and judged on others. Factors are stored as two (of
`rounding` and `dimensions`: as by default).
Records that the file has are not measured again; without --testbed, the table is printed from the file as it is.
"""

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from records import RESULTS, Record, append_records, known_records
from testbed_tasks import language, sentiment
from torch import nn
from transformers import PreTrainedModel

from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor
from hf_lossless_lr.baselines.truncation import two_factors
from hf_lossless_lr.data import make_dataloader, mean_loss
from hf_lossless_lr.factors import factorize
from hf_lossless_lr.layers import DIMENSIONS, FORMS, in_place, is_factorized, weight_matrices
from hf_lossless_lr.pipeline import verify
from hf_lossless_lr.processes import make_accelerator
from hf_lossless_lr.ranks import path
from hf_lossless_lr.report import CompressionReport
from hf_lossless_lr.statistics import collector

LIMITS = (None, 2.0, 1.4)
RIDGES = (1.0, 10.0, 100.0)
RATES, STEPS = (1e-4, 3e-4), 200
SHARES = (0.25, 0.02)
DEFAULTS: dict[str, Any] = {"storage": "auto", "rank_multiple": None}
ROUNDING = (1 / 6, 1 / 3, 2 / 3, 1.0)


class Place(NamedTuple):
    """A model with the data that it is calibrated on, and others that it is judged on."""

    model: PreTrainedModel
    calibration: Any
    others: Any
    processing_class: Any


def place(name: str, testbed: Path) -> Place:
    """Return a model of the testbed, without its held-out data."""
    if name == "minilm-sst2":
        task = sentiment(testbed, 4096)
        lines = task.calibration
        return Place(task.model, lines.select(range(1024)), lines.select(range(1024, 4096)), task.processing_class)
    task = language(testbed, 856)
    return Place(task.model, task.calibration[:32], task.calibration[32:], None)


def compressed(place: Place, keep_ratio: float | None, **options: Any) -> tuple[PreTrainedModel, CompressionReport]:
    """Return a compressed copy of a model, and its report; in two factors of any rank, if nothing else is said."""
    model = deepcopy(place.model)
    config = LosslessLowRankConfig(keep_ratio=keep_ratio, **{"storage": "two-factor", "rank_multiple": 1} | options)
    compressor = LowRankCompressor(config)
    compressor.compress(model, place.calibration, eval_dataset=place.others, processing_class=place.processing_class)
    report: Any = compressor.report
    return model, report


def judged(place: Place, model: PreTrainedModel) -> dict[str, float]:
    """Return how a model differs from the dense one on the other data."""
    found = verify(place.model, model, place.others, processing_class=place.processing_class)
    return {"loss_increase": found.loss[1] - found.loss[0], "divergence": found.divergence}


def clamped_ranks(place: Place, keep_ratio: float) -> Iterator[Record]:
    """Yield what the default's ranks cost, and the same within limits."""
    _, report = compressed(place, keep_ratio)
    layers = {name: layer for name, layer in report.layers.items() if layer.rank is not None}
    each = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    uniform = {name: keep_ratio * layer.dense_parameters / each[name] for name, layer in layers.items()}
    total = sum(layers[name].rank * each[name] for name in layers)

    def within(limit: float | None, factor: float) -> dict[str, int]:
        ranks = {name: factor * layer.rank for name, layer in layers.items()}
        if limit is not None:
            ranks = {
                name: min(max(rank, uniform[name] / limit), uniform[name] * limit) for name, rank in ranks.items()
            }
        return {name: max(1, round(rank)) for name, rank in ranks.items()}

    for limit in LIMITS:
        low, high = 0.0, 10.0
        for _ in range(50):
            middle = (low + high) / 2
            size = sum(rank * each[name] for name, rank in within(limit, middle).items())
            low, high = (low, middle) if size > total else (middle, high)
        _, found = compressed(place, None, ranks=within(limit, low))
        increase = found.compressed.loss - found.dense.loss
        yield {"setting": limit or "none", "loss_increase": increase, "divergence": found.certificate.divergence}


def singular_values(place: Place, keep_ratio: float) -> Iterator[Record]:
    """Yield what a compressed model costs, and the same with all singular values corrected."""
    model, _ = compressed(place, keep_ratio)
    layers = {name: layer for name, layer in model.named_modules() if is_factorized(layer)}
    slopes, residuals, weights = _slopes(place, model, layers)
    yield {"setting": 0.0, **judged(place, model)}
    scale = (weights[:, None] * slopes.square()).sum(0).sqrt()
    unit = torch.where(scale > 0, weights.sqrt()[:, None] * slopes / scale, 0.0)
    target = weights.sqrt() * residuals
    for ridge in RIDGES:
        solved = torch.linalg.solve(unit @ unit.T + ridge * torch.eye(len(unit)).to(unit), target)
        change = torch.where(scale > 0, unit.T @ solved / scale, 0.0)
        corrected: Any = deepcopy(model)
        for (name, layer), part in zip(
            layers.items(), change.split([layer.rank for layer in layers.values()]), strict=True
        ):
            with torch.no_grad():
                corrected.get_submodule(name).down.weight.copy_((1 + part.float())[:, None] * layer.down.weight)
        yield {"setting": ridge, **judged(place, corrected)}


def _slopes(
    place: Place, model: PreTrainedModel, layers: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how the log odds of each example follow each singular value, how far off they are, and what it costs."""
    rows: dict[str, torch.Tensor] = {}

    def watch(name: str, layer: Any) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            components = (inputs[0] @ layer.down.weight.T).detach()

            def back(gradient: torch.Tensor) -> None:
                rows[name] = (components * (gradient @ layer.up.weight)).sum(1).detach()

            output.register_hook(back)

        return hook

    handles = [layer.register_forward_hook(watch(name, layer)) for name, layer in layers.items()]
    slopes, residuals, weights = [], [], []
    for batch in make_dataloader(place.calibration, model, batch_size=32, processing_class=place.processing_class):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            wanted = place.model.eval()(**inputs).logits
        odds = model.eval()(**inputs).logits.diff(dim=-1)[:, 0]
        odds.sum().backward()
        model.zero_grad()
        slopes.append(torch.cat([rows[name] for name in layers], dim=-1))
        residuals.append(wanted.diff(dim=-1)[:, 0] - odds.detach())
        weights.append(wanted.softmax(-1).prod(-1))
    for handle in handles:
        handle.remove()
    return torch.cat(slopes).double(), torch.cat(residuals).double(), torch.cat(weights).double()


def blocks(place: Place, keep_ratio: float) -> Iterator[Record]:
    """Yield what a compressed model costs, and the same with its blocks trained."""
    model, _ = compressed(place, keep_ratio)
    yield {"setting": 0.0, **judged(place, model)}
    for rate in RATES:
        trained: Any = deepcopy(model)
        _train_blocks(place, trained, rate)
        yield {"setting": rate, **judged(place, trained)}


def _train_blocks(place: Place, model: Any, rate: float) -> None:
    dense: Any = place.model.eval()
    model.eval().requires_grad_(False)
    batches = [batch["input_ids"] for batch in place.calibration]
    with torch.no_grad():
        before = [dense.model.embed_tokens(batch) for batch in batches]
    now = list(before)
    rotations = dense.model.rotary_emb(before[0], torch.arange(before[0].shape[1])[None])
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        with torch.no_grad():
            before = [old(hidden, position_embeddings=rotations) for hidden in before]
        new.requires_grad_(True)
        optimizer = torch.optim.Adam(new.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
        for step in range(STEPS):
            turn = step % len(batches)
            loss = (new(now[turn], position_embeddings=rotations) - before[turn]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        new.requires_grad_(False)
        with torch.no_grad():
            now = [new(hidden, position_embeddings=rotations) for hidden in now]


def curvature(place: Place, keep_ratio: float) -> Iterator[Record]:
    """Yield what the default costs, and the same with B as the second moment of the gradients of the labels."""
    for setting, directions in (("Gauss-Newton", collector.gauss_newton_directions), ("labels", lambda *_: [])):
        with patch.object(collector, "gauss_newton_directions", directions):
            yield {"setting": setting, **judged(place, compressed(place, keep_ratio)[0])}


def rounding(place: Place, keep_ratio: float) -> Iterator[Record]:
    """Yield what the choice of ranks and formats costs, by what rounding counts for."""
    for share in ROUNDING:
        with patch.object(path, "ROUNDING_SHARE", share):
            model, _ = compressed(place, keep_ratio, formats="auto", **DEFAULTS)
        yield {"setting": share, **judged(place, model)}


def removal(place: Place, keep_ratio: float) -> Iterator[Record]:
    """Yield what the layer costs of which the calibration loss falls most, if only a share of it is kept.

    The share is of the ranks; the ratio that is asked for is not used.
    """
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
    compressor.calibrate(place.model, place.calibration, processing_class=place.processing_class)
    lines = make_dataloader(place.calibration, place.model, batch_size=32, processing_class=place.processing_class)
    accelerator, found = make_accelerator(), []
    dense = mean_loss(place.model, lines, accelerator)
    for name, stats in compressor.calibration_statistics.layers.items():
        layer = place.model.get_submodule(name)
        factors = factorize(weight_matrices(layer), stats, "kronecker", LosslessLowRankConfig.damping)
        for share in SHARES:
            rank = max(1, int(share * factors.factors.left.shape[-1]))
            balanced = factors.truncate(rank, "two-factor")
            smaller = two_factors(layer, balanced.down, balanced.up)
            with in_place(place.model, {name: smaller}):
                found.append((mean_loss(place.model, lines, accelerator) - dense, name, share, smaller))
    compressor.release()
    for change, name, share, smaller in sorted(found, key=lambda each: each[0])[:3]:
        shorter = deepcopy(place.model)
        shorter.set_submodule(name, smaller)
        yield {"setting": f"{name} {share}", "on_calibration": change, **judged(place, shorter)}


def dimensions(place: Place, keep_ratio: float, **options: Any) -> Iterator[Record]:
    """Yield what a model costs without and with fewer dimensions between values and output."""
    for setting, forms in (("without", list(FORMS)), ("with", [*FORMS, DIMENSIONS])):
        model, report = compressed(place, keep_ratio, forms=forms, **DEFAULTS, **options)
        layers = sum(layer.form.endswith(DIMENSIONS) for layer in report.layers.values())
        predicted = report.predicted_loss_increase
        yield {"setting": setting, "predicted": predicted, "layers": layers, **judged(place, model)}


VARIATIONS: dict[str, tuple[Callable[[Place, float], Iterator[Record]], tuple[str, ...], tuple[float, ...]]] = {
    "clamped ranks": (clamped_ranks, ("minilm-sst2", "llama-small"), (0.35, 0.25)),
    "singular values": (singular_values, ("minilm-sst2",), (0.5, 0.35)),
    "blocks": (blocks, ("llama-small",), (0.5, 0.35)),
    "curvature": (curvature, ("minilm-sst2", "llama-small"), (0.7, 0.5, 0.35)),
    "rounding": (rounding, ("minilm-sst2", "llama-small"), (0.141, 0.111, 0.08, 0.057)),
    "removal": (removal, ("minilm-sst2", "llama-small"), (1.0,)),
    "dimensions": (dimensions, ("minilm-sst2", "llama-small"), (0.7, 0.5, 0.35)),
    "rounded dimensions": (
        partial(dimensions, formats=["auto"]),
        ("minilm-sst2", "llama-small"),
        (0.141, 0.111, 0.08, 0.057),
    ),
}


def table(records: list[Record]) -> str:
    """Return a row for each setting."""
    rows = ["| variation | model | keep | setting | loss | divergence |", "|---" * 6 + "|"]
    for each in records:
        keep = "" if each["variation"] == "removal" else each["keep_ratio"]
        rows.append(
            f"| {each['variation']} | {each['model']} | {keep} | {each['setting']} | {each['loss_increase']:+.4f} | "
            f"{each['divergence']:.5f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--testbed", type=Path, help="folder of the trained models and their data")
    parser.add_argument("--records", type=Path, default=RESULTS / "variations.jsonl")
    parser.add_argument("--variations", nargs="+", choices=list(VARIATIONS), default=list(VARIATIONS))
    names = sorted({model for _, models, _ in VARIATIONS.values() for model in models})
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="those of them that a variation has")
    arguments = parser.parse_args()
    records = known_records(arguments.records)
    for name in arguments.variations if arguments.testbed else ():
        run, models, keep_ratios = VARIATIONS[name]
        for model in (m for m in models if m in arguments.models):
            for keep_ratio in keep_ratios:
                key = {"variation": name, "model": model, "keep_ratio": keep_ratio}
                if any(key.items() <= record.items() for record in records):
                    continue
                found = [{**key, **values} for values in run(place(model, arguments.testbed), keep_ratio)]
                records += found
                append_records(arguments.records, found)
    print(table(records))


if __name__ == "__main__":
    main()
