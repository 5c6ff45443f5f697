"""What the commands share: the options that name data, loading, and the exit code of a verdict."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..checkpoint import LosslessLowRankConfig
from ..errors import CertificateError, ConfigurationError
from ..evaluation import EVALUATION_TASKS, TASKS, EvaluationTask, Task, first_rows, load_split, mmlu, most_tokens
from ..renamed import RENAMED
from ..report import Certificate
from ..verdict import CERTIFIED
from .loading import PrecisionArguments

NOTHING_COMPRESSED, NOT_AS_REQUIRED = 3, 4  # exit codes

ALL_TASKS: dict[str, Task] = {**TASKS, **EVALUATION_TASKS}


def task_of(arguments: Any) -> Task:
    """Return the named task; MMLU with the solved examples that are given."""
    return ALL_TASKS[arguments.task] if arguments.shots_files is None else published_task(arguments)


def published_task(arguments: Any) -> EvaluationTask:
    """Return the named published task, with the solved examples that are given."""
    if arguments.shots_files is None:
        return EVALUATION_TASKS[arguments.task]
    return mmlu(load_data(arguments, arguments.shots_files, "dev", None))


@dataclass(kw_only=True)
class SourceArguments(PrecisionArguments):
    """Where the data come from, and the precision to work in."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "hub id, folder, or a format: json, csv, parquet, text; default: the task's, if it has one"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the data set"})
    data_files: list[str] | None = field(default=None, metadata={"help": "files, for a format"})
    shots_files: list[str] | None = field(
        default=None, metadata={"help": "files of MMLU's solved examples, for a format"}
    )


@dataclass(kw_only=True)
class DataArguments(SourceArguments):
    """The task, its data, and what becomes of the result."""

    task: str = field(metadata={"help": "task of the model", "choices": list(ALL_TASKS)})
    columns: list[str] | None = field(
        default=None, metadata={"help": "columns of the data set, the label last; not for published tasks"}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "tokens an example is cut to (or blocks are cut into); default: the task's own length"},
    )
    json: str | None = field(default=None, metadata={"help": "also write the result to this file"})


@dataclass(kw_only=True)
class RequiringArguments:
    """What the verdict has to be."""

    require: str | None = field(
        default=None,
        metadata={"help": "exit with code 4 if the verdict is less than this", "choices": list(CERTIFIED)[::-1]},
    )


@dataclass(kw_only=True)
class CalibrationArguments(DataArguments):
    """What to calibrate on, and what is held out."""

    eval_data_files: list[str] | None = field(default=None, metadata={"help": "held-out files, for a format"})
    calibration_split: str = field(default="train", metadata={"help": "split to calibrate on"})
    eval_split: str | None = field(
        default=None, metadata={"help": "split that is held out; default: a fifth of the calibration examples"}
    )
    calibration_examples: int = field(default=1024, metadata={"help": "calibration examples, from the start"})
    eval_examples: int | None = field(
        default=None, metadata={"help": "held-out examples, from the start; default all"}
    )


_DEFAULTS = LosslessLowRankConfig()


@dataclass(kw_only=True)
class JudgingArguments:
    """How results are judged."""

    batch_size: int = field(default=_DEFAULTS.batch_size, metadata={"help": "examples per forward pass"})
    loss_margin: float = field(default=_DEFAULTS.loss_margin, metadata={"help": "acceptable loss increase in nats"})
    accuracy_margin: float = field(
        default=_DEFAULTS.accuracy_margin, metadata={"help": "acceptable drop of the accuracy, as a fraction"}
    )


class _OldOption(argparse.Action):
    """An option that has another name now."""

    def __call__(self, parser: argparse.ArgumentParser, *values: Any) -> None:
        """Refuse the old name, with the present one."""
        parser.error(f"--{self.dest} is called --{RENAMED[self.dest]} now")


def refuse_old_options(parser: argparse.ArgumentParser) -> None:
    """Let a parser answer to the old names of its options with the present ones."""
    present = {action.dest for action in parser._actions}
    for old, new in RENAMED.items():
        if new in present:
            spellings = dict.fromkeys([f"--{old}", f"--{old.replace('_', '-')}"])
            parser.add_argument(*spellings, action=_OldOption, help=argparse.SUPPRESS)


def load_data(arguments: Any, files: list[str] | None, split: str, count: int | None) -> Dataset:
    """Load a split of the data set, which is the task's if no other is named.

    Args:
        arguments: the task, its data set and the configuration of that.
        files: files of the split, for a format.
        split: the split.
        count: examples to take, from the start; None for all.

    Returns:
        The data as they are.

    Raises:
        ConfigurationError: if no data set is named and the task has none.
    """
    path, configuration = arguments.dataset, arguments.dataset_config
    if path is None:
        if arguments.task not in EVALUATION_TASKS:
            raise ConfigurationError(f"--dataset: name the data set; {arguments.task} has no data set of its own.")
        path, default = EVALUATION_TASKS[arguments.task].dataset[:2]
        configuration = configuration or default
    return load_split(path, configuration, files, split, count)


