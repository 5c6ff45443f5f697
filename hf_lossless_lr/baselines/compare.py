"""Compare methods on one model: the same statistics, splits and held-out data for all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import DEFAULT_SELECTION, LosslessLowRankConfig
from ..data import make_dataloader, ready_batches
from ..errors import ConfigurationError
from ..fingerprint import batch_fingerprint, content_digest, tensors_fingerprint
from ..layers import at_hand
from ..pipeline import Judgement, LowRankCompressor
from ..processes import make_accelerator
from ..ranks import OBJECTIVES
from ..report import CERTIFIED, MethodResult
from .methods import BASELINES, method_config

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
        methods: names in `METHODS`.
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
    configs = {name: method_config(name, **changes) for name in dict.fromkeys(methods)}
    for size in keep_ratios:
        LosslessLowRankConfig(keep_ratio=size)  # refuses what is none
    ratios = {name: _ratios(config, keep_ratios) for name, config in configs.items()}
    data = _read_once(model, (calib_dataset, eval_dataset), configs, data_collator, processing_class)
    inputs = _inputs(model, data, changes)
    if any(result.inputs != inputs for result in known):
        raise ConfigurationError(
            "the known results are of another model, other data, or other options. Give another file for the records."
        )
    done = {(result.method, result.keep_ratio) for result in known}
    accelerator = make_accelerator()
    with tempfile.TemporaryDirectory(prefix="hf-lossless-lr-") as own:
        folder = [own]
        broadcast_object_list(folder)  # the main process writes the statistics
        for name in sorted(configs, key=lambda each: not OBJECTIVES[configs[each].objective].needs_noise):
            missing = [ratio for ratio in ratios[name] if (name, ratio) not in done]
            if not missing:
                continue
            compressor = LowRankCompressor(configs[name])
            statistics = Path(folder[0]) / f"{configs[name].selection_fraction}.safetensors"
            try:
                compressor.calibrate(model, data[0], eval_dataset=data[1], statistics_path=statistics)
                before = [result for result in known if result.method == name and result.bytes < 1]  # compressed
                compressor.recall((_kept(result, configs), result.status in CERTIFIED) for result in before)
                for ratio in missing:
                    try:
                        found = _judged(compressor, model, name, ratio)
                    except ConfigurationError as error:
                        logger.warning("%s is left out at %s: %s", name, ratio, error)
                        continue
                    yield _result(name, ratio, found, inputs)
            finally:
                compressor.restore()
                compressor.release()
        accelerator.wait_for_everyone()  # before the folder goes


def _kept(result: MethodResult, configs: Mapping[str, LosslessLowRankConfig]) -> float:
    """Return the share that a result keeps, as certificates are given by it: see `Judgement.share`."""
    if result.method not in BASELINES:
        return result.keep_ratio or 0.0
    return result.bytes if configs[result.method].size == "bytes" else result.parameters


def _ratios(config: LosslessLowRankConfig, keep_ratios: Sequence[float]) -> list[float | None]:
    """Return the sizes to ask a method for, the largest first, as certificates are read."""
    return [*sorted(set(keep_ratios), reverse=True)] if OBJECTIVES[config.objective].sized else [None]


def _read_once(
    model: PreTrainedModel,
    parts: tuple[Any, Any],
    configs: Mapping[str, LosslessLowRankConfig],
    data_collator: Any,
    processing_class: Any,
) -> list[Any]:
    """Return the calibration and the held-out data so that each method can read them: they may be streams."""
    config = next(iter(configs.values()))
    options = {"data_collator": data_collator, "processing_class": processing_class, "batch_size": config.batch_size}
    read: list[Any] = []
    for data, name in zip(parts, ("calib_dataset", "eval_dataset"), strict=True):
        if data is None:
            read.append(None)
            continue
        loader = make_dataloader(data, model, name=name, max_examples=config.max_examples, **options)
        read.append(list(loader) if ready_batches(loader) else loader)
    return read


def _inputs(model: PreTrainedModel, parts: Iterable[Any], changes: dict[str, Any]) -> str:
    digests = [[batch_fingerprint(batch) for batch in data] for data in parts if data is not None]  # with labels
    with at_hand(model):
        return content_digest([tensors_fingerprint(model.state_dict()), digests, changes])


def _judged(compressor: LowRankCompressor, model: PreTrainedModel, name: str, ratio: float | None) -> Judgement:
    if name in BASELINES:
        method = BASELINES[name]
        given: dict[str, Any] = {"statistics": compressor.calibration_statistics} if method.reads else {}
        given |= {"model": model, "data": compressor.calibration_data} if method.trains else {}
        return compressor.judge(partial(method.layers, keep_ratio=ratio or 1.0, **given))
    compressor.compress_to(ratio)
    report: Any = compressor.report
    dense, compressed = report.dense, report.compressed
    return Judgement(
        keep_ratio=report.keep_ratio,
        bytes=compressed.bytes / dense.bytes,
        loss=(dense.loss, compressed.loss),
        accuracy=None if compressed.accuracy is None else (dense.accuracy, compressed.accuracy),
        certificate=report.certificate,
        speed=report.speed,
        seconds=sum(report.seconds.get(stage, 0.0) for stage in STAGES),
    )


def _result(name: str, ratio: float | None, found: Judgement, inputs: str) -> MethodResult:
    certificate = found.certificate
    return MethodResult(
        method=name,
        keep_ratio=ratio,
        parameters=found.keep_ratio,
        bytes=found.bytes,
        loss_increase=found.loss[1] - found.loss[0],
        accuracy_change=None if found.accuracy is None else found.accuracy[1] - found.accuracy[0],
        divergence=None if certificate is None else certificate.divergence,
        status="none" if certificate is None else certificate.status,
        latency=None if found.speed is None else found.speed.ratio,
        seconds=found.seconds,
        inputs=inputs,
    )
