"""The verdict of a report as a sentence that holds as it stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import NamedTuple

from .records import Certificate, CompressionReport, Difference
from .text import plain


class Claim(NamedTuple):
    """One difference that a certificate bounds.

    Attributes:
        name: what differs.
        unit: `nats` or `points`.
        scale: units in what the certificate states: 1, or 100 points in a fraction.
        found: the difference, in what the certificate states.
        margin: its margin, likewise.
        tempered: whether it is at fitted temperatures.
    """

    name: str
    unit: str
    scale: int
    found: Difference
    margin: float
    tempered: bool = False

    def amount(self, number: Decimal) -> str:
        """Return a number of units with the unit."""
        text = f"{number.normalize():f}"
        return f"{text} {'point' if (text, self.unit) == ('1', 'points') else self.unit}"

    @property
    def limit(self) -> Decimal:
        """The margin in units."""
        return Decimal(repr(float(self.margin))) * self.scale


def claims_of(certificate: Certificate) -> list[Claim]:
    """Return the differences that a certificate bounds."""
    margin, tempered, drop = certificate.loss_margin, certificate.tempered_loss_increase, certificate.accuracy_drop
    claims = [Claim("the loss", "nats", 1, certificate.loss_increase, margin)]
    if tempered is not None:
        claims.append(Claim("the loss at fitted temperatures", "nats", 1, tempered, margin, tempered=True))
    if drop is not None:
        claims.append(Claim("the accuracy", "points", 100, drop, certificate.accuracy_margin))
    return claims


def verdict_sentence(report: CompressionReport) -> str:
    """Return what a report shows about the compressed model, in one sentence.

    Numbers have two digits and are rounded so that they claim less, not more.

    Args:
        report: the report.

    Returns:
        The sentence.
    """
    if report.certificate is None:
        return f"no certificate: {plain(report.uncertified or 'the report has none').rstrip('.')}."
    return certificate_sentence(report.certificate)


def certificate_sentence(certificate: Certificate) -> str:
    """Return what a certificate states, in one sentence; see `verdict_sentence`."""
    claims, end = claims_of(certificate), ""
    if certificate.status == "lossy":
        claims = [claim for claim in claims if claim.found.lower > claim.margin]
        shown = [(claim.name, _at_least(claim), "worse") for claim in claims]
        end = f", beyond {_margins(claims)}"
    else:
        beyond = [claim for claim in claims if claim.found.upper > claim.margin]
        if certificate.status == "inconclusive":
            claims, end = beyond or claims, _why_inconclusive(certificate, beyond)
        elif certificate.status == "lossless":
            claims = [claim for claim in claims if not claim.tempered]
        shown = [(claim.name, *_at_most(claim)) for claim in claims]
    by_batch = " (taken by batch)" if certificate.clusters == "batches" else ""
    each = " each" if len(shown) > 1 else ""
    return plain(
        f"{certificate.verdict}: on {certificate.examples:,} held-out examples{by_batch}, with "
        f"{100 * certificate.confidence:g} % confidence{each}, {_joined(shown)} than the dense model's{end}."
    )


def _at_most(claim: Claim) -> tuple[str, str]:
    """Return how much worse it is at most, and "worse"; or how much better it is at least, and "better"."""
    upper = claim.found.upper
    if upper == math.inf:
        return f"possibly any number of {claim.unit}", "worse"
    if upper < 0:
        return f"at least {claim.amount(_rounded(-upper, claim.scale, ROUND_FLOOR))}", "better"
    number = _rounded(upper, claim.scale, ROUND_CEILING)
    if upper <= claim.margin:
        number = min(number, claim.limit)  # rounding must not leave the margin
    return f"at most {claim.amount(number)}", "worse"


def _at_least(claim: Claim) -> str:
    number = _rounded(claim.found.lower, claim.scale, ROUND_FLOOR)
    return f"at least {claim.amount(number)}" if number > claim.limit else f"over {claim.amount(claim.limit)}"


def _rounded(value: float, scale: int, direction: str) -> Decimal:
    """Return units with two digits."""
    return Context(prec=2, rounding=direction).multiply(Decimal(repr(float(value))), Decimal(scale))


def _joined(shown: Sequence[tuple[str, str, str]]) -> str:
    """Join claims as in "the loss is at most 0.1 nats and the accuracy at most 2 points worse"."""
    texts = []
    for index, (name, amount, direction) in enumerate(shown):
        last = index + 1 == len(shown) or shown[index + 1][2] != direction
        texts.append(f"{name}{'' if index else ' is'} {amount}{f' {direction}' if last else ''}")
    return " and ".join([*([", ".join(texts[:-1])] if len(texts) > 1 else []), texts[-1]])


def _margins(claims: Sequence[Claim]) -> str:
    limits = list(dict.fromkeys(claim.amount(claim.limit) for claim in claims))
    return f"the margin{'s' if len(limits) > 1 else ''} of {' and '.join(limits)}"


def _why_inconclusive(certificate: Certificate, beyond: Sequence[Claim]) -> str:
    reasons = "; ".join(certificate.reasons)
    if not beyond:
        return f", which is within the margins, but {reasons}"
    needed = certificate.examples_needed
    if any(claim.found.mean >= claim.margin for claim in beyond):
        more = "if the differences stay as measured, no number of examples would show them to be small enough"
    elif needed is not None and needed > certificate.examples:
        more = f"if the differences stay as measured, about {needed:,} examples would show them to be small enough"
    else:
        more = "it takes more examples to show less"
    return f", which is not within {_margins(beyond)}; {more}{f'; besides, {reasons}' if reasons else ''}"
