"""What a compression found: frozen records to and from JSON, and the same as a sentence, a table, a card, a figure.

Computes nothing, and imports neither torch nor Transformers.
"""

from .card import CARD_NAME, is_unedited, model_card
from .comparison import MethodResult, methods_table, write_methods_figure
from .drawing import check_figure
from .figures import write_figures
from .memory import MemoryPlan, readable_size
from .reading import CERTIFIED
from .records import (
    REPORT_NAME,
    Certificate,
    CompressionReport,
    Difference,
    Measurement,
    TrialRecord,
    finite,
)
from .sentence import certificate_sentence, verdict_sentence
from .speed import Speed, layer_table, speed_table, write_speed_figure
from .tables import comparison_table, report_rows, score_table
from .text import plain
from .weights import LayerReport, SkippedWeight

__all__ = [
    "CARD_NAME",
    "CERTIFIED",
    "REPORT_NAME",
    "Certificate",
    "CompressionReport",
    "Difference",
    "LayerReport",
    "Measurement",
    "MemoryPlan",
    "MethodResult",
    "SkippedWeight",
    "Speed",
    "TrialRecord",
    "certificate_sentence",
    "check_figure",
    "comparison_table",
    "finite",
    "is_unedited",
    "layer_table",
    "methods_table",
    "model_card",
    "plain",
    "readable_size",
    "report_rows",
    "score_table",
    "speed_table",
    "verdict_sentence",
    "write_figures",
    "write_methods_figure",
    "write_speed_figure",
]
