"""`LowRankCompressor`: the stages of a compression in their order."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import fields
from importlib.metadata import version
from statistics import NormalDist
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from .batches import make_dataloader, split_holdout
from .config import CompressionOptions, LosslessLowRankConfig
from .curves import LossCurve, choose_storage
from .errors import NumericalError, TargetError
from .factorization import Factorization, factorize, loss_curve
from .fingerprint import tensors_fingerprint
from .layouts import layout_of, weight_matrix
from .modules import is_factorized
from .neighbourhood import calibrate_epsilon
from .quantizer import mark_compressed, unmark_compressed
from .rank_selection import Ranks, select_budget, select_compact, select_lossless, select_paper, select_uniform
from .replacement import replace_modules
from .report import CompressionReport, LayerReport, Measurement
from .statistics import CalibrationStatistics, collect_statistics
from .targets import TargetSelection, find_targets
from .verification import evaluate

logger = logging.get_logger(__name__)


class LowRankCompressor:
    """Compress a trained model by low-rank factorization, without fine-tuning.

    Example:
        ```python
        compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5))
        model = compressor.compress(model, calib_dataset, eval_dataset=held_out, processing_class=tokenizer)
        print(compressor.report.keep_ratio, compressor.report.compressed.loss - compressor.report.dense.loss)
        model.save_pretrained("compressed")
        ```

    Attributes:
        config: the choices; never changed.
        report: the `CompressionReport` of the last successful `compress`, or None.
    """

    def __init__(self, config: LosslessLowRankConfig | None = None) -> None:
        self.config = config if config is not None else LosslessLowRankConfig()
        self.report: CompressionReport | None = None

    def compress(
        self,
        model: PreTrainedModel,
        calib_dataset: Any,
        *,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
    ) -> PreTrainedModel:
        """Compress a model in place and return it.

        Under `accelerate launch` or `torchrun` each process handles its share of the data, and all end with the same
        model. The work runs on the accelerator's device; the model ends on the device it came from. On any failure,
        an interrupt included, the model is left exactly as it was.

        Args:
            model: a trained dense model with a task head, in floating point.
            calib_dataset: labelled examples (a `datasets.Dataset` or torch `Dataset`), a `DataLoader`, or a finite
                iterable of batches. A few hundred to a few thousand examples.
            eval_dataset: held-out data of the same kinds, for the losses in the report. Default: a fifth of
                `calib_dataset`, which then takes no part in the calibration.
            data_collator: collator for examples; default as in `Trainer`.
            processing_class: tokenizer or processor, for the default collator.

        Returns:
            The same model, with factorized layers; `self.report` says what was done.

        Raises:
            ConfigurationError: if the chosen size cannot be reached.
            TargetError: if the model cannot be compressed, or no layer of it is chosen.
            DataError: if the data is empty, too small, unlabelled, or does not fit the model.
            NumericalError: if a loss, a gradient or a decomposition is not finite.
        """
        check_model(model)
        selection = find_targets(model, self.config.target_modules, self.config.ignore)
        options = {"batch_size": self.config.batch_size, "processing_class": processing_class}
        options["data_collator"] = data_collator
        calibration = make_dataloader(calib_dataset, model, **options)
        if eval_dataset is None:
            calibration, evaluation = split_holdout(calibration, self.config.seed)
        else:
            evaluation = make_dataloader(eval_dataset, model, name="eval_dataset", **options)
        accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
        with _on_device(model, accelerator.device), ExitStack() as undo:
            undo.callback(vars(model.config).update, dict(vars(model.config)))  # a loss may set config.problem_type
            report = self._run(model, selection, calibration, evaluation, accelerator, undo)
            undo.pop_all()  # success: the changes stay
        self.report = report
        return model

    def _run(
        self,
        model: PreTrainedModel,
        selection: TargetSelection,
        calibration: DataLoader,
        evaluation: DataLoader,
        accelerator: Accelerator,
        undo: ExitStack,
    ) -> CompressionReport:
        """Run the stages; what changes the model registers its reversal in `undo`."""
        seconds: dict[str, float] = {}
        targets = selection.targets
        fingerprint, dense_parameters = tensors_fingerprint(model.state_dict()), model.num_parameters()
        with _timed(seconds, "evaluate_dense"):
            before = evaluate(model, evaluation, accelerator, "Evaluating the dense model")
        with _timed(seconds, "statistics"):
            statistics = collect_statistics(model, targets, calibration, accelerator)
        with _timed(seconds, "factorization"):
            factorizations, curves = self._factorize(targets, statistics)
        with _timed(seconds, "selection"):
            epsilon = self._epsilon(model, targets, factorizations, calibration, accelerator)
            ranks = self._select(curves, epsilon)
        if all(rank is None for rank in ranks.values()):
            logger.warning("no rank meets objective=%r in any layer; the model stays dense.", self.config.objective)
        with _timed(seconds, "replacement"):
            storages = self._replace(model, targets, factorizations, ranks, undo)
        with _timed(seconds, "evaluate_compressed"):
            after = evaluate(model, evaluation, accelerator, "Evaluating the compressed model")
        return CompressionReport(
            model=type(model).__name__,
            config={f.name: getattr(self.config, f.name) for f in fields(CompressionOptions)},
            layers={
                name: _layer_report(module, curves[name], ranks[name], storages.get(name))
                for name, module in targets.items()
            },
            skipped=selection.skipped,
            dense=Measurement(before.loss, before.accuracy, dense_parameters),
            compressed=Measurement(after.loss, after.accuracy, model.num_parameters()),
            calibration={
                "examples": statistics.examples,
                "units": statistics.units,
                "loss": statistics.loss,
                "fingerprint": statistics.data_fingerprint,
            },
            evaluation={"examples": after.examples, "units": after.units},
            model_fingerprint=fingerprint,
            epsilon=epsilon,
            versions=_versions(),
            seconds=seconds,
        )

    def _factorize(
        self, targets: Mapping[str, nn.Module], statistics: CalibrationStatistics
    ) -> tuple[dict[str, Factorization], dict[str, LossCurve]]:
        factorizations, curves = {}, {}
        for name, module in logging.tqdm(targets.items(), desc="Factorizing"):
            weight, stats = weight_matrix(module), statistics.layers[name]
            try:
                factorizations[name] = factorize(weight, stats, str(self.config.metric), self.config.damping)
            except NumericalError as error:
                raise NumericalError(f"{name!r}: {error}") from error
            with_noise = self.config.objective.startswith("paper-")
            curves[name] = loss_curve(weight, factorizations[name], stats, self.config.storage, with_noise)
        return factorizations, curves

    def _epsilon(
        self,
        model: PreTrainedModel,
        targets: Mapping[str, nn.Module],
        factorizations: Mapping[str, Factorization],
        calibration: DataLoader,
        accelerator: Accelerator,
    ) -> dict[str, float] | None:
        """Return the noise bound of each layer for the paper's objectives."""
        if not self.config.objective.startswith("paper-"):
            return None
        if self.config.epsilon is not None:
            return dict.fromkeys(targets, self.config.epsilon)
        tolerance = self.config.epsilon_tolerance
        return calibrate_epsilon(model, targets, factorizations, calibration, accelerator, tolerance)

    def _select(self, curves: Mapping[str, LossCurve], epsilon: Mapping[str, float] | None) -> Ranks:
        config = self.config
        z = NormalDist().inv_cdf(config.confidence)
        match config.objective:
            case "budget":
                return select_budget(curves, float(config.keep_ratio or 1), config.rank_multiple)
            case "uniform":
                return select_uniform(curves, float(config.keep_ratio or 1), config.rank_multiple)
            case "lossless":
                return select_lossless(curves, z, config.rank_multiple)
            case "compact":
                return select_compact(curves, z, config.loss_margin, config.rank_multiple)
            case _:
                return select_paper(curves, epsilon or {}, compact=config.objective == "paper-compact")

    def _replace(
        self,
        model: PreTrainedModel,
        targets: Mapping[str, nn.Module],
        factorizations: Mapping[str, Factorization],
        ranks: Ranks,
        undo: ExitStack,
    ) -> dict[str, str]:
        """Put the factorized layers in, record them in the model's config, and return the storage of each."""
        storages: dict[str, str] = {}
        new: dict[str, nn.Module] = {}
        for name, rank in ranks.items():
            if rank is None:
                continue
            module: Any = targets[name]
            out_features, in_features = weight_matrix(module).shape
            storages[name] = choose_storage(out_features, in_features, rank, self.config.storage)
            layer = layout_of(module).factorized(module, rank, storages[name])
            factors = factorizations[name].truncate(rank, storages[name], layer.pivots_inputs)
            layer.load_factors(*factors, module.bias)
            new[name] = layer
        if not new:
            return storages
        replacement = replace_modules(model, new)
        undo.callback(replacement.undo)
        name_of = {id(module): name for name, module in targets.items()}
        config = deepcopy(self.config)
        config.modules = {
            path: {"rank": ranks[name_of[id(old)]], "storage": storages[name_of[id(old)]]}
            for path, old in replacement.originals.items()
        }
        undo.callback(unmark_compressed, model)
        mark_compressed(model, config)
        return storages


