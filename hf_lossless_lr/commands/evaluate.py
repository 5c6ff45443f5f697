"""`hf-lossless-lr evaluate`: a model's scores on a published task, or two models' side by side."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import LosslessLowRankConfig
from ..errors import CertificateError
from ..evaluation import EVALUATION_TASKS, ScoringOptions, first_rows, summarize
from ..files import write_atomically
from ..pipeline import verify
from ..report import certificate_sentence, plain, score_table
from .argument_checks import check_arguments
from .binding import what_is_known
from .data_options import SourceArguments, align, load_data, published_task
from .loading import load_auto, load_model

_DEFAULTS = LosslessLowRankConfig()


@dataclass(kw_only=True)
class EvaluateArguments(SourceArguments):
    """The task and its data."""

    task: str = field(metadata={"help": "task", "choices": list(EVALUATION_TASKS)})
    split: str | None = field(default=None, metadata={"help": "split; default: the one that figures are published on"})
    examples: int | None = field(
        default=None, metadata={"help": "examples (of a text: blocks), from the start; default all"}
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens an input is cut to; default: the task's"})
    batch_size: int = field(default=_DEFAULTS.batch_size, metadata={"help": "examples per forward pass"})
    confidence: float = field(default=_DEFAULTS.confidence, metadata={"help": "confidence level of one-sided bounds"})
    json: str | None = field(default=None, metadata={"help": "also write the figures to this file"})


def add_parser(commands: Any) -> None:
    """Add the parser of this command."""
    parser = commands.add_parser(
        "evaluate",
        help="score a model on a published task, or two models side by side",
        description="Score a model, dense or compressed, on a published task; two models are compared by paired "
        "bounds, too.",
        dataclass_types=[EvaluateArguments],
    )
    parser.add_argument("model", help="hub id or local folder of a model")
    parser.add_argument("other", nargs="?", help="a second model, usually the compressed one")


def evaluate(arguments: Any) -> int:
    """Run `hf-lossless-lr evaluate`.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: if an option does not fit the task, or has a value that cannot be used.
    """
    check_arguments(arguments)
    LosslessLowRankConfig(confidence=arguments.confidence, batch_size=arguments.batch_size)  # refuses bad values
    task = published_task(arguments)
    rows, blocks = (None, arguments.examples) if task.cuts_text else (arguments.examples, None)
    data = load_data(arguments, arguments.data_files, arguments.split or task.dataset[-1], rows)
    options = ScoringOptions(arguments.batch_size, arguments.max_length or task.max_length, blocks)
    processor = load_auto(task.processor, arguments.model)
    models = [
        load_model(task.auto_model, name, arguments.dtype).eval()
        for name in (arguments.model, arguments.other)
        if name is not None
    ]
    scores = [task.score(model, data, processor, options) for model in models]
    summary = summarize(scores, arguments.confidence)
    print(score_table(summary))
    if arguments.other is not None:
        print(f"bounds are one-sided, at {arguments.confidence:.0%} confidence")
        used, doubt = what_is_known(Path(arguments.other))
        try:
            examples = task.prepare(align(task, data, models), processor, options.max_length)
            certificate = verify(
                models[0],
                models[1],
                first_rows(examples, blocks),
                confidence=arguments.confidence,
                batch_size=arguments.batch_size,
                data_collator=task.collator(processor),
                used=used,
            )
            print(certificate_sentence(certificate))
        except CertificateError as error:
            print(f"no certificate: {error}")
        if doubt is not None:
            print(plain(f"hf-lossless-lr: {doubt}; the figures are about the weights as they are"), file=sys.stderr)
    if arguments.json:
        write_atomically(arguments.json, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return 0
