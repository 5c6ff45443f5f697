"""Low-rank compression of trained Hugging Face models, without a measurable loss and without fine-tuning.

Importing this package registers the checkpoint format with Transformers, so that `AutoModel….from_pretrained` loads
compressed checkpoints.

Example:
    ```python
    from hf_lossless_lr import LosslessLowRankConfig, LowRankCompressor

    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5))
    model = compressor.compress(model, calib_dataset, eval_dataset=held_out, processing_class=tokenizer)
    model.save_pretrained("compressed")
    ```
"""

from .checkpoint import (
    LosslessLowRankConfig,
    change_storage,
    compressed_architecture,
    dequantize,
    merge_dense_adapter,
)
from .errors import (
    CertificateError,
    CheckpointError,
    ConfigurationError,
    DataError,
    LosslessLowRankError,
    NumericalError,
    NumericalWarning,
    TargetError,
)
from .layers import FactorizedConv2d, FactorizedLinear, lora_targets
from .pipeline import LowRankCompressor, verify
from .report import Certificate, CompressionReport
from .verdict import PairedOutcomes, certify, certify_together, paired_outcomes
from .versions import __version__

__all__ = [
    "Certificate",
    "CertificateError",
    "CheckpointError",
    "CompressionReport",
    "ConfigurationError",
    "DataError",
    "FactorizedConv2d",
    "FactorizedLinear",
    "LosslessLowRankConfig",
    "LosslessLowRankError",
    "LowRankCompressor",
    "NumericalError",
    "NumericalWarning",
    "PairedOutcomes",
    "TargetError",
    "__version__",
    "certify",
    "certify_together",
    "change_storage",
    "compressed_architecture",
    "dequantize",
    "lora_targets",
    "merge_dense_adapter",
    "paired_outcomes",
    "verify",
]
