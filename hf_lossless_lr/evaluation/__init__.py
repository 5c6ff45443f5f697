"""Scores on published tasks, one a file. Never knows that a model is compressed."""

from .mmlu import mmlu
from .pipelines import TASKS
from .registry import EVALUATION_TASKS
from .scores import summarize
from .sources import choose_columns, load_split
from .task import EvaluationTask, ScoringOptions, Task

__all__ = [
    "EVALUATION_TASKS",
    "TASKS",
    "EvaluationTask",
    "ScoringOptions",
    "Task",
    "choose_columns",
    "load_split",
    "mmlu",
    "summarize",
]
