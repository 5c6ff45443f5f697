"""Adapters of Transformers' own, `model.add_adapter`."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

takes_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this Transformers takes adapters of PEFT {MIN_PEFT_VERSION} or newer",
)