def align(task: Task, dataset: Dataset, models: Sequence[Any], *columns: list[str]) -> Dataset:
    """Put the labels of a data set into the order of the classes of models that are to be compared.

    Args:
        task: the task.
        dataset: the data set.
        models: one model or more.
        columns: the columns that the user named, if any.

    Returns:
        The data set with labels that are right for all of the models.

    Raises:
        CertificateError: if no labels are.
    """
    first, *others = (task.align(dataset, model, *columns) for model in models)
    for other in others:
        # A column of labels that were put into another order has other names.
        renamed = [name for name, feature in first.features.items() if feature != other.features[name]]
        if any(list(first[name]) != list(other[name]) for name in renamed):
            raise CertificateError(
                "the models order their labels differently, so answers cannot be paired class by class; give the "
                "classes of one of them, and its model.config.id2label, the order of the other's."
            )
    return first


def load_examples(
    arguments: DataArguments,
    task: Task,
    models: Sequence[Any],
    processor: Any,
    files: list[str] | None,
    split: str,
    count: int | None,
) -> Dataset:
    """Load a split and prepare it for a model, or for several that are to be compared.

    Args:
        arguments: the data set.
        task: the task, from `task_of`.
        models: the models, for the order of their classes.
        processor: tokenizer or processor.
        files: files of the split, for a format.
        split: the split.
        count: examples to take, from the start; None for all.

    Returns:
        Examples as the models take them.

    Raises:
        CertificateError: if the models order their classes differently.
        ConfigurationError: if no data set is named and the task has none, or blocks of text are longer than a model's
            inputs.
    """
    length = arguments.max_length or task.max_length
    limits = [limit for model in models if task.cuts_text and (limit := most_tokens(model)) is not None]
    if limits and length > min(limits):
        raise ConfigurationError(
            f"--max_length: the text is read in blocks of {length} tokens, but the model takes {min(limits)}; give "
            f"--max_length {min(limits)} or less."
        )
    dataset, given = load_data(arguments, files, split, None if task.cuts_text else count), arguments.columns
    unlabelled = getattr(arguments, "labels", "data") == "model" and _lacks_labels(task, dataset, given)
    if unlabelled:
        dataset, given = _with_blank_labels(task, dataset, given)
    columns = () if given is None else (given,)
    dataset = align(task, dataset, models, *columns)
    examples = task.prepare(dataset, processor, length, *columns)
    examples = examples.remove_columns("labels") if unlabelled else examples
    return first_rows(examples, count)


def _lacks_labels(task: Task, dataset: Dataset, given: list[str] | None) -> bool:
    """Return whether data of a kind of task, which has no columns of its own, come without a column of labels."""
    if not task.columns or not task.labelled:
        return False
    if given is None:
        return not any(name in dataset.column_names for name in task.columns[-1].split("|"))
    return len(given) < sum("" not in names.split("|") for names in task.columns)


def _with_blank_labels(task: Task, dataset: Dataset, given: list[str] | None) -> tuple[Dataset, list[str] | None]:
    """Return data with a column of labels that say nothing, one for each word where these have labels."""
    label = task.columns[-1].split("|")[0]
    blank: list[Any] = [0] * len(dataset)
    if task.auto_model == "AutoModelForTokenClassification":
        words = given[0] if given else next(n for n in task.columns[0].split("|") if n in dataset.column_names)
        blank = [[0] * len(row) for row in dataset[words]]
    return dataset.add_column(label, blank), None if given is None else [*given, label]


def names_held_out(arguments: Any) -> bool:
    """Return whether the arguments of a command say which data are held out."""
    return arguments.eval_data_files is not None or arguments.eval_split is not None


def load_calibration(
    arguments: CalibrationArguments, task: Task, model: Any, processor: Any
) -> tuple[Dataset, Dataset | None]:
    """Load the calibration data, and what is held out where that is named.

    Args:
        arguments: the data set.
        task: the task, from `task_of`.
        model: the model, for the order of its classes.
        processor: tokenizer or processor.

    Returns:
        Examples as the model takes them; None for held-out data that are a part of them.
    """
    source = arguments.data_files, arguments.calibration_split, arguments.calibration_examples
    calibration = load_examples(arguments, task, [model], processor, *source)
    if not names_held_out(arguments):
        return calibration, None
    held_out = arguments.eval_data_files, arguments.eval_split or "validation", arguments.eval_examples
    return calibration, load_examples(arguments, task, [model], processor, *held_out)


def complaint(certificate: Certificate | None, required: str | None) -> str | None:
    """Return what to say if a verdict is less than required, else None; `improved` is more than `lossless`."""
    status = "none" if certificate is None else certificate.status
    if required is None or (status in CERTIFIED and CERTIFIED.index(status) <= CERTIFIED.index(required)):
        return None
    return f"the verdict is {status}, not {required}"
