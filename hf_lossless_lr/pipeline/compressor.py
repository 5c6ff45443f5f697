"""`LowRankCompressor`: the stages of a compression in their order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..checkpoint import LosslessLowRankConfig, attach_card
from ..errors import ConfigurationError
from ..layers import (
    ModelState,
    at_hand,
    check_gradients,
    check_model,
    find_targets,
    finish,
    in_place,
    on_device,
    own_config,
    replace_modules,
    unfuse,
    values_of,
)
from ..ranks import OBJECTIVES, Budget, LatencyTable, share_of_budget
from ..report import CompressionReport
from ..statistics import CalibrationStatistics
from ..timing import Clock
from ..verdict import paired_outcomes
from .agreeing import check_same
from .budget import budget_of
from .calibration import Calibration, calibrate, check_unchanged
from .choosing import choose
from .judging import Judgement, Make, judge
from .memory import memory_bytes
from .placing import put_in_place
from .speed import measured_speed
from .splitting import split
from .summary import Certified, is_certified, make_report


class LowRankCompressor:
    """Compress a trained model by low-rank factorization, without fine-tuning.

    Example:
        ```python
        compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.5))
        model = compressor.compress(model, calib_dataset, eval_dataset=held_out, processing_class=tokenizer)
        print(compressor.report.keep_ratio, compressor.report.compressed.loss - compressor.report.dense.loss)
        model.save_pretrained("compressed")
        ```

    One calibration serves any ratio:
        ```python
        compressor.calibrate(model, calib_dataset, eval_dataset=held_out, processing_class=tokenizer)
        for keep_ratio in (0.7, 0.5, 0.35):
            compressor.compress_to(keep_ratio).save_pretrained(f"compressed-{keep_ratio}")
        ```

    Args:
        config: the choices.
        max_memory: what a process may have on the device of the work: bytes, or a text such as `10GiB`; default: what
            is free, less a tenth. Where statistics and factors do not fit, they go to disk, and the layers are
            taken in windows, with a pass over the calibration data for each. The results are the same.
        work_dir: a folder for them that is kept: a run that was interrupted goes on with what is finished there, and
            ends with the same result. It serves one model, data and options, and one run at a time.

    Attributes:
        config: the choices; never changed.
        report: the `CompressionReport` of the last successful compression, or None.
    """

    def __init__(
        self,
        config: LosslessLowRankConfig | None = None,
        *,
        max_memory: int | str | None = None,
        work_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if config is not None and not isinstance(config, LosslessLowRankConfig):
            raise ConfigurationError(f"config: must be a LosslessLowRankConfig, got {type(config).__name__}.")
        self.max_memory, self.work_dir = None if max_memory is None else memory_bytes(max_memory), work_dir
        self.config = config if config is not None else LosslessLowRankConfig()
        self.report: CompressionReport | None = None
        self._calibration: Calibration | None = None
        self._budgets: dict[Any, Budget] = {}  # counted so far, by the options
        self._latencies: LatencyTable = {}  # measured so far; they serve other models with such layers, too
        self._certified: list[Certified] = []  # on the held-out data so far
        self._restore_dense: list[Callable[[], None]] = []  # turn the calibrated model back into the dense one

    def compress(
        self,
        model: PreTrainedModel,
        calib_dataset: Any,
        *,
        eval_dataset: Any = None,
        refit_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
    ) -> PreTrainedModel:
        """Compress a model in place and return it: `calibrate`, then `compress_to` the configured objective.

        Under `accelerate launch` or `torchrun` each process handles its share of the data, and all end with the same
        model. The work runs on the accelerator's device; the model ends on the device it came from. On any failure,
        an interrupt included, the model is left exactly as it was.

        Args:
            model: a trained dense model with a task head, in floating point.
            calib_dataset: labelled examples (a `datasets.Dataset` or torch `Dataset`), a `DataLoader`, or a finite
                iterable of batches. A few hundred to a few thousand examples. A share of them,
                `config.selection_fraction`, is kept apart for choosing by measurement.
            eval_dataset: held-out data of the same kinds, for the figures and the certificate in the report. Default:
                a fifth of `calib_dataset`, which then takes no part in the calibration. Examples that are in both are
                left out of the calibration, with a warning.
            refit_dataset: more examples of the same kinds for the refit, which need no labels; several times the
                calibration data improve it. Default: none.
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
        before, report, former = ModelState(model), self.report, self._calibration
        try:
            try:
                self.calibrate(
                    model,
                    calib_dataset,
                    eval_dataset=eval_dataset,
                    refit_dataset=refit_dataset,
                    data_collator=data_collator,
                    processing_class=processing_class,
                )
                self.compress_to()
            finally:
                if self._calibration is not former:  # one of another model stays, where this one cannot be calibrated
                    self.release()
            return model
        except BaseException:  # once more than each stage does for itself: an interrupt may come between any two steps
            self.report = report
            before.restore()
            raise

    def calibrate(
        self,
        model: PreTrainedModel,
        calib_dataset: Any,
        *,
        eval_dataset: Any = None,
        refit_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        statistics_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Do once what every ratio shares: split the data, collect statistics, factorize. See `compress`.

        Args:
            model: a trained dense model; unchanged.
            calib_dataset: as in `compress`.
            eval_dataset: as in `compress`.
            refit_dataset: as in `compress`.
            data_collator: as in `compress`.
            processing_class: as in `compress`.
            statistics_path: a safetensors file for the statistics. If it exists it is read, which saves the pass over
                the data; statistics of another model or of other data are an error. Else it is written.
        """
        check_model(model)
        check_same(model)
        with at_hand(model):
            config, unfused = self.config, unfuse(model)
            with in_place(model, unfused):
                targets = find_targets(model, config.target_modules, config.ignore)
            values_of("ranks", config.given_ranks, targets.chosen, targets.skipped)  # refuses what matches nothing
            options = {"data_collator": data_collator, "processing_class": processing_class}
            parts = split(model, config, calib_dataset, eval_dataset, refit_dataset, options)
            if self.work_dir is not None:  # it is for one calibration at a time
                self.release()
            before, settings = ModelState(model), dict(vars(model.config))  # a loss may set its problem_type
            try:
                with ExitStack() as undo:
                    undo.callback(vars(model.config).update, settings)
                    calibration = calibrate(
                        model, self.config, parts, targets, statistics_path, self.max_memory, self.work_dir, unfused
                    )
            except BaseException:
                before.restore()
                raise
            self.release()
            self._calibration, self._certified = calibration, []

    def compress_to(self, keep_ratio: float | None = None) -> PreTrainedModel:
        """Compress the calibrated model, in place of an earlier compression of it.

        Several ratios share the held-out data. That is sound from the largest ratio down to the first that is not
        certified (fixed-sequence testing), so ask in descending order: a ratio above an earlier one gets no
        certificate, and after one that is not certified none can be.

        Args:
            keep_ratio: size kept divided by original size, in (0, 1], as the configuration counts it; default: the
                configured objective.

        Returns:
            The model.

        Raises:
            ConfigurationError: if nothing was calibrated, or the size cannot be reached.
            TargetError: if the model was changed since it was calibrated.
        """
        calibration, config = self._calibrated("compress_to()"), self.config
        clock = Clock(calibration.seconds)  # times of this ratio alone
        if keep_ratio is not None:
            objective = config.objective if OBJECTIVES[config.objective].sized else "budget"
            config = replace(config, objective=objective, keep_ratio=keep_ratio, epsilon=None, ranks=None)
        model = calibration.dense.model
        check_gradients()
        self.restore()
        before, undo = ModelState(model), list[Callable[[], None]]()
        try:
            with at_hand(model):
                check_unchanged(calibration)
                replaced = replace_modules(model, calibration.dense.unfused)
                undo.append(replaced.undo)
                with on_device(model, calibration.accelerator.device, calibration.factors.targets.chosen.values()):
                    restore_config = own_config(model)
                    undo.append(restore_config)
                    budget = self._budget(calibration, config)
                    given = self.config.objective == "ranks"
                    trial, trials, epsilon = choose(calibration, config, budget, clock, given)
                    with clock.timed("held_out"):
                        data, accelerator = calibration.parts.held_out, calibration.accelerator
                        outcomes = paired_outcomes(model, trial.layers, data, accelerator, "Evaluating", True)
                    with clock.timed("speed"):
                        speed = measured_speed(calibration, trial.layers, replaced.originals, config)
                    put_in_place(calibration, trial, config, replaced, undo)
                    kept = share_of_budget(calibration.factors.curves, trial.choices, budget)
                    found = trials, epsilon, outcomes, kept, self._certified, clock.seconds, speed
                    report = make_report(calibration, config, trial, *found)
                    if trial.layers:
                        attach_card(model, report)
                    else:
                        restore_config()
            self._restore_dense = undo  # success: the changes stay until the next ratio
        except BaseException:
            finish([*reversed(undo), before.restore])
            raise
        self._certified += [(kept, is_certified(report.certificate))] if trial.layers else []
        self.report = report
        return model

    def judge(self, make: Make) -> Judgement:
        """Judge layers of another method in place of the calibrated model's targets, as `compress_to` judges its own.

        Args:
            make: from the targets by name, which it leaves as they are, to what takes their places.

        Returns:
            What they make of the model, which is dense again.

        Raises:
            ConfigurationError: if nothing was calibrated.
            TargetError: if the model was changed since it was calibrated.
        """
        calibration = self._calibrated("judge()")
        self.restore()
        found = judge(calibration, self.config, make, self._certified)
        self._certified += [(found.share(self.config), is_certified(found.certificate))] if found.changed else []
        return found

    def recall(self, judged: Iterable[Certified]) -> None:
        """Take in what was judged on the same held-out data before, as by another process.

        Args:
            judged: for each model the share that it keeps, and whether it was certified.
        """
        self._certified += judged

    @property
    def calibration_data(self) -> DataLoader:
        """The examples that the model is calibrated on: neither held out nor kept apart for choosing."""
        return self._calibrated("calibration_data").parts.calibration

    @property
    def calibration_statistics(self) -> CalibrationStatistics:
        """What was collected on them."""
        return self._calibrated("calibration_statistics").statistics

    def restore(self) -> None:
        """Make the calibrated model dense again, with its original layers."""
        finish(reversed(self._restore_dense))
        self._restore_dense = []

    def release(self) -> None:
        """Forget the calibration (statistics, factorizations, the dense layers); the compressed model stays."""
        if self._calibration is not None:
            self._calibration.close()
        self._calibration, self._restore_dense, self._budgets = None, [], {}

    def _calibrated(self, asked: str) -> Calibration:
        if self._calibration is None:
            raise ConfigurationError(f"{asked} needs a calibration: call calibrate(model, calib_dataset) first.")
        return self._calibration

    def _budget(self, calibration: Calibration, config: LosslessLowRankConfig) -> Budget:
        """Return what the configured size counts; all ratios of a calibration go by one table."""
        key = config.size, config.scope, config.rank_multiple, config.embeddings
        if key not in self._budgets:
            self._budgets[key] = budget_of(calibration, config, self._latencies)
        return self._budgets[key]
