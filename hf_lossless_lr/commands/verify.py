"""`hf-lossless-lr verify`: a verdict on any pair of checkpoints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import LosslessLowRankConfig
from ..files import write_atomically
from ..pipeline import verify as verify_pair
from ..report import certificate_sentence, comparison_table, finite, plain
from .argument_checks import check_arguments
from .binding import what_is_known
from .data_options import (
    NOT_AS_REQUIRED,
    DataArguments,
    JudgingArguments,
    RequiringArguments,
    complaint,
    load_examples,
    refuse_old_options,
    task_of,
)
from .loading import load_auto, load_model

_DEFAULTS = LosslessLowRankConfig()


@dataclass(kw_only=True)
class VerifyArguments(DataArguments, JudgingArguments, RequiringArguments):
    """What to compare on, and what counts as lossless."""

    split: str = field(default="validation", metadata={"help": "split to compare on"})
    examples: int | None = field(
        default=None, metadata={"help": "examples (of a text: blocks), from the start; default all"}
    )
    confidence: float = field(default=_DEFAULTS.confidence, metadata={"help": "confidence level of one-sided bounds"})


def add_parser(commands: Any) -> None:
    """Add the parser of this command."""
    parser = commands.add_parser(
        "verify",
        help="state a verdict on any pair of checkpoints",
        description="Compare two checkpoints on the same held-out examples and state a verdict on the second one, "
        "whatever made it.",
        dataclass_types=[VerifyArguments],
    )
    parser.add_argument("dense", help="hub id or local folder of the model to compare with")
    parser.add_argument("compressed", help="hub id or local folder of the model to judge")
    refuse_old_options(parser)


def verify(arguments: Any) -> int:
    """Run `hf-lossless-lr verify`.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: if an option has a value that cannot be used.
    """
    check_arguments(arguments)
    margins = {
        name: getattr(arguments, name) for name in ("loss_margin", "accuracy_margin", "confidence", "batch_size")
    }
    LosslessLowRankConfig(**margins)  # refuses values out of range
    folder = Path(arguments.compressed)
    used, doubt = what_is_known(folder)
    task, names = task_of(arguments), (arguments.dense, arguments.compressed)
    models = dense, compressed = [load_model(task.auto_model, name, arguments.dtype) for name in names]
    processor = load_auto(task.processor, arguments.dense)
    certificate = verify_pair(
        dense,
        compressed,
        load_examples(arguments, task, models, processor, arguments.data_files, arguments.split, arguments.examples),
        data_collator=task.collator(processor),
        labels="data" if task.labelled else "model",
        used=used,
        **margins,
    )
    if arguments.json:
        write_atomically(arguments.json, json.dumps(finite(asdict(certificate)), indent=2, allow_nan=False) + "\n")
    accuracy = certificate.accuracy or (None, None)
    rows = {
        "parameters": (dense.num_parameters(), compressed.num_parameters()),
        "loss (nats)": certificate.loss,
        "accuracy": accuracy,
    }
    print(comparison_table(rows))
    print(certificate_sentence(certificate))
    if doubt is not None:
        print(plain(f"hf-lossless-lr: {doubt}; this verdict is about the weights as they are"), file=sys.stderr)
    problem = complaint(certificate, arguments.require)
    if problem is None:
        return 0
    print(f"hf-lossless-lr: {problem}", file=sys.stderr)
    return NOT_AS_REQUIRED
