"""`hf-lossless-lr compare`: methods of the field on one model, at several sizes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..baselines import METHODS, method_config
from ..baselines import compare as compare_methods
from ..checkpoint import LosslessLowRankConfig
from ..errors import CheckpointError, ConfigurationError
from ..files import write_atomically
from ..report import MethodResult, finite, methods_table, write_methods_figure
from .argument_checks import check_arguments
from .data_options import (
    NOTHING_COMPRESSED,
    CalibrationArguments,
    JudgingArguments,
    load_calibration,
    refuse_old_options,
    task_of,
)
from .loading import load_auto, load_model

BY_DEFAULT = ("default", "no-refit", "kfac-svd", "aa-svd", "svd-llm", "asvd", "fwsvd", "svd")


@dataclass(kw_only=True)
class CompareArguments(CalibrationArguments, JudgingArguments):
    """What to compare, and where to keep it."""

    methods: list[str] = field(
        default_factory=lambda: list(BY_DEFAULT), metadata={"help": "methods to compare, of those above"}
    )
    keep_ratios: list[float] = field(
        default_factory=lambda: [0.7, 0.5], metadata={"help": "sizes, for those methods that take one"}
    )
    rank_multiple: int | None = field(
        default=None, metadata={"help": "multiple that ranks are taken from; default as in compress"}
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "layers to factorize, as in compress; default all"}
    )
    ignore: list[str] | None = field(default=None, metadata={"help": "layers to leave dense, as in compress"})
    records: str | None = field(
        default=None, metadata={"help": "file of the results, one in a line; those that it has are not found again"}
    )
    plot: str | None = field(default=None, metadata={"help": "also draw the results into this PNG file"})


def add_parser(commands: Any) -> None:
    """Add the parser of this command."""
    listed = "; ".join(f"{name}: {source}" for name, source in METHODS.items())
    parser = commands.add_parser(
        "compare",
        help="compare methods of the field on one model",
        description="Compress a model by several methods, on the same statistics, splits and held-out data, and print "
        f"what each costs. The methods: {listed}.",
        dataclass_types=[CompareArguments],
    )
    parser.add_argument("model", help="hub id or local folder of a trained model")
    refuse_old_options(parser)


def compare(arguments: Any) -> int:
    """Run `hf-lossless-lr compare`.

    Args:
        arguments: the parsed arguments.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: if an option has a value that cannot be used, or the records are of something else.
    """
    check_arguments(arguments)
    shared = ("batch_size", "rank_multiple", "target_modules", "ignore", "loss_margin", "accuracy_margin")
    task = task_of(arguments)
    changes = {"labels": "data" if task.labelled else "model"} | {name: getattr(arguments, name) for name in shared}
    for name in arguments.methods:
        method_config(name, **changes)  # refuses values out of range before anything is loaded
    for ratio in arguments.keep_ratios:
        LosslessLowRankConfig(keep_ratio=ratio)
    results = _read(arguments.records)
    model = load_model(task.auto_model, arguments.model, arguments.dtype)
    processor = load_auto(task.processor, arguments.model)
    calibration, held_out = load_calibration(arguments, task, model, processor)
    found = compare_methods(
        model,
        calibration,
        methods=arguments.methods,
        keep_ratios=arguments.keep_ratios,
        eval_dataset=held_out,
        data_collator=task.collator(processor),
        known=results,
        **changes,
    )
    for result in found:
        results.append(result)
        if arguments.records:
            write_atomically(arguments.records, "".join(_line(each) for each in results))
    order = {name: place for place, name in enumerate(arguments.methods)}
    results = [r for r in results if r.method in order and r.keep_ratio in (None, *arguments.keep_ratios)]
    results.sort(key=lambda r: (-(r.keep_ratio or 0), order[r.method]))
    if not results:
        print("hf-lossless-lr: no method reaches any of the sizes", file=sys.stderr)
        return NOTHING_COMPRESSED
    print(methods_table(results))
    if arguments.json:
        write_atomically(arguments.json, json.dumps([finite(asdict(r)) for r in results], indent=2) + "\n")
    if arguments.plot:
        write_methods_figure(results, arguments.plot)
    return 0


def _line(result: MethodResult) -> str:
    return json.dumps(finite(asdict(result))) + "\n"


def _read(path: str | None) -> list[MethodResult]:
    """Read the records of an earlier run, if there are any."""
    if path is None or not Path(path).exists():
        return []
    try:
        return [MethodResult.from_dict(json.loads(line)) for line in Path(path).read_text("utf-8").splitlines()]
    except (ValueError, CheckpointError) as error:
        raise ConfigurationError(f"--records: {path} is no file of such records: {error}") from error
