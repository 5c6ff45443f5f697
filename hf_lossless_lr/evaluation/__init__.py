"""Scores on published tasks, one a file, and speed. Never knows that a model is compressed."""

from .language_modeling import C4, WIKITEXT2
from .mmlu import MMLU, mmlu
from .pipelines import TASKS
from .positions import most_tokens
from .random_inputs import random_batch
from .registry import EVALUATION_TASKS
from .scores import Score, Scores, compare, summarize
from .sources import choose_columns, first_rows, is_format, is_single, load_split
from .speed import MOST_THREADS, measure_speed
from .task import EvaluationTask, ScoringOptions, Task

__all__ = [
    "C4",
    "EVALUATION_TASKS",
    "MMLU",
    "MOST_THREADS",
    "TASKS",
    "WIKITEXT2",
    "EvaluationTask",
    "Score",
    "Scores",
    "ScoringOptions",
    "Task",
    "choose_columns",
    "compare",
    "first_rows",
    "is_format",
    "is_single",
    "load_split",
    "measure_speed",
    "mmlu",
    "most_tokens",
    "random_batch",
    "summarize",
]
