"""The tasks by name."""

from __future__ import annotations

from .conll import CONLL2003
from .glue import GLUE
from .imagenet import IMAGE_CLASSIFICATION
from .language_modeling import C4, WIKITEXT2
from .mmlu import MMLU
from .squad import SQUAD, SQUAD_V2
from .swag import SWAG
from .task import EvaluationTask

EVALUATION_TASKS: dict[str, EvaluationTask] = {
    "squad": SQUAD,
    "squad_v2": SQUAD_V2,
    **GLUE,
    "swag": SWAG,
    "conll2003": CONLL2003,
    "mmlu": MMLU,
    "imagenet": IMAGE_CLASSIFICATION,
    "wikitext2": WIKITEXT2,
    "c4": C4,
}
