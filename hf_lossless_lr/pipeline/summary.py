"""From a calibration and its trials to a `CompressionReport`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ..checkpoint import CompressionOptions, LosslessLowRankConfig
from ..errors import CertificateError
from ..factors import LossCurve
from ..fingerprint import tensors_fingerprint
from ..layers import HEADS, checkpoint_bytes, format_of, stored_bytes
from ..ranks import Choice, kept_share
from ..report import (
    Certificate,
    CompressionReport,
    LayerReport,
    Measurement,
    SkippedWeight,
    Speed,
    TrialRecord,
    finite,
)
from ..verdict import CERTIFIED, PairedOutcomes, certify, demoted, not_improved
from ..versions import versions
from .calibration import Calibration
from .trial import Trial

UNEXPLAINED = (
    "the loss does not show which logits answer to which labels, so there is no accuracy, and units are all labels "
    "that are not ignored"
)
DRAWN = (
    "labels of the calibration data, and of held-out data that had none, were drawn from the dense model's "
    "predictions: there, the loss increase is an estimate of the divergence from them, and the accuracy that of "
    "agreeing with draws"
)

Certified = tuple[float, bool]
"""The share that a model keeps, and whether it was certified on the held-out data."""

HEADLESS = (
    "the model has no head: its normalized representations are compared with the dense model's, and the loss is "
    "1 − cosine, in the mean over embeddings or over tokens"
)


def visited_point(curves: Mapping[str, LossCurve], trial: Trial, config: LosslessLowRankConfig) -> TrialRecord:
    """Return the record of a trial for the report."""
    predicted = sum(
        curves[name].in_form(choice.form).predicted_loss(choice.rank, choice.format)
        for name, choice in trial.choices.items()
        if choice != Choice()
    )
    record = TrialRecord(kept_share(curves, trial.choices), predicted, trial.refitted)
    if trial.loss is not None:
        passes = trial.passes(config.loss_margin, config.accuracy_margin)
        mean, upper = finite([trial.loss.mean, trial.loss.upper])
        record = replace(record, loss_increase=mean, loss_increase_upper=upper, passes=passes)
    if trial.accuracy_drop is not None:
        mean, upper = finite([trial.accuracy_drop.mean, trial.accuracy_drop.upper])
        record = replace(record, accuracy_drop=mean, accuracy_drop_upper=upper)
    return record


def make_report(
    calibration: Calibration,
    config: LosslessLowRankConfig,
    trial: Trial,
    trials: list[TrialRecord],
    epsilon: dict[str, float] | None,
    outcomes: PairedOutcomes,
    kept: float,
    earlier: Sequence[Certified],
    seconds: Mapping[str, float],
    speed: Speed | None,
) -> CompressionReport:
    """Return the report of a compression.

    Args:
        calibration: the calibration.
        config: the choices.
        trial: the chosen trial.
        trials: records of every point visited.
        epsilon: noise bounds of the paper's objectives.
        outcomes: both models' answers to the held-out data.
        kept: the share that the model keeps, of what the budget counts.
        earlier: what was judged on the same data.
        seconds: time of each stage.
        speed: how long both models take.

    Returns:
        The report.
    """
    dense_model, factors = calibration.dense, calibration.factors
    statistics, fingerprints = calibration.statistics, calibration.parts.fingerprints
    loss, accuracy = outcomes.mean_loss, outcomes.accuracy or (None, None)
    model = dense_model.model
    parameters, sizes = (dense_model.parameters, model.num_parameters()), (dense_model.bytes, checkpoint_bytes(model))
    dense, compressed = (Measurement(*values) for values in zip(loss, accuracy, parameters, sizes, strict=True))
    certificate, uncertified = certificate_of(
        bool(trial.layers), config, outcomes, fingerprints["held_out"], kept, earlier
    )
    return CompressionReport(
        model=type(dense_model.model).__name__,
        config={f.name: getattr(config, f.name) for f in fields(CompressionOptions)},
        layers={
            name: _layer_report(module, factors.curves[name], trial.choices[name], trial.layers.get(name))
            for name, module in factors.targets.chosen.items()
        },
        skipped=_stored_as(factors.skipped, trial.layers),
        refitted=trial.refitted,
        trials=trials,
        dense=dense,
        compressed=compressed,
        certificate=certificate,
        uncertified=uncertified,
        calibration={
            "examples": statistics.examples,
            "units": statistics.units,
            "loss": statistics.loss,
        },
        held_out={"examples": outcomes.examples, "units": int(outcomes.units.sum())},
        fingerprints=fingerprints,
        model_fingerprint=dense_model.fingerprint,
        epsilon=epsilon,
        versions=versions(),
        seconds=dict(seconds),
        compressed_fingerprint=tensors_fingerprint(dense_model.model.state_dict()),
        speed=speed,
        memory=calibration.memory,
        notes=_notes(outcomes, config),
    )


def _notes(outcomes: PairedOutcomes, config: LosslessLowRankConfig) -> tuple[str, ...]:
    if outcomes.headless:
        return (HEADLESS,)
    return (UNEXPLAINED,) * (not outcomes.explained) + (DRAWN,) * (config.labels == "model")


def certificate_of(
    changed: bool,
    config: LosslessLowRankConfig,
    outcomes: PairedOutcomes,
    fingerprint: str,
    kept: float,
    earlier: Sequence[Certified],
) -> tuple[Certificate | None, str | None]:
    """Return the certificate of a model, or why there is none.

    Args:
        changed: whether anything was compressed.
        config: margins and confidence.
        outcomes: both models' answers to the held-out data.
        fingerprint: of these data.
        kept: the share that the model keeps, of what the budget counts.
        earlier: what was judged on the same data.

    Returns:
        The certificate, and the reason.
    """
    if not changed:
        return None, "nothing was compressed"
    if any(share < kept for share, _ in earlier):
        return None, (
            "the held-out data were used already, for a model that keeps less; ask for ratios in descending order, "
            "or calibrate with another eval_dataset"
        )
    try:
        certificate = certify(outcomes, config.loss_margin, config.accuracy_margin, config.confidence, fingerprint)
    except CertificateError as error:
        return None, str(error)
    if all(before for _, before in earlier):
        several = "that is not corrected for the models that were judged on the same examples before"
        return not_improved(certificate, several) if earlier else certificate, None
    return demoted(certificate, "a model that keeps more was not certified on the same examples"), None


def is_certified(certificate: Certificate | None) -> bool:
    """Return whether a certificate says that a model is as good as the dense one."""
    return certificate is not None and certificate.status in CERTIFIED


def _stored_as(skipped: Mapping[str, SkippedWeight], layers: Mapping[str, Any]) -> dict[str, SkippedWeight]:
    """Return what was no target, with the number format that it is stored in; heads among the layers are refitted."""
    stored = dict(skipped)
    for name in skipped.keys() & layers.keys():
        reason = skipped[name].reason
        reason += ", refitted" if reason in HEADS else ""
        stored[name] = replace(skipped[name], format=format_of(layers[name]), reason=reason)
    return stored


def _layer_report(module: Any, curve: LossCurve, choice: Choice, layer: Any) -> LayerReport:
    rank, number_format, form = choice
    whole, curve = curve, curve.in_form(form)
    rounding = None if choice == Choice() else curve.rounding[number_format]
    return LayerReport(
        layer_type=type(module).__name__,
        out_features=curve.out_features,
        in_features=curve.in_features,
        rank=rank,
        storage=None if rank is None else getattr(layer, "inner", layer).storage,
        dense_parameters=whole.dense_parameters,
        parameters=curve.parameters(rank, number_format),
        first_order=None if curve.first_order is None else 0.0 if rank is None else float(curve.first_order[rank]),
        second_order=curve.base if rank is None else float(curve.second_order[rank]),
        format=number_format,
        form=form,
        groups=curve.groups,
        rounding=0.0 if rounding is None else rounding.at(rank),
        dense_bytes=stored_bytes(module),
        bytes=stored_bytes(module if layer is None else layer),
    )
