"""What can be factorized of each architecture that the conformance suite runs: writes `docs/architectures.md`.

    python studies/architectures.py --output docs/architectures.md

A tiny model of each row of `tests/support/architectures.py` is compressed, which says which layers are factorized and
why others are not. The share of the parameters is that of these layers in a model of the sizes that the class has by
default, built without its numbers. A few minutes on one core.
"""

import argparse
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch
from transformers.utils import logging

from hf_lossless_lr import CompressionReport
from hf_lossless_lr.errors import LosslessLowRankError, TargetError
from hf_lossless_lr.layers import replace_modules, unfused

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.architecture_page import EXAMPLES, Entry, compress, entry, entry_of_refused
from support.architectures import ARCHITECTURES, Architecture

HEAD = """# Architectures

With this page you can see whether a model of yours is compressed in full, in part or not at all, and what stays dense.

Each row is a class of Transformers. The conformance suite (`make test-conformance`) builds a tiny random model of it,
compresses it, saves it and loads it whole, without its head, in bfloat16, from shards and partly on disk; it generates
from it, copies it, trains it for a step, and makes it dense for a Transformers that does not have this package. Other
classes go, too: of these it is known.

* **share**: parameters in layers that can be factorized, in a model of the sizes that the class has by default;
* **full**: all layers but embeddings, output embeddings, task heads, poolers, tied weights, depthwise convolutions;
* **partial**: other weights stay dense as well, as the last column says; `report.skipped` names each of them;
* **refused**: with that sentence, before any work.

A weight that a model *reads* is one that its code uses as numbers instead of calling the layer. Layers that your data
do not reach stay dense, too, whatever the class; the table leaves that out.

`python studies/architectures.py --output docs/architectures.md` writes this page.

| class | family | share | verdict | what else stays dense, or why it is refused |
|---|---|---|---|---|
"""


def share_of(architecture: Architecture, report: CompressionReport) -> str:
    """Return the share of the layers that were factorized, in a model of the sizes that its class has by default."""
    with torch.device("meta"):
        try:
            model = architecture.model_class(architecture.model_class.config_class())
        except (ImportError, ValueError, TypeError, AttributeError):  # these sizes need more than they say
            return "–"
    whole = model.num_parameters()
    for name, module in list(model.named_modules()):
        with suppress(TargetError):  # most have no fused weights
            replace_modules(model, {name: unfused(module)})
    layers = {re.sub(r"\d+", "#", name) for name in report.layers}
    modules = [module for name, module in model.named_modules() if re.sub(r"\d+", "#", name) in layers]
    weights = [getattr(module, "weight", None) for module in modules]  # numbers may lead to others there
    return f"{100 * sum(weight.numel() for weight in weights if weight is not None) / whole:.0f} %"


def row_of(architecture: Architecture) -> str:
    model, batch = architecture.build(EXAMPLES)
    try:
        report = compress(architecture, model, batch)
    except LosslessLowRankError as error:
        return as_row(entry_of_refused(architecture, error), "–")
    return as_row(entry(architecture, report), share_of(architecture, report))


def as_row(entry: Entry, share: str) -> str:
    name, space, variant = entry.name.partition(" ")
    return f"| `{name}`{space}{variant} | {entry.family} | {share} | {entry.verdict} | {entry.dense} |\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the page; default: print it")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    page = HEAD + "".join(map(row_of, ARCHITECTURES))
    if arguments.output is None:
        print(page)
    else:
        arguments.output.write_text(page, encoding="utf-8")
