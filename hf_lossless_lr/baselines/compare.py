"""Compare methods on one model: the same statistics, splits and held-out data for all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import DEFAULT_SELECTION, LosslessLowRankConfig
from ..data import combined_digest, item_digests, make_dataloader
from ..errors import ConfigurationError
from ..fingerprint import content_digest, tensors_fingerprint
from ..layers import at_hand
from ..pipeline import LowRankCompressor
from ..ranks import OBJECTIVES
from ..report import CompressionReport, MethodResult

logger = logging.get_logger(__name__)

STAGES = ("factorization", "replacement", "selection", "refit")


def compare(
    model: PreTrainedModel,
    calib_dataset: Any,
    *,
    methods: Sequence[str],
    keep_ratios: Sequence[float],
    eval_dataset: Any = None,
    data_collator: Any = None,
    processing_class: Any = None,
    known: Collection[MethodResult] = (),
    **changes: Any,
) -> Iterator[MethodResult]:
    """Compress a model by several methods and sizes, and judge each result on the same held-out data.

    The statistics are collected once. The same held-out data judge every method: a verdict is about its own method,
    and that of whichever turns out the best is optimistic.

    Args:
        model: the dense model; unchanged.
        calib_dataset: as for `LowRankCompressor.compress`.
        methods: names in `PRESETS`.
        keep_ratios: sizes for those methods that take one.
        eval_dataset: as for `LowRankCompressor.compress`.
        data_collator: as there.
        processing_class: as there.
        known: results that were found before, which are not found again.
        changes: options of `LosslessLowRankConfig` for all methods.

    Yields:
        A result for each method and size that is not known, in the order in which they are found. A size that a method
        cannot reach is left out, with a warning.

    Raises:
        ConfigurationError: if there is no such method, an option contradicts one, or the known results are of another
            model, other data or other options.
    """
    # What a refit is judged by is kept from methods without one, too: all have the same calibration data.
    changes = {"selection_fraction": DEFAULT_SELECTION, **changes}
    configs = {name: LosslessLowRankConfig.from_preset(name, **changes) for name in dict.fromkeys(methods)}
    for size in keep_ratios:
        LosslessLowRankConfig(keep_ratio=size)  # refuses what is none
    ratios = {name: _ratios(config, keep_ratios) for name, config in configs.items()}
    options = {"data_collator": data_collator, "processing_class": processing_class}
    inputs = _inputs(model, (calib_dataset, eval_dataset), options, configs, changes)
    if any(result.inputs != inputs for result in known):
        raise ConfigurationError(
            "the known results are of another model, other data, or other options. Give another file for the records."
        )
    done = {(result.method, result.keep_ratio) for result in known}
    with tempfile.TemporaryDirectory(prefix="hf-lossless-lr-") as folder:
        for name in sorted(configs, key=lambda each: not OBJECTIVES[configs[each].objective].needs_noise):
            missing = [ratio for ratio in ratios[name] if (name, ratio) not in done]
            if not missing:
                continue
            compressor = LowRankCompressor(configs[name])
            statistics = Path(folder) / f"{configs[name].selection_fraction}.safetensors"
            try:
                compressor.calibrate(
                    model, calib_dataset, eval_dataset=eval_dataset, statistics_path=statistics, **options
                )
                for ratio in missing:
                    try:
                        compressor.compress_to(ratio)
                    except ConfigurationError as error:
                        logger.warning("%s is left out at %s: %s", name, ratio, error)
                        continue
                    if compressor.report is not None:
                        yield _result(name, ratio, compressor.report, inputs)
            finally:
                compressor.restore()
                compressor.release()


def _ratios(config: LosslessLowRankConfig, keep_ratios: Sequence[float]) -> list[float | None]:
    """Return the sizes to ask a method for, the largest first, as certificates are read."""
    return [*sorted(set(keep_ratios), reverse=True)] if OBJECTIVES[config.objective].sized else [None]


def _inputs(
    model: PreTrainedModel,
    parts: tuple[Any, Any],
    options: dict[str, Any],
    configs: dict[str, LosslessLowRankConfig],
    changes: dict[str, Any],
) -> str:
    digests, batch_size = [], next(iter(configs.values())).batch_size
    for data in parts:
        if data is not None:
            digests.append(
                combined_digest(item_digests(make_dataloader(data, model, batch_size=batch_size, **options), model))
            )
    with at_hand(model):
        return content_digest([tensors_fingerprint(model.state_dict()), digests, changes])


def _result(name: str, ratio: float | None, report: CompressionReport, inputs: str) -> MethodResult:
    dense, compressed, certificate = report.dense, report.compressed, report.certificate
    change = None
    if dense.accuracy is not None and compressed.accuracy is not None:
        change = compressed.accuracy - dense.accuracy
    return MethodResult(
        method=name,
        keep_ratio=ratio,
        parameters=report.keep_ratio,
        bytes=(compressed.bytes or 0) / (dense.bytes or 1),
        loss_increase=compressed.loss - dense.loss,
        accuracy_change=change,
        divergence=None if certificate is None else certificate.divergence,
        status="none" if certificate is None else certificate.status,
        latency=None if report.speed is None else report.speed.ratio,
        seconds=sum(report.seconds.get(stage, 0.0) for stage in STAGES),
        inputs=inputs,
    )
