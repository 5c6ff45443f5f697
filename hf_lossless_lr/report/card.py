"""README of a checkpoint, from its report."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from .records import REPORT_NAME, CompressionReport
from .sentence import claims_of, verdict_sentence
from .text import code, markdown, plain

CARD_NAME = "README.md"
TAGS = ("hf-lossless-lr", "low-rank", "compressed")
MARK = re.compile(r"<!-- Written by hf-lossless-lr, text ([0-9a-f]{64})\. Edit freely: .*? -->\s*$")


def model_card(
    report: CompressionReport,
    base_model: str | None = None,
    chosen: Mapping[str, Any] | None = None,
    package: str = "transformers",
) -> str:
    """Return the README of a checkpoint.

    Args:
        report: the report of the compression.
        base_model: name of the dense model on the Hub, where it is known.
        chosen: the options that reproduce it; default all of the report's.
        package: the package that has the model's class.

    Returns:
        Markdown with YAML metadata.
    """
    data = ModelCardData(library_name="transformers", tags=list(TAGS), base_model=base_model)
    sections = [
        f"# {markdown(base_model or report.model)} with {_size(report)}",
        f"Compressed with `hf-lossless-lr`, by low-rank factorization{_with_formats(report)} without fine-tuning.",
        f"**Verdict:** {markdown(verdict_sentence(report))}",
        *_comparison(report),
        *_loading(report, package),
        *_kept_dense(report),
        *_origin(report, report.config if chosen is None else chosen),
    ]
    body = "\n\n".join(sections) + "\n\n"
    mark = f"<!-- Written by hf-lossless-lr, text {_digest(body)}. Edit freely: an edited card is never replaced. -->"
    return f"---\n{data.to_yaml()}\n---\n\n{body}{mark}\n"


def _size(report: CompressionReport) -> str:
    before, after = report.dense.bytes, report.compressed.bytes
    if _formats(report) and before and after:
        return f"{_percent(after / before, 0)} of its bytes"
    return f"{_percent(report.model_keep_ratio, 0)} of its parameters"


def _formats(report: CompressionReport) -> list[str]:
    formats = {layer.format for layer in report.layers.values()} | {w.format for w in report.skipped.values()}
    return sorted(formats - {"float"}, reverse=True)


def _with_formats(report: CompressionReport) -> str:
    formats = _formats(report)
    return f" and rounding to {' and '.join(formats)}" if formats else ""


def _rows(report: CompressionReport) -> list[tuple[str, ...]]:
    dense, compressed, certificate = report.dense, report.compressed, report.certificate
    layers = report.layers.values()
    rows: list[tuple[str, ...]] = [
        (
            "targeted parameters",
            f"{sum(layer.dense_parameters for layer in layers):,}",
            f"{sum(layer.parameters for layer in layers):,} ({_percent(report.keep_ratio, 1)})",
        ),
        (
            "parameters",
            f"{dense.parameters:,}",
            f"{compressed.parameters:,} ({_percent(report.model_keep_ratio, 1)})",
        ),
    ]
    if dense.bytes and compressed.bytes:
        ratio = f"({_percent(compressed.bytes / dense.bytes, 1)})"
        rows.append(("bytes of the tensors", f"{dense.bytes:,}", f"{compressed.bytes:,} {ratio}"))
    rows.append(("loss (nats)", f"{dense.loss:.4f}", f"{compressed.loss:.4f}"))
    if dense.accuracy is not None and compressed.accuracy is not None:
        rows.append(("accuracy", _percent(dense.accuracy), _percent(compressed.accuracy)))
    if report.speed is not None:
        times = [f"{1000 * seconds:.1f}" for seconds in report.speed.seconds]
        rows.append(
            (f"batch of {report.speed.setting} (ms)", times[0], f"{times[1]} (× {report.speed.ratio or 1:.2f})")
        )
    if certificate is not None and certificate.calibration_error is not None:
        rows.append(("expected calibration error", *(f"{error:.4f}" for error in certificate.calibration_error)))
    if certificate is not None and certificate.temperatures is not None:
        rows.append(("fitted temperature", *(f"{temperature:.3f}" for temperature in certificate.temperatures)))
    return rows


def _comparison(report: CompressionReport) -> list[str]:
    certificate = report.certificate
    sections = ["## Dense and compressed", _table(("", "dense", "compressed"), _rows(report))]
    sections += [f"Note: {markdown(note)}." for note in report.notes]
    if certificate is None:
        return sections
    header = ("difference, positive is worse", "mean", "lower bound", "upper bound", "margin")
    names = {"the loss": "loss (nats)", "the accuracy": "accuracy drop (points)"}
    differences = [
        (
            names.get(claim.name, "loss at fitted temperatures (nats)"),
            *(
                f"{claim.scale * value:+.{4 if claim.scale == 1 else 2}f}" if math.isfinite(value) else "unknown"
                for value in vars(claim.found).values()
            ),
            f"{claim.scale * claim.margin:g}",
        )
        for claim in claims_of(certificate)
    ]
    if certificate.changed is not None:
        differences.append(("changed answers", _percent(certificate.changed), "", "", ""))
    if certificate.divergence is not None:
        differences.append(("KL divergence (nats)", f"{certificate.divergence:.4f}", "", "", ""))
    about = (
        f"Each bound is one-sided, at {100 * certificate.confidence:g} % confidence, from "
        f"{certificate.examples:,} held-out examples with {certificate.units:,} labelled units, which had no part in "
        f"the compression; {certificate.clusters} are taken as independent. The p-value of a difference beyond its "
        f"margin is {certificate.p_value:.2g}."
    )
    notes = [f"Note: {markdown(reason)}." for reason in certificate.reasons]
    limits = (
        "This says nothing about data of another kind than the held-out examples, about single groups among them, or "
        "about speed elsewhere, which depends on the layer widths and the hardware."
    )
    return [*sections, _table(header, differences), about, *notes, limits]


def _loading(report: CompressionReport, package: str) -> list[str]:
    name = report.model if report.model.isidentifier() else "YourModel"
    lines = (
        "import hf_lossless_lr  # pip install hf-lossless-lr; lets Transformers read this format\n"
        f"from {package} import {name}\n\n"
        f'model = {name}.from_pretrained("path or name of this checkpoint")'
    )
    after = (
        "`model.dequantize()` makes it a plain dense model with the approximated weights. Without the import, "
        "Transformers refuses the checkpoint with a size mismatch."
    )
    return ["## Loading", f"```python\n{lines}\n```", after]


def _kept_dense(report: CompressionReport) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, weight in report.skipped.items():
        written = "" if weight.format == "float" else f", in {weight.format}"
        reasons.setdefault(f"{weight.reason}{written}", []).append(name)
    shares = {reason: sum(report.skipped[name].share or 0.0 for name in names) for reason, names in reasons.items()}
    unchanged = [name for name, layer in report.layers.items() if (layer.rank, layer.format) == (None, "float")]
    whole = sum(layer.rank is None for layer in report.layers.values())
    formats = Counter(layer.format for layer in report.layers.values())
    formats += Counter(weight.format for weight in report.skipped.values())
    del formats["float"]
    lines = [
        f"* {markdown(reason, begins=True)}{f' ({_percent(shares[reason], 1)} of the model)' * bool(shares[reason])}: "
        f"{_patterns(names)}"
        for reason, names in reasons.items()
    ]
    if unchanged:
        lines.append(f"* targeted, but left dense by the choice of ranks: {_patterns(unchanged)}")
    rounded = ", ".join(f"{count} to {name}" for name, count in sorted(formats.items(), reverse=True))
    text = (
        f"{len(report.layers) - whole} of {len(report.layers)} targeted layers are factorized; with the others, they "
        f"keep {_percent(report.keep_ratio)} of their parameters, and the whole model keeps "
        f"{_percent(report.model_keep_ratio)}. {f'Weights are rounded: {rounded}. ' * bool(rounded)}"
        f"`{REPORT_NAME}` has the ranks{' and the formats' * bool(rounded)}."
    )
    return ["## Layers", text, *(["Not factorized:", "\n".join(lines)] if lines else [])]


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def _patterns(names: Iterable[str]) -> str:
    """Shorten names that differ in numbers only, and count them."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\d+", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    first = {re.sub(r"\d+", "*", name): name for name in reversed(list(names))}
    return ", ".join(f"{code(pattern)} ({n})" if n > 1 else code(first[pattern]) for pattern, n in counts.items())


