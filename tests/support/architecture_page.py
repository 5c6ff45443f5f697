"""What becomes of each architecture of the suite, in words: the rows of `docs/architectures.md`."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hf_lossless_lr import CompressionReport, LosslessLowRankConfig, LowRankCompressor
from support.architectures import Architecture
from support.tiny_models import Batch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
EXAMPLES = 8
USUAL = ("embeddings", "output embeddings", "tied", "pooler", "task head", "depthwise")
"""Reasons that keep no layer dense that another architecture would have factorized."""
OF_DATA = (
    "no gradient of the loss reaches it",
    "never called by the data",
    "its inputs are zero on all calibration data",
)
"""Reasons that are about tiny random models and eight examples."""


class Entry(NamedTuple):
    """One row: all but the share of parameters, which is that of the sizes that the class has by default."""

    name: str
    family: str
    verdict: str
    dense: str


def halves(batch: Batch) -> list[Batch]:
    """Return two batches; what is not of examples, such as a flag, belongs to both."""
    parts = slice(0, EXAMPLES // 2), slice(EXAMPLES // 2, EXAMPLES)
    return [{n: v if isinstance(v, bool) else v[part] for n, v in batch.items()} for part in parts]


def compress(architecture: Architecture, model: PreTrainedModel, batch: Batch, **options: Any) -> CompressionReport:
    """Compress a model of an architecture in place, in the cheapest way that is a real one."""
    _, others = architecture.build(EXAMPLES, seed=7)
    always = {"rank_multiple": 1, "refit": False, "ignore": architecture.ignore, "labels": architecture.labels}
    compressor = LowRankCompressor(LosslessLowRankConfig(**{"keep_ratio": 0.6, **always, **options}))
    compressor.compress(model, halves(batch), eval_dataset=halves(others))
    return compressor.report


def entry(architecture: Architecture, report: CompressionReport) -> Entry:
    """Return the row of an architecture that was compressed."""
    reasons = dict.fromkeys(_shortened(weight.reason) for weight in report.skipped.values())
    unusual = [reason for reason in reasons if reason not in (*USUAL, *OF_DATA)]
    verdict = "partial" if unusual else "full"
    return Entry(architecture.name, architecture.family, verdict, "; ".join(unusual or ["–"]))


def entry_of_refused(architecture: Architecture, error: Exception) -> Entry:
    """Return the row of an architecture that was refused: its first words, and why nothing is left."""
    text = str(error)
    said = re.split(r"; skipped|\. |, and", text)[0]
    reasons = dict.fromkeys(map(_shortened, re.findall(r"\(([^)]+)\)[;.]", text)))
    return Entry(
        architecture.name, architecture.family, "refused", f"{said}: {', '.join(reasons)}" if reasons else said
    )


def _shortened(reason: str) -> str:
    reason = reason.removeprefix("not supported: ")
    return reason.partition(":")[0].replace(" instead of calling it", "").replace("the calibration data", "the data")


def entries_of_page() -> list[Entry]:
    """Return the rows that the page has."""
    rows = re.findall(r"^\| `(.+?)`(.*?) \| (.+?) \| .+? \| (.+?) \| (.+?) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [Entry(name + variant, *others) for name, variant, *others in rows]
