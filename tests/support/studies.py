"""Where the studies are, and what they are tried on."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.tiny_models import as_examples, bert_sequence_classification

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "studies"
RESULTS = STUDIES / "results"
needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


def tiny_task(testbed: Path) -> SimpleNamespace:
    """A tiny model in place of one of the testbed's."""
    model, batch = bert_sequence_classification(160)
    examples = as_examples(batch)
    return SimpleNamespace(model=model, calibration=examples[:80], evaluation=examples[80:], processing_class=None)
