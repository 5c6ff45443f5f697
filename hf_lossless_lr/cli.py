"""The command `hf-lossless-lr`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import transformers
from transformers import HfArgumentParser

from . import LosslessLowRankConfig, LosslessLowRankError, LowRankCompressor, __version__
from .config import CompressionOptions
from .console import comparison_table, report_rows
from .data import TASKS, choose_columns, load_split
from .demo import run_demo
from .errors import ConfigurationError, DataError

NOTHING_COMPRESSED = 3  # exit code


@dataclass
class DataArguments:
    """What to calibrate and evaluate on, and where to write the result."""

    task: str = field(metadata={"help": "task of the model", "choices": list(TASKS)})
    dataset: str = field(metadata={"help": "hub id, local folder, or a format: json, csv, parquet, text"})
    output: str = field(metadata={"help": "folder for the compressed checkpoint; must not exist"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the data set"})
    data_files: list[str] | None = field(default=None, metadata={"help": "calibration files, for a format"})
    eval_data_files: list[str] | None = field(default=None, metadata={"help": "evaluation files, for a format"})
    calibration_split: str = field(default="train", metadata={"help": "split to calibrate on"})
    eval_split: str | None = field(
        default=None, metadata={"help": "split to evaluate on; default: a fifth of the calibration examples"}
    )
    calibration_examples: int = field(default=1024, metadata={"help": "calibration examples, from the start"})
    eval_examples: int | None = field(default=None, metadata={"help": "evaluation examples; default all"})
    columns: list[str] | None = field(default=None, metadata={"help": "columns of the data set, the label last"})
    max_length: int = field(default=128, metadata={"help": "tokens an example is cut to (or blocks are cut into)"})
    dtype: str = field(
        default="float32", metadata={"help": "dtype to work in", "choices": ["float32", "bfloat16", "float16"]}
    )
    statistics: str | None = field(
        default=None, metadata={"help": "file of calibration statistics: read if it exists, else written, to resume"}
    )
    json: str | None = field(default=None, metadata={"help": "also write the report to this file"})


def build_parser() -> HfArgumentParser:
    """Return the parser of the command line."""
    parser = HfArgumentParser(
        [], prog="hf-lossless-lr", description="Make trained Transformers models smaller without a measurable loss."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=HfArgumentParser)
    compress = commands.add_parser(
        "compress",
        help="compress a checkpoint",
        description="Compress a checkpoint without fine-tuning and write an ordinary Transformers checkpoint.",
        dataclass_types=[DataArguments, CompressionOptions],
    )
    compress.add_argument("model", help="hub id or local folder of a trained model")
    demo = commands.add_parser(
        "demo",
        help="train, compress and reload a small model in a minute or two",
        description="Train a small Swin on handwritten digits, compress it, reload it in a new process.",
        dataclass_types=[],
    )
    demo.add_argument("--output", help="folder to keep the two checkpoints in; default: a temporary one, removed")
    demo.add_argument("--keep_ratio", "--keep-ratio", type=float, default=0.5, help="share of the parameters to keep")
    return parser


def compress(arguments: Any) -> int:
    """Run `hf-lossless-lr compress`.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: if the output exists already.
    """
    config = LosslessLowRankConfig(**{f.name: getattr(arguments, f.name) for f in fields(CompressionOptions)})
    output = Path(arguments.output)
    if output.exists():
        raise ConfigurationError(f"--output: {output} exists already; choose another folder or remove it.")
    task = TASKS[arguments.task]
    auto_model, auto_processor = getattr(transformers, task.auto_model), getattr(transformers, task.processor)
    model = _load(auto_model, arguments.model, dtype=arguments.dtype)
    processor = _load(auto_processor, arguments.model)
    calibration = _examples(arguments, processor, arguments.data_files, arguments.calibration_split, calibrate=True)
    evaluation = None
    if arguments.eval_data_files is not None or arguments.eval_split is not None:
        split = arguments.eval_split or "validation"
        evaluation = _examples(arguments, processor, arguments.eval_data_files, split, calibrate=False)
    compressor = LowRankCompressor(config)
    compressor.calibrate(
        model,
        calibration,
        eval_dataset=evaluation,
        data_collator=task.collator(processor),
        statistics_path=arguments.statistics,
    )
    compressor.compress_to()
    report = compressor.report
    if report is None:
        raise ConfigurationError("the compressor left no report")
    if arguments.json:
        Path(arguments.json).write_text(report.to_json(), encoding="utf-8")
    if all(layer.rank is None for layer in report.layers.values()):
        print(f"hf-lossless-lr: no model met objective {report.config['objective']}; nothing written", file=sys.stderr)
        return NOTHING_COMPRESSED
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        report.save(partial)
        partial.chmod(0o755)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(comparison_table(report_rows(report)))
    print(f"measured on {report.evaluation['examples']} held-out examples; written to {output}")
    return 0


def _load(auto_class: Any, name: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ImportError) as error:
        raise ConfigurationError(f"cannot load {name!r} with {auto_class.__name__}: {error}") from error


def _examples(arguments: Any, processor: Any, files: list[str] | None, split: str, calibrate: bool) -> Any:
    task = TASKS[arguments.task]
    count = arguments.calibration_examples if calibrate else arguments.eval_examples
    blocks = arguments.task == "text-generation"  # examples are counted after the text is cut into blocks
    dataset = load_split(arguments.dataset, arguments.dataset_config, files, split, None if blocks else count)
    columns = choose_columns(task, dataset.column_names, arguments.columns)
    examples = task.prepare(dataset, processor, columns, arguments.max_length)
    return examples.select(range(min(count or len(examples), len(examples))))


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; default those of the process.

    Returns:
        Exit code: 0 on success, 1 on an error that the message explains, 3 if nothing could be compressed within the
        margins (2, from argparse, on wrong usage).
    """
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.command == "compress":
            return compress(arguments)
        demo(arguments)
    except LosslessLowRankError as error:
        print(f"hf-lossless-lr: error: {error}", file=sys.stderr)
        return 1
    return 0


def demo(arguments: Any) -> None:
    """Run `hf-lossless-lr demo`.

    Args:
        arguments: the parsed arguments.

    Raises:
        DataError: if the output is no folder.
    """
    if arguments.output is None:
        with tempfile.TemporaryDirectory() as folder:
            run_demo(Path(folder), arguments.keep_ratio)
        return
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise DataError(f"--output: {output} is not a folder.")
    output.mkdir(parents=True, exist_ok=True)
    run_demo(output, arguments.keep_ratio)


if __name__ == "__main__":
    sys.exit(main())
