"""The stages in their order: the only room where they meet, and where a configuration is read. Holds no formula.

Begin reading at `compressor.py`.
"""

from .compressor import LowRankCompressor
from .judging import Judgement
from .verify import verify

__all__ = ["Judgement", "LowRankCompressor", "verify"]
