"""From paired outcomes to a verdict: is the compressed model as good, and how sure is that?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..errors import CertificateError
from ..renamed import refusing_old_names
from ..report import CERTIFIED, Certificate, Difference
from .bounds import (
    bootstrap_upper_bound,
    examples_needed,
    expected_calibration_error,
    holm,
    mean_p_value,
    mean_upper_bound,
    proportion_p_value,
    proportion_upper_bound,
)
from .outcomes import PairedOutcomes
from .temperatures import INTERPOLATED, at_fitted_temperatures, temperature_doubt

MIN_EXAMPLES = 30
LOSS, TEMPERED, ACCURACY = "loss", "loss at fitted temperatures", "accuracy"


class _Endpoint(NamedTuple):
    """One difference that a verdict tests: by cluster, with bounds, and the p-value of "beyond the margin"."""

    differences: np.ndarray
    units: np.ndarray
    found: Difference
    margin: float
    p_value: float


def loss_difference(differences: np.ndarray, units: np.ndarray, confidence: float, bootstrap: bool) -> Difference:
    """Return a mean difference with bounds by Student's t over clusters, widened to the BCa bootstrap's if asked.

    Args:
        differences: summed difference of each cluster.  # shape: (clusters,)
        units: labelled units of each cluster.  # shape: (clusters,)
        confidence: level of each one-sided bound.
        bootstrap: whether to take the wider of the two kinds of bounds; it is the safer one, and takes longer.

    Returns:
        The difference per labelled unit.
    """
    upper, lower = (sign * mean_upper_bound(sign * differences, units, confidence) for sign in (1, -1))
    if bootstrap:
        wide = [sign * bootstrap_upper_bound(sign * differences, units, confidence) for sign in (1, -1)]
        upper, lower = max(upper, wide[0]), min(lower, wide[1])
    return Difference(float(differences.sum() / units.sum()), lower, upper)


def accuracy_difference(outcomes: PairedOutcomes, confidence: float, bootstrap: bool) -> Difference | None:
    """Return the drop of the accuracy: Tango's score bounds for one answer an example, else as for the loss.

    Args:
        outcomes: the outcomes.
        confidence: level of each one-sided bound.
        bootstrap: as in `loss_difference`.

    Returns:
        The drop as a fraction, or None where the head does not classify.
    """
    drop = outcomes.accuracy_drop
    if drop is None:
        return None
    if not _one_answer_each(outcomes):
        return loss_difference(drop, outcomes.answers, confidence, bootstrap)
    lost, gained, count = int((drop > 0).sum()), int((drop < 0).sum()), len(drop)
    upper = proportion_upper_bound(lost, gained, count, confidence)
    return Difference(float(drop.mean()), -proportion_upper_bound(gained, lost, count, confidence), upper)


def _one_answer_each(outcomes: PairedOutcomes) -> bool:
    return bool((outcomes.answers == 1).all())


@refusing_old_names
def certify(
    outcomes: PairedOutcomes, loss_margin: float, accuracy_margin: float, confidence: float, fingerprint: str = ""
) -> Certificate:
    """State whether the compressed model is as good as the dense one.

    * `lossless`: the upper bounds of the loss increase, of the loss increase at fitted temperatures and of the drop of
      the accuracy are inside their margins.
    * `improved`: besides, the first two are below 0, the second by what its interpolation may be off.
    * `lossy`: a lower bound is beyond its margin.
    * `inconclusive`: neither; always so, unless `lossy`, for a dense model within two standard errors of chance, or
      one whose best temperature is not inside the range that `TEMPERATURES` are fitted in.

    All bounds must hold at once, so no correction for their number is needed (intersection–union test).

    Args:
        outcomes: answers to the held-out data, with `temperatures=True`.
        loss_margin: largest loss increase that counts as lossless, in nats per labelled unit.
        accuracy_margin: largest drop of the accuracy that counts as lossless, as a fraction.
        confidence: level of each one-sided bound.
        fingerprint: fingerprint of the examples.

    Returns:
        The certificate.

    Raises:
        CertificateError: if there are fewer than 30 examples with a label, or batches where the loss cannot be told
            apart by example, or only one class among the labels.
    """
    _check(outcomes)
    temperatures, increase = at_fitted_temperatures(outcomes)
    endpoints = _endpoints(outcomes, increase, loss_margin, accuracy_margin, confidence)
    chance, chance_doubt = _chance(outcomes)
    doubts = [doubt for doubt in (chance_doubt, temperature_doubt(temperatures)) if doubt]
    status = _status(endpoints, doubts)
    reasons = doubts if status == "inconclusive" else []
    loss = endpoints[LOSS].found
    tempered, drop = (endpoints[name].found if name in endpoints else None for name in (TEMPERED, ACCURACY))
    if temperatures is not None and tempered is not None and loss.mean < 0 and tempered.mean > INTERPOLATED:
        extreme = "less" if temperatures[1] < temperatures[0] else "more"
        reasons.append(
            f"the loss is lower only because the logits are {extreme} extreme: at fitted temperatures it is higher"
        )
    return Certificate(
        status=status,
        reasons=tuple(reasons),
        loss_margin=loss_margin,
        accuracy_margin=accuracy_margin,
        confidence=confidence,
        p_value=max(endpoint.p_value for endpoint in endpoints.values()),
        examples=outcomes.examples,
        units=int(outcomes.units.sum()),
        clusters="examples" if outcomes.by_example else "batches",
        fingerprint=fingerprint,
        loss=outcomes.mean_loss,
        loss_increase=loss,
        accuracy=outcomes.accuracy,
        accuracy_drop=drop,
        chance=chance,
        temperatures=temperatures,
        tempered_loss_increase=tempered,
        calibration_error=_calibration_errors(outcomes),
        changed=None if outcomes.changed is None else float(outcomes.changed.mean()),
        divergence=outcomes.mean_divergence,
        examples_needed=_examples_needed(outcomes, endpoints, confidence),
    )


def _check(outcomes: PairedOutcomes) -> None:
    examples = outcomes.clusters if outcomes.by_example else outcomes.examples
    if examples < MIN_EXAMPLES:
        raise CertificateError(f"{examples} examples are too few for a certificate; it takes at least {MIN_EXAMPLES}.")
    if outcomes.clusters < MIN_EXAMPLES:
        raise CertificateError(
            f"the loss of this model is known by batch only, and {outcomes.clusters} batches are too few for a "
            f"certificate; it takes at least {MIN_EXAMPLES}: set batch_size, as to {max(1, examples // MIN_EXAMPLES)}."
        )
    if outcomes.labels is not None and len(np.unique(outcomes.labels)) == 1:
        raise CertificateError(
            f"all labels of the held-out data are {outcomes.labels[0]}: one class cannot show what a model knows."
        )


def _endpoints(
    outcomes: PairedOutcomes,
    tempered: np.ndarray | None,
    loss_margin: float,
    accuracy_margin: float,
    confidence: float,
) -> dict[str, _Endpoint]:
    """Return what a verdict tests: the loss; where known, the loss at fitted temperatures and the accuracy."""
    endpoints = {}
    for name, differences in ((LOSS, outcomes.loss_increase), (TEMPERED, tempered)):
        if differences is not None:
            found = loss_difference(differences, outcomes.units, confidence, bootstrap=True)
            p_value = mean_p_value(differences, outcomes.units, loss_margin)
            endpoints[name] = _Endpoint(differences, outcomes.units, found, loss_margin, p_value)
    accuracy, drop = accuracy_difference(outcomes, confidence, bootstrap=True), outcomes.accuracy_drop
    if accuracy is not None and drop is not None:
        if _one_answer_each(outcomes):
            p_value = proportion_p_value(int((drop > 0).sum()), int((drop < 0).sum()), len(drop), accuracy_margin)
        else:
            p_value = mean_p_value(drop, outcomes.answers, accuracy_margin)
        endpoints[ACCURACY] = _Endpoint(drop, outcomes.answers, accuracy, accuracy_margin, p_value)
    return endpoints


def _status(endpoints: Mapping[str, _Endpoint], doubts: Sequence[str]) -> str:
    if any(endpoint.found.lower > endpoint.margin for endpoint in endpoints.values()):
        return "lossy"
    if doubts or any(endpoint.found.upper > endpoint.margin for endpoint in endpoints.values()):
        return "inconclusive"
    if TEMPERED not in endpoints or endpoints[TEMPERED].found.upper >= -INTERPOLATED:
        return "lossless"
    return "improved" if endpoints[LOSS].found.upper < 0 else "lossless"


def demoted(certificate: Certificate, reason: str) -> Certificate:
    """Return a certificate that states nothing better than `inconclusive`, with the reason."""
    status = "inconclusive" if certificate.status in CERTIFIED else certificate.status
    return replace(certificate, status=status, reasons=(*certificate.reasons, reason))


def not_improved(certificate: Certificate, reason: str) -> Certificate:
    """Return a certificate that states nothing better than `lossless`, with the reason."""
    if certificate.status != "improved":
        return certificate
    return replace(certificate, status="lossless", reasons=(*certificate.reasons, f"not `improved`: {reason}"))


def certify_together(certificates: Mapping[str, Certificate]) -> dict[str, Certificate]:
    """Correct the certificates of one model on several tasks for their number, by Holm's method.

    Args:
        certificates: task to its certificate.

    Returns:
        The certificates; one whose corrected p-value exceeds its level is `inconclusive`, and none of several is
        `improved`, for which the p-value is not.
    """
    corrected = holm({task: certificate.p_value for task, certificate in certificates.items()})
    result = {}
    for task, certificate in certificates.items():
        result[task] = replace(certificate, p_value=corrected[task])
        if len(certificates) > 1:
            result[task] = not_improved(result[task], f"that is not corrected for {len(certificates)} tasks")
        if corrected[task] > 1 - certificate.confidence and certificate.status in CERTIFIED:
            result[task] = demoted(result[task], f"not shown once corrected for {len(certificates)} tasks (Holm)")
    return result


def _chance(outcomes: PairedOutcomes) -> tuple[float | None, str | None]:
    """Return the accuracy of the most frequent answer, and a complaint if the dense model is not clearly above it."""
    if outcomes.labels is None or outcomes.accuracy is None:
        return None, None
    counts = np.unique(outcomes.labels, return_counts=True)[1]
    chance = float(counts.max() / counts.sum())
    error = np.sqrt(chance * (1 - chance) / len(outcomes.answers))
    if outcomes.accuracy[0] > chance + 2 * error:
        return chance, None
    hint = "; are the labels in the order of the model's classes?" if outcomes.accuracy[0] < chance - 2 * error else ""
    return chance, (
        f"the dense model is right on {outcomes.accuracy[0]:.1%}, not two standard errors above always giving the "
        f"most frequent answer ({chance:.1%}), so it has nothing to lose{hint}"
    )


def _calibration_errors(outcomes: PairedOutcomes) -> tuple[float, float] | None:
    if outcomes.confidence is None or outcomes.right is None:
        return None
    dense, compressed = map(expected_calibration_error, outcomes.confidence, outcomes.right)
    return dense, compressed


def _examples_needed(outcomes: PairedOutcomes, endpoints: Mapping[str, _Endpoint], confidence: float) -> int | None:
    """Return the examples that would show all differences to be inside their margins, or None."""
    needed = []
    for name, (differences, units, found, margin, _) in endpoints.items():
        deviation = float(np.std(differences - found.mean * units, ddof=1) / units.mean())
        if name == ACCURACY and _one_answer_each(outcomes) and found.mean < margin:
            deviation = max(deviation, _score_deviation(differences, margin))
        count = examples_needed(found.mean, deviation, margin, confidence)
        if count is None:
            return None
        needed.append(count * outcomes.examples / len(units))
    return max(int(np.ceil(max(needed))), MIN_EXAMPLES)


def _score_deviation(drop: np.ndarray, margin: float) -> float:
    """Return the deviation of an example that Tango's test takes as given: that of the hypothesis, not of the sample.

    The test statistic is `(mean - margin) sqrt(n) / deviation`.
    """
    from scipy.special import ndtri  # slow to import

    p_value = proportion_p_value(int((drop > 0).sum()), int((drop < 0).sum()), len(drop), margin)
    return float((margin - drop.mean()) * np.sqrt(len(drop)) / -ndtri(p_value)) if p_value < 0.5 else 0.0
