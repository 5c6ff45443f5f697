"""The sentence that a user reads: true as it stands, whatever the numbers."""

import re
from dataclasses import replace

import numpy as np
import pytest
from support.reports import REPORT, certified, uncertified

from hf_lossless_lr.report.records import Difference
from hf_lossless_lr.report.sentence import verdict_sentence

WIDE = Difference(0.004, -0.012, 0.02)
BEYOND = Difference(0.011, -0.001, 0.023)
WORSE = Difference(0.05, 0.0312, 0.07)

SENTENCES = {
    "lossless": (
        certified(),
        "lossless@(0.01 nats, 1 point): on 3,000 held-out examples, with 95 % confidence each, the loss is at most "
        "0.0043 nats and the accuracy at most 0.62 points worse than the dense model's.",
    ),
    "lossless, without accuracy": (
        certified(accuracy=None, accuracy_drop=None, confidence=0.975),
        "lossless@(0.01 nats): on 3,000 held-out examples, with 97.5 % confidence, the loss is at most 0.0043 nats "
        "worse than the dense model's.",
    ),
    "lossless, with a lower loss": (
        certified(loss_increase=Difference(-0.002, -0.003, -0.00119)),
        "lossless@(0.01 nats, 1 point): on 3,000 held-out examples, with 95 % confidence each, the loss is at least "
        "0.0011 nats better and the accuracy at most 0.62 points worse than the dense model's.",
    ),
    "lossless, by batch": (
        certified(clusters="batches", accuracy_drop=None, tempered_loss_increase=None),
        "lossless@(0.01 nats): on 3,000 held-out examples (taken by batch), with 95 % confidence, the loss is at most "
        "0.0043 nats worse than the dense model's.",
    ),
    "improved": (
        certified(
            status="improved",
            loss_increase=Difference(-0.004, -0.006, -0.00219),
            tempered_loss_increase=Difference(-0.003, -0.005, -0.00151),
        ),
        "improved: on 3,000 held-out examples, with 95 % confidence each, the loss is at least 0.0021 nats, the loss "
        "at fitted temperatures at least 0.0015 nats better and the accuracy at most 0.62 points worse than the dense "
        "model's.",
    ),
    "improved in all": (
        certified(
            status="improved",
            loss_increase=Difference(-0.004, -0.006, -0.00219),
            tempered_loss_increase=Difference(-0.003, -0.005, -0.00151),
            accuracy_drop=Difference(-0.02, -0.03, -0.0101),
        ),
        "improved: on 3,000 held-out examples, with 95 % confidence each, the loss is at least 0.0021 nats, the loss "
        "at fitted temperatures at least 0.0015 nats and the accuracy at least 1 point better than the dense "
        "model's.",
    ),
    "lossy": (
        certified(status="lossy", loss_increase=WORSE, accuracy_drop=Difference(0.03, 0.0129, 0.05)),
        "lossy: on 3,000 held-out examples, with 95 % confidence each, the loss is at least 0.031 nats and the "
        "accuracy at least 1.2 points worse than the dense model's, beyond the margins of 0.01 nats and 1 point.",
    ),
    "lossy in the loss only": (
        certified(status="lossy", loss_increase=WORSE, accuracy_drop=WIDE),
        "lossy: on 3,000 held-out examples, with 95 % confidence, the loss is at least 0.031 nats worse than the "
        "dense model's, beyond the margin of 0.01 nats.",
    ),
    "lossy, just": (
        certified(status="lossy", loss_increase=Difference(0.02, 0.01001, 0.03)),
        "lossy: on 3,000 held-out examples, with 95 % confidence, the loss is over 0.01 nats worse than the dense "
        "model's, beyond the margin of 0.01 nats.",
    ),
    "inconclusive for want of examples": (
        certified(status="inconclusive", examples=300, loss_increase=WIDE, examples_needed=4213),
        "inconclusive: on 300 held-out examples, with 95 % confidence, the loss is at most 0.02 nats worse than the "
        "dense model's, which is not within the margin of 0.01 nats; if the differences stay as measured, about 4,213 "
        "examples would show them to be small enough.",
    ),
    "inconclusive for good": (
        certified(status="inconclusive", loss_increase=BEYOND, accuracy_drop=WIDE, examples_needed=None),
        "inconclusive: on 3,000 held-out examples, with 95 % confidence each, the loss is at most 0.023 nats and the "
        "accuracy at most 2 points worse than the dense model's, which is not within the margins of 0.01 nats and "
        "1 point; if the differences stay as measured, no number of examples would show them to be small enough.",
    ),
    "inconclusive, at fitted temperatures only": (
        certified(status="inconclusive", tempered_loss_increase=WIDE, reasons=("the logits are less extreme",)),
        "inconclusive: on 3,000 held-out examples, with 95 % confidence, the loss at fitted temperatures is at most "
        "0.02 nats worse than the dense model's, which is not within the margin of 0.01 nats; it takes more examples "
        "to show less; besides, the logits are less extreme.",
    ),
    "inconclusive for a reason": (
        certified(status="inconclusive", reasons=("a model that keeps more was not certified",)),
        "inconclusive: on 3,000 held-out examples, with 95 % confidence each, the loss is at most 0.0043 nats, the "
        "loss at fitted temperatures at most 0.0039 nats and the accuracy at most 0.62 points worse than the dense "
        "model's, which is within the margins, but a model that keeps more was not certified.",
    ),
    "no certificate": (uncertified("nothing was compressed"), "no certificate: nothing was compressed."),
    "no certificate, a sentence": (uncertified("5 are too few."), "no certificate: 5 are too few."),
    "no certificate, no reason": (uncertified(None), "no certificate: the report has none."),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_says_what_was_shown(case):
    report, sentence = SENTENCES[case]
    assert verdict_sentence(report) == sentence


@pytest.mark.parametrize("needed", [3000, 2, None])
def test_names_no_number_of_examples_that_was_not_enough(needed):
    report = certified(status="inconclusive", loss_increase=WIDE, examples_needed=needed)
    assert "it takes more examples to show less." in verdict_sentence(report)


def test_rounding_claims_no_more_than_the_bounds_and_stays_within_the_margins():
    for upper, drop in np.random.default_rng(0).uniform(0, 0.01, (500, 2)):
        loss, accuracy = Difference(0.0, -1.0, float(upper)), Difference(0.0, -1.0, float(drop))
        text = verdict_sentence(certified(loss_increase=loss, accuracy_drop=accuracy))
        nats, points = map(float, re.search(r"at most (\S+) nats and the accuracy at most (\S+) point", text).groups())
        assert upper <= nats <= 0.01
        assert 100 * drop <= points <= 1
        assert nats < 1.1 * upper + 1e-12
    for lower in np.random.default_rng(1).uniform(0.0111, 1, 500):
        text = verdict_sentence(certified(status="lossy", loss_increase=Difference(1.0, float(lower), 2.0)))
        nats = float(re.search(r"at least (\S+) nats", text)[1])
        assert 0.9 * lower < nats <= lower


def test_a_bound_that_fills_an_odd_margin_is_not_rounded_beyond_it():
    report = certified(loss_margin=0.00995, loss_increase=Difference(0.0, -0.01, 0.00994))
    assert "the loss is at most 0.00995 nats and" in verdict_sentence(report)


def test_does_not_round_what_needs_no_rounding():
    report = certified(accuracy_drop=Difference(0.0, -0.01, 0.0041))  # 100 * 0.0041 is 0.41000000000000003
    assert "the accuracy at most 0.41 points worse" in verdict_sentence(report)


def test_shows_no_exponents_and_no_bound_where_there_is_none():
    tiny = certified(loss_increase=Difference(0.0, 0.0, 1.234e-7), accuracy_drop=Difference(0.0, 0.0, 0.0))
    assert "at most 0.00000013 nats and the accuracy at most 0 points worse" in verdict_sentence(tiny)
    endless = certified(status="inconclusive", loss_increase=Difference(0.0, float("-inf"), float("inf")))
    assert "the loss is possibly any number of nats worse than the dense model's, which" in verdict_sentence(endless)


def test_is_one_line_for_every_status():
    for report, _ in SENTENCES.values():
        assert "\n" not in verdict_sentence(report)
    assert verdict_sentence(REPORT) == verdict_sentence(replace(REPORT, seconds={}))