def _origin(report: CompressionReport, chosen: Mapping[str, Any]) -> list[str]:
    examples = {"calibration": report.calibration, "held_out": report.held_out}
    rows = [
        (markdown(part.replace("_", " ")), f"{examples[part]['examples']:,}" if part in examples else "", code(digest))
        for part, digest in sorted(report.fingerprints.items())
    ]
    options = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    lines = (
        "from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor\n\n"
        f"config = LosslessLowRankConfig({options})\n"
        "compressor = LowRankCompressor(config)\n"
        "model = compressor.compress(model, calib_dataset, eval_dataset=held_out, processing_class=tokenizer)"
    )
    dense = f"`model` is the dense one, whose state dict has the SHA-256 {code(report.model_fingerprint)}."
    if report.compressed_fingerprint is not None:
        dense += f" All figures are about the state dict with the SHA-256 {code(report.compressed_fingerprint)}."
    versions = ", ".join(f"{markdown(package)} {markdown(version)}" for package, version in report.versions.items())
    table = _table(("part of the data", "examples", "SHA-256"), rows)
    return ["## Reproduction", f"```python\n{plain(lines, lines=True)}\n```", dense, table, f"Versions: {versions}."]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def is_unedited(body: str) -> bool | None:
    """Return whether the text of a card below its metadata is as `model_card` wrote it; None for another's."""
    mark = MARK.search(body)
    return None if mark is None else mark[1] == _digest(body[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
