"""`hf-lossless-lr compress`: from a checkpoint and data to a compressed checkpoint with its verdict."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..checkpoint import CompressionOptions, LosslessLowRankConfig
from ..errors import ConfigurationError
from ..files import write_atomically
from ..pipeline import LowRankCompressor
from ..processes import joined_processes, print_once
from ..report import CompressionReport, comparison_table, report_rows, verdict_sentence
from .argument_checks import check_arguments
from .data_options import (
    NOT_AS_REQUIRED,
    NOTHING_COMPRESSED,
    CalibrationArguments,
    RequiringArguments,
    complaint,
    load_calibration,
    load_examples,
    refuse_old_options,
    task_of,
)
from .loading import load_auto, load_model
from .output import Claim, claimed

HINT = "Every layer stays as it was: allow a smaller size or larger margins, or give more examples to judge by."


@dataclass(kw_only=True)
class CompressArguments(CalibrationArguments, RequiringArguments):
    """Where to write the result, and what more there is to fit to."""

    output: str = field(metadata={"help": "folder for the compressed checkpoint; must not exist"})
    refit_data_files: list[str] | None = field(
        default=None, metadata={"help": "files with more examples for the refit, whose labels play no part"}
    )
    refit_split: str | None = field(default=None, metadata={"help": "split with more examples for the refit"})
    refit_examples: int | None = field(default=None, metadata={"help": "examples to take of these; default all"})
    statistics: str | None = field(
        default=None, metadata={"help": "file of calibration statistics: read if it exists, else written, to resume"}
    )
    max_memory: str | None = field(
        default=None, metadata={"help": "memory of each process, such as 10GiB; default: what is free, less a tenth"}
    )
    work: str | None = field(
        default=None, metadata={"help": "folder for what is finished, to go on after an interruption; kept at the end"}
    )


def add_parser(commands: Any) -> None:
    """Add the parser of this command."""
    parser = commands.add_parser(
        "compress",
        help="compress a checkpoint",
        description="Compress a checkpoint without fine-tuning and write an ordinary Transformers checkpoint.",
        dataclass_types=[CompressArguments, CompressionOptions],
    )
    parser.add_argument("model", help="hub id or local folder of a trained model")
    refuse_old_options(parser)


def compress(arguments: Any) -> int:
    """Run `hf-lossless-lr compress`; of several processes, the main one writes and prints.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: if an option has a value that cannot be used; also, if the output exists already.
    """
    config = LosslessLowRankConfig(**{f.name: getattr(arguments, f.name) for f in fields(CompressionOptions)})
    check_arguments(arguments)
    print_once()
    with claimed(Path(arguments.output)) as claim:
        return _run(arguments, config, claim)


def _run(arguments: Any, config: LosslessLowRankConfig, claim: Claim | None) -> int:
    """Load, compress, write and print; return the exit code."""
    task = task_of(arguments)
    config = config if task.labelled else replace(config, labels="model")
    compressor = LowRankCompressor(config, max_memory=arguments.max_memory, work_dir=arguments.work)
    model = load_model(task.auto_model, arguments.model, arguments.dtype)
    processor = load_auto(task.processor, arguments.model)
    calibration, held_out = load_calibration(arguments, task, model, processor)
    more = None
    if arguments.refit_data_files is not None or arguments.refit_split is not None:
        split, files = arguments.refit_split or "train", arguments.refit_data_files
        more = load_examples(arguments, task, [model], processor, files, split, arguments.refit_examples)
    try:
        compressor.calibrate(
            model,
            calibration,
            eval_dataset=held_out,
            refit_dataset=more,
            data_collator=task.collator(processor),
            statistics_path=arguments.statistics,
        )
        compressor.compress_to()
    finally:
        compressor.release()
    report = compressor.report
    if report is None:
        raise ConfigurationError("the compressor left no report")
    nothing = getattr(model.config, "quantization_config", None) is None  # neither factorized nor rounded
    problem = complaint(report.certificate, arguments.require)
    processes = joined_processes()  # all of them have the same model and report
    try:
        if claim is not None:
            _finish(arguments, model, processor, report, None if nothing else claim, problem)
    finally:
        processes.wait_for_everyone()
    if nothing:
        return NOTHING_COMPRESSED
    return 0 if problem is None else NOT_AS_REQUIRED


def _finish(
    arguments: Any, model: Any, processor: Any, report: CompressionReport, claim: Claim | None, problem: str | None
) -> None:
    """Write the checkpoint, if there is an output, then the report, and print what was found."""
    output = arguments.output

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    if claim is not None:
        claim.write(save)
    if arguments.json:
        write_atomically(arguments.json, report.to_json())
    if claim is None:
        objective = report.config["objective"]
        print(f"hf-lossless-lr: no model met objective {objective}; nothing written. {HINT}", file=sys.stderr)
        return
    print(comparison_table(report_rows(report)))
    print(f"measured on {report.held_out['examples']} held-out examples; written to {output}")
    print(verdict_sentence(report))
    if problem is not None:
        print(f"hf-lossless-lr: {problem}; {output} is written all the same", file=sys.stderr)