def check_model(model: Any) -> None:
    """Refuse what cannot be compressed, before any work.

    Args:
        model: what the user passed.

    Raises:
        TargetError: if it is no dense floating-point `PreTrainedModel` with its weights loaded.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(
            f"compress() takes a transformers PreTrainedModel, got {type(model).__name__}. Unwrap it first (for PEFT: "
            "`merge_and_unload()`; for DDP: `.module`)."
        )
    name = type(model).__name__
    existing = getattr(model.config, "quantization_config", None)
    if isinstance(existing, LosslessLowRankConfig) or any(is_factorized(module) for module in model.modules()):
        raise TargetError(
            f"this {name} is already compressed. Call `model.dequantize()`, or start from the dense checkpoint."
        )
    if existing is not None or getattr(model, "is_quantized", False):
        raise TargetError(f"this {name} is quantized. Compress it in floating point first and quantize the result.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise TargetError(f"this {name} is on the meta device and has no values. Load its weights first.")


@contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a model that lies on one device, and move it back."""
    original = {parameter.device for parameter in model.parameters()}
    if len(original) != 1 or original == {device} or getattr(model, "hf_device_map", None):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(original.pop())


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _layer_report(module: nn.Module, curve: LossCurve, rank: int | None, storage: str | None) -> LayerReport:
    return LayerReport(
        layer_type=type(module).__name__,
        out_features=curve.out_features,
        in_features=curve.in_features,
        rank=rank,
        storage=storage,
        dense_parameters=curve.dense_parameters,
        parameters=curve.parameters(rank),
        first_order=0.0 if rank is None else float(curve.first_order[rank]),
        second_order=0.0 if rank is None else float(curve.second_order[rank]),
    )


def _versions() -> dict[str, str]:
    packages = ("hf-lossless-lr", "torch", "transformers", "accelerate", "safetensors", "numpy", "scipy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
