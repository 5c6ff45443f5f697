"""`CompressionReport`: the result of a compression as plain data, to and from JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import write_atomically
from ..renamed import Renamed, with_present_names
from .memory import MemoryPlan
from .reading import contradiction, impossible, typed
from .speed import Speed
from .weights import LayerReport, SkippedWeight

REPORT_NAME = "compression_report.json"


@dataclass(frozen=True)
class Measurement:
    """Loss and metric of one model on the held-out data.

    Attributes:
        loss: mean loss per labelled unit, in nats.
        accuracy: share of labelled units answered correctly, or None where the head has no such thing.
        parameters: parameters of the whole model, each counted once.
        bytes: bytes of all tensors of its checkpoint; None in a report of before.
    """

    loss: float
    accuracy: float | None
    parameters: int
    bytes: int | None = None


@dataclass(frozen=True)
class Difference:
    """A mean difference between two models on the same examples, positive where the compressed model is worse.

    Attributes:
        mean: mean difference per labelled unit.
        lower: one-sided lower confidence bound; without one, minus infinity, which is null in JSON.
        upper: one-sided upper confidence bound; without one, infinity, which is null in JSON.
    """

    mean: float
    lower: float = field(metadata={"endless": -math.inf})
    upper: float = field(metadata={"endless": math.inf})


@dataclass(frozen=True)
class TrialRecord:
    """One point that was visited on the way, as it was predicted and as it was measured on the selection split.

    Attributes:
        keep_ratio: parameters kept divided by original parameters, over the weights of the targeted layers.
        predicted_loss_increase: sum of the layers' predicted second-order terms, in nats.
        refitted: whether the factors were refitted to the shifted inputs.
        loss_increase: measured mean loss increase in nats; None where nothing was measured.
        loss_increase_upper: its upper confidence bound; None where there is none, as for a single example.
        accuracy_drop: measured drop of the accuracy; None where the head does not classify, too.
        accuracy_drop_upper: its upper confidence bound.
        passes: whether both bounds are inside the margins; None where nothing was measured.
    """

    keep_ratio: float
    predicted_loss_increase: float
    refitted: bool
    loss_increase: float | None = None
    loss_increase_upper: float | None = None
    accuracy_drop: float | None = None
    accuracy_drop_upper: float | None = None
    passes: bool | None = None


@dataclass(frozen=True)
class Certificate(Renamed):
    """A statistical statement about a compressed model, from held-out examples that had no part in making it.

    Pairs are (dense, compressed).

    Attributes:
        status: `improved`, `lossless`, `inconclusive` or `lossy`.
        reasons: why it is not better than that.
        loss_margin: largest loss increase that counts as lossless, in nats per labelled unit.
        accuracy_margin: largest drop of the accuracy that counts as lossless, as a fraction.
        confidence: confidence level of each bound.
        p_value: largest p-value among the hypotheses "worse than the margin".
        examples: number of examples.
        units: number of labelled units.
        clusters: what is taken as independent: `examples` or `batches`.
        fingerprint: SHA-256 of the examples.
        loss: mean loss of both models, in nats.
        loss_increase: its difference.
        accuracy: accuracy of both models, or None where the head does not classify.
        accuracy_drop: its difference.
        chance: accuracy of always giving the most frequent answer.
        temperatures: temperature of the logits that minimizes the loss of each model; None if not by example.
        tempered_loss_increase: difference of the losses at those temperatures.
        calibration_error: expected calibration error of both models.
        changed: share of the units that the two models answer differently.
        divergence: mean KL divergence from the dense model's predictions, in nats per unit.
        examples_needed: examples that would show it with 80 % power if the differences stay as measured; None if no
            number would.
    """

    status: str
    reasons: tuple[str, ...]
    loss_margin: float
    accuracy_margin: float
    confidence: float
    p_value: float
    examples: int
    units: int
    clusters: str
    fingerprint: str
    loss: tuple[float, float]
    loss_increase: Difference
    accuracy: tuple[float, float] | None
    accuracy_drop: Difference | None
    chance: float | None
    temperatures: tuple[float, float] | None
    tempered_loss_increase: Difference | None
    calibration_error: tuple[float, float] | None
    changed: float | None
    divergence: float | None
    examples_needed: int | None

    @property
    def verdict(self) -> str:
        """The status, with its margins where they are what it states."""
        if self.status != "lossless":
            return self.status
        points = 100 * self.accuracy_margin
        metric = f", {points:g} point{'' if points == 1 else 's'}" if self.accuracy_drop is not None else ""
        return f"lossless@({self.loss_margin:g} nats{metric})"


@dataclass(frozen=True)
class CompressionReport(Renamed):
    """Everything that a compression run decided and measured.

    Attributes:
        model: class name of the model.
        config: the configuration, without the manifest.
        layers: targeted layer to what became of it.
        refitted: whether the factors were refitted to the shifted inputs (and that helped).
        trials: every point visited on the way.
        skipped: every other weight that is like a matrix, and why it was no target.
        dense: the dense model on held-out data.
        compressed: the compressed model on the same data.
        certificate: what the held-out data show, or None.
        uncertified: why there is no certificate, or None.
        calibration: number of examples and labelled units of the calibration data, and the loss on them.
        held_out: number of examples and labelled units of the held-out data.
        fingerprints: SHA-256 of the examples of each part of the data, and of the whole `calib_dataset`.
        model_fingerprint: SHA-256 of the dense model's state dict.
        epsilon: elementwise noise bound of each layer, for the paper's objectives.
        versions: versions of this package and of what it ran on.
        seconds: time of each stage.
        compressed_fingerprint: SHA-256 of the compressed model's state dict, which is what all figures are about; None
            in a report of before.
        notes: what a reader has to know about the figures.
        speed: how long both models take for a batch of the calibration data, on the device of the compression.
        memory: how the calibration kept within its memory.
    """

    model: str
    config: dict[str, Any]
    layers: dict[str, LayerReport]
    skipped: dict[str, SkippedWeight]
    refitted: bool
    trials: list[TrialRecord]
    dense: Measurement
    compressed: Measurement
    certificate: Certificate | None
    uncertified: str | None
    calibration: dict[str, Any]
    held_out: dict[str, Any]
    fingerprints: dict[str, str]
    model_fingerprint: str
    epsilon: dict[str, float] | None
    versions: dict[str, str]
    seconds: dict[str, float]
    compressed_fingerprint: str | None = None
    notes: tuple[str, ...] = ()
    speed: Speed | None = None
    memory: MemoryPlan | None = None

    @property
    def keep_ratio(self) -> float:
        """Parameters kept divided by original parameters, over the weights of the targeted layers."""
        kept = sum(layer.parameters for layer in self.layers.values())
        return kept / sum(layer.dense_parameters for layer in self.layers.values())

    @property
    def model_keep_ratio(self) -> float:
        """Parameters kept divided by original parameters, over the whole model."""
        return self.compressed.parameters / self.dense.parameters

    @property
    def predicted_loss_increase(self) -> float:
        """Sum of the layers' predicted second-order terms and of what their rounding is predicted to cost, in nats."""
        return sum(layer.second_order + layer.rounding for layer in self.layers.values())

    @property
    def bytes_ratio(self) -> float | None:
        """Bytes kept divided by original bytes, over the weights of the targeted layers; None where not counted."""
        pairs = [(layer.dense_bytes, layer.bytes) for layer in self.layers.values()]
        dense, kept = sum(pair[0] or 0 for pair in pairs), sum(pair[1] or 0 for pair in pairs)
        return kept / dense if dense and kept else None

    @property
    def verdict(self) -> str:
        """`improved`, `lossless@(margins)`, `inconclusive`, `lossy`, or `none`; the certificate says more."""
        return "none" if self.certificate is None else self.certificate.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with the derived ratios beside the fields, and None for what is not finite."""
        derived = ("keep_ratio", "model_keep_ratio", "predicted_loss_increase", "verdict")
        return dict(finite({**asdict(self), **{name: getattr(self, name) for name in derived}}))

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CompressionReport:
        """Read a report.

        Args:
            text: what `to_json` returned.

        Returns:
            The report.

        Raises:
            CheckpointError: if the text is no report, or one whose numbers contradict each other.
        """
        try:
            data = with_present_names(json.loads(text))
            for part in ("config", "fingerprints", "certificate"):
                if data[part] is not None:
                    data[part] = with_present_names(data[part])
            skipped = data["skipped"].items()
            data["skipped"] = {n: {"reason": entry} if isinstance(entry, str) else entry for n, entry in skipped}
            report: CompressionReport = typed(cls, data, "report", ignore=True)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"this is no compression report: {error!r}.") from error
        problem = impossible(report)
        if problem is None and report.certificate is not None:
            problem = contradiction(report.certificate)
        if problem is not None:
            raise CheckpointError(f"this compression report contradicts itself: {problem}. It was edited or damaged.")
        return report

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `compression_report.json` into a directory, atomically.

        Args:
            directory: an existing directory.

        Returns:
            The path written.
        """
        return write_atomically(Path(directory) / REPORT_NAME, self.to_json())


def finite(data: Any) -> Any:
    """Return plain data with None for each number that is infinite or not a number: JSON has neither."""
    if isinstance(data, dict):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
