"""What the tests of studies share."""

import importlib

import pytest
from support.studies import STUDIES


@pytest.fixture
def study(monkeypatch):
    """Import a study by its name."""
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module
