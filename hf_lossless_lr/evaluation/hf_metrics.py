"""The metrics of the tasks as modules of `evaluate`: for a Trainer's `compute_metrics` and for scripts, offline.

They count with the functions that the tasks themselves count with, so their figures are those of
`hf-lossless-lr evaluate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Features, List, Value

from ..errors import ConfigurationError, DataError
from .classification import accuracy_scores
from .conll import entity_scores
from .glue import GLUE_LABELS, glue_scores
from .imagenet import top_k_scores
from .scores import Scores
from .squad_scores import squad_scores

try:
    import evaluate
except ImportError as error:
    raise ConfigurationError("metrics are modules of evaluate: pip install hf-lossless-lr[eval].") from error

_PROBABILITY = "no_answer_probability"
_NUMBERS = Features({"predictions": Value("float64"), "references": Value("float64")})  # int64 would cut off fractions


class MetricModule(evaluate.Metric):
    """A metric that is made of `Scores`: each value with its standard error.

    Attributes:
        inputs: what `compute` and `add_batch` take.
        configurations: the names that it can be loaded with.
    """

    inputs: Features
    configurations: tuple[str | None, ...] = (None,)

    def _info(self) -> evaluate.MetricInfo:
        text = type(self).__doc__
        return evaluate.MetricInfo(description=text, inputs_description=text, citation="", features=self.inputs)

    def _enforce_nested_string_type(self, schema: Any, obj: Any) -> None:
        """Say which key is missing, where evaluate raises a bare `KeyError`, and allow others."""
        if isinstance(schema, dict) and isinstance(obj, dict):
            missing = [key for key in schema if key not in obj and key != _PROBABILITY]
            if missing:
                raise DataError(f"there is no {missing[0]!r} beside {', '.join(map(repr, obj))}.")
            obj = {key: obj.get(key) for key in schema}
        super()._enforce_nested_string_type(schema, obj)

    def _compute(self, predictions: list[Any], references: list[Any], **options: Any) -> dict[str, float]:
        if not references:
            raise DataError("there are no predictions to score.")
        result: dict[str, float] = {}
        for name, (value, error) in self._scores(predictions, references, **options).values().items():
            result |= {name: value, f"{name}_standard_error": error}
        return result

    def _scores(self, predictions: list[Any], references: list[Any]) -> Scores:
        raise NotImplementedError


class Squad(MetricModule):
    """SQuAD v1.1, as in the official script: `f1` and `exact_match`.

    Predictions are `{"id": ..., "prediction_text": ...}` and references
    `{"id": ..., "answers": {"text": [...], "answer_start": [...]}}`, in any order.
    """

    inputs = Features(
        {
            "predictions": {"id": Value("string"), "prediction_text": Value("string")},
            "references": {
                "id": Value("string"),
                "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
            },
        }
    )
    unanswerable = False

    def _scores(self, predictions: list[Any], references: list[Any]) -> Scores:
        found, golds = _by_id(predictions, "prediction_text"), _by_id(references, "answers")
        for name, gold in golds.items():
            if found.get(name) is None:
                raise DataError(f"there is no prediction for the question {name!r}.")
            if not gold or not (gold["text"] or self.unanswerable):
                raise DataError(
                    f"the question {name!r} has no answers; if there is none, as in SQuAD v2.0, give empty lists to "
                    "squad_v2."
                )
        texts = [gold["text"] for gold in golds.values()]
        return squad_scores([found[name] for name in golds], texts, self.unanswerable)


class SquadV2(Squad):
    """SQuAD v2.0, as in the official script: `f1` and `exact_match`, of all, `HasAns_` and `NoAns_`.

    Predictions are `{"id": ..., "prediction_text": ...}`, where "" means that there is no answer, and may have a
    `no_answer_probability`: "" is taken where it is above `no_answer_threshold`, 1 by default. References are
    `{"id": ..., "answers": {"text": [...], "answer_start": [...]}}`, in any order; no text means no answer.
    """

    inputs = Features({**Squad.inputs, "predictions": {**Squad.inputs["predictions"], _PROBABILITY: Value("float64")}})
    unanswerable = True

    def _scores(self, predictions: list[Any], references: list[Any], no_answer_threshold: float = 1.0) -> Scores:
        given = [
            {**row, "prediction_text": ""} if (row[_PROBABILITY] or 0) > no_answer_threshold else row
            for row in predictions
        ]
        return super()._scores(given, references)


class Seqeval(MetricModule):
    """Entities, whose words and type must be right: `f1`, `precision`, `recall` (strict IOB2), and `conlleval_f1`.

    Predictions and references are lists of tags, one for each word of a sentence: `O`, or `B-` or `I-` and a type.
    """

    inputs = Features({"predictions": List(Value("string")), "references": List(Value("string"))})

    def _scores(self, predictions: list[Any], references: list[Any]) -> Scores:
        return entity_scores(predictions, references)


class Glue(MetricModule):
    """GLUE: the metrics of the task that `config_name` says.

    Predictions and references are classes, numbered as in the data set on the hub, or similarities for `stsb`.
    """

    inputs = _NUMBERS
    configurations = tuple(GLUE_LABELS)

    def _scores(self, predictions: list[Any], references: list[Any]) -> Scores:
        take = _classes if GLUE_LABELS[self.config_name] else _similarities
        return glue_scores(self.config_name, take(predictions), take(references))


class Accuracy(MetricModule):
    """Share of predictions that are equal to their references: `accuracy`. Both are numbers of classes."""

    inputs = _NUMBERS

    def _scores(self, predictions: list[Any], references: list[Any]) -> Scores:
        return accuracy_scores(_classes(predictions), _classes(references))


class TopKAccuracy(MetricModule):
    """Share of references that are the first, or one of the first five, predictions.

    Metrics are `top-1 accuracy` and `top-5 accuracy` (top-k, where only k < 5 are predicted). Predictions are lists of
    classes, the best first, equally many for each example; references are classes.
    """

    inputs = Features({"predictions": List(Value("float64")), "references": Value("float64")})

    def _scores(self, predictions: list[Any], references: list[Any]) -> Scores:
        lengths = sorted({len(row) for row in predictions})
        if len(lengths) > 1 or lengths[0] < 1:
            raise DataError(f"predictions must be equally many classes for each example, not {lengths}.")
        return top_k_scores(_classes(predictions), _classes(references))


def _by_id(rows: Sequence[Mapping[str, Any]], value: str) -> dict[str, Any]:
    (name, count), *_ = Counter(row["id"] for row in rows).most_common(1)
    if count > 1:
        raise DataError(f"the id {name!r} occurs {count} times with a {value!r}.")
    return {row["id"]: row[value] for row in rows}


def _classes(values: Sequence[Any]) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    wrong = array[~((array >= 0) & (array == np.floor(array)))]
    if wrong.size:
        raise DataError(f"classes must be whole numbers from 0, not {wrong[0]:g}.")
    return array


def _similarities(values: Sequence[Any]) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise DataError("similarities must be finite numbers.")
    return array


METRICS: dict[str, type[MetricModule]] = {
    "squad": Squad,
    "squad_v2": SquadV2,
    "seqeval": Seqeval,
    "glue": Glue,
    "accuracy": Accuracy,
    "top_k_accuracy": TopKAccuracy,
}
"""The modules by name."""


def load_metric(name: str, config_name: str | None = None, **options: Any) -> evaluate.Metric:
    """Load a metric without a network; predictions and references are those of the hub's module of the same name.

    The result of `compute` has each metric by the name that it has in the task, and `{name}_standard_error`, its
    jackknife error. Unlike those of the hub's `squad`, all are fractions in [0, 1] (a correlation in [−1, 1]).

    Example:
        >>> metric = load_metric("accuracy")
        >>> metric.compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1])
        {'accuracy': 0.75, 'accuracy_standard_error': 0.25}

    Args:
        name: one of `METRICS`.
        config_name: the task of `glue`, such as `mnli`.
        options: options of `evaluate.Metric`, such as `cache_dir` and `keep_in_memory`, or `num_process` and
            `process_id` in a run of several processes.

    Returns:
        The metric, whose `compute` raises `DataError` for what cannot be scored.

    Raises:
        ConfigurationError: if there is no such metric or configuration.
    """
    if name not in METRICS:
        raise ConfigurationError(f"there is no metric {name!r}; there are {', '.join(METRICS)}.")
    configurations = METRICS[name].configurations
    if config_name not in configurations:
        raise ConfigurationError(
            f"config_name of {name} must be {' or '.join(map(repr, configurations))}, not {config_name!r}."
        )
    return METRICS[name](config_name, **options)
