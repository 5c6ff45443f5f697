"""Certify any pair of models, also ones that this package did not make."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import LosslessLowRankConfig
from ..data import combined_digest, draw_labels, examine, make_dataloader
from ..errors import CertificateError, TargetError
from ..layers import check_whole, on_device
from ..processes import make_accelerator
from ..renamed import refusing_old_names
from ..report import Certificate
from ..verdict import certify, paired_outcomes
from .agreeing import check_same

logger = logging.get_logger(__name__)


@refusing_old_names
def verify(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    eval_dataset: Any,
    *,
    loss_margin: float = 0.01,
    accuracy_margin: float = 0.01,
    confidence: float = 0.95,
    batch_size: int = 32,
    data_collator: Any = None,
    processing_class: Any = None,
    labels: str = "data",
    used: Collection[str] = (),
) -> Certificate:
    """Compare two models on the same held-out examples, and state a verdict on the second one.

    Args:
        dense: the model to compare with.
        compressed: the model to judge: any other model of the same task.
        eval_dataset: examples that had no part in making either, as in `LowRankCompressor.compress`.
        loss_margin: largest loss increase that counts as lossless, in nats per labelled unit.
        accuracy_margin: largest drop of the accuracy that counts as lossless, as a fraction.
        confidence: level of each one-sided bound.
        batch_size: examples per forward pass.
        data_collator: collator for examples; default as in `Trainer`.
        processing_class: tokenizer or processor, for the default collator.
        labels: where labels come from, as in `LosslessLowRankConfig`; models without a head take `model`.
        used: fingerprints of data that had a part in making the model, from `report.fingerprints`: of `calib_dataset`
            as it was given, of its calibration part and of its selection part. Other subsets of it are not recognized.

    Returns:
        The certificate.

    Raises:
        CertificateError: if the data cannot carry a certificate: used, too few examples, one class.
        ConfigurationError: if an option has a value that cannot be used.
        DataError: if the data has no labels, or the models do not answer the same questions.
        NumericalError: if a loss is not finite.
        TargetError: if a model is none, wrapped, spread over processes, or another one in each, or both are one.
    """
    LosslessLowRankConfig(  # refuses values that cannot be used
        loss_margin=loss_margin,
        accuracy_margin=accuracy_margin,
        confidence=confidence,
        batch_size=batch_size,
        labels=labels,
    )
    options = {"batch_size": batch_size, "data_collator": data_collator, "processing_class": processing_class}
    accelerator = make_accelerator()
    if dense is compressed:
        raise TargetError(
            "this is one model twice, which is as good as itself. compress() changes the model in place: load the "
            "dense one once more, or take a deepcopy of it before."
        )
    if isinstance(getattr(getattr(dense, "config", None), "quantization_config", None), LosslessLowRankConfig):
        logger.warning(
            "the first model is itself compressed, and the second one is compared with that. compress() and "
            "compress_to() change a model in place: load the dense one anew, or take a deepcopy of it before."
        )
    for model in (dense, compressed):
        if not isinstance(model, nn.Module):
            raise TargetError(f"verify() takes two models, got {type(model).__name__}; load it with from_pretrained.")
        check_whole(model)
        check_same(model)
    settings = [(model.config, dict(vars(model.config))) for model in (dense, compressed)]
    try:
        if labels == "model":
            named = {**options, "name": "eval_dataset"}
            eval_dataset = draw_labels(eval_dataset, dense, accelerator.device, 0, keep=True, **named)
        loader = make_dataloader(eval_dataset, dense, name="eval_dataset", **options)
        fingerprint = combined_digest(examine(loader, dense, "eval_dataset")[0])
        if fingerprint in used:
            raise CertificateError(
                "eval_dataset is data that the compressed model was made from; give other examples."
            )
        with on_device(dense, accelerator.device), on_device(compressed, accelerator.device):
            outcomes = paired_outcomes(dense, compressed, loader, accelerator, "Comparing", temperatures=True)
        return certify(outcomes, loss_margin, accuracy_margin, confidence, fingerprint)
    finally:  # a loss may set the problem_type
        for config, before in settings:
            vars(config).update(before)
