"""What is written beside the weights and read back: options, manifest, the Transformers plugin.

Also what hangs on a compressed model. Sees no data, statistics or verdict.
"""

from .attached import dequantize, mark_compressed, unmark_compressed
from .attached_card import attach_card
from .config import LosslessLowRankConfig, record_of
from .manifest import current_unfused, narrow_records
from .merging import merge_dense_adapter
from .options import DEFAULT_SELECTION, FEWEST_JUDGES, MEASURED_OBJECTIVES, CompressionOptions
from .presets import PRESETS
from .quantizer import LosslessLowRankQuantizer, compressed_architecture
from .storing import change_storage

__all__ = [
    "DEFAULT_SELECTION",
    "FEWEST_JUDGES",
    "MEASURED_OBJECTIVES",
    "PRESETS",
    "CompressionOptions",
    "LosslessLowRankConfig",
    "LosslessLowRankQuantizer",
    "attach_card",
    "change_storage",
    "compressed_architecture",
    "current_unfused",
    "dequantize",
    "mark_compressed",
    "merge_dense_adapter",
    "narrow_records",
    "record_of",
    "unmark_compressed",
]
