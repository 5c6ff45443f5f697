"""A hand-made report, and changes to it, for what shows reports."""

from dataclasses import replace

from hf_lossless_lr import Certificate, CompressionReport, LosslessLowRankConfig
from hf_lossless_lr.checkpoint.options import CompressionOptions
from hf_lossless_lr.report.records import Difference, Measurement, TrialRecord
from hf_lossless_lr.report.weights import LayerReport, SkippedWeight

CERTIFICATE = Certificate(
    status="lossless",
    reasons=(),
    loss_margin=0.01,
    accuracy_margin=0.01,
    confidence=0.95,
    p_value=0.00123,
    examples=3000,
    units=3100,
    clusters="examples",
    fingerprint="ee" * 32,
    loss=(0.27, 0.2721),
    loss_increase=Difference(0.0021, -0.0002, 0.00421),
    accuracy=(0.8933, 0.8913),
    accuracy_drop=Difference(0.002, -0.0022, 0.00612),
    chance=0.55,
    temperatures=(1.0552, 1.0784),
    tempered_loss_increase=Difference(0.0018, -0.0004, 0.0039),
    calibration_error=(0.0155, 0.0202),
    changed=0.0173,
    divergence=0.00374,
    examples_needed=1173,
)


def layer(rank, rows=8, columns=10):
    """A layer of 8 x 10, kept at a rank or, without one, dense."""
    parameters = rows * columns if rank is None else rank * (rows + columns - rank)
    storage = None if rank is None else "pivoted"
    return LayerReport("Linear", rows, columns, rank, storage, rows * columns, parameters, 0.0, 1e-4)


def options(**changes):
    config = LosslessLowRankConfig(**changes)
    return {name: getattr(config, name) for name in CompressionOptions.__dataclass_fields__}


def trial(keep_ratio, predicted, measured, upper, passes=True, **accuracy):
    return TrialRecord(keep_ratio, predicted, True, measured, upper, passes=passes, **accuracy)


NAMES = ("attention.self.query", "attention.self.key", "attention.output.dense", "output.dense")
REPORT = CompressionReport(
    model="BertForSequenceClassification",
    config=options(),
    layers={
        f"bert.encoder.layer.{block}.{name}": layer(None if (block, name) == (2, NAMES[1]) else 2 + block)
        for block in range(3)
        for name in NAMES
    },
    skipped={
        "bert.pooler.dense": SkippedWeight("pooler", 900, 0.09),
        "classifier": SkippedWeight("task head", 100, 0.01),
        "extra.0.fc": SkippedWeight("small", 20, 0.002),
        "extra.1.fc": SkippedWeight("small", 30, 0.003),
    },
    refitted=True,
    trials=[
        trial(0.3, 2e-2, 3e-2, 5e-2, passes=False, accuracy_drop=0.02, accuracy_drop_upper=0.03),
        trial(0.5, 1e-3, 2e-3, 5e-3, accuracy_drop=0.001, accuracy_drop_upper=0.006),
        trial(0.9, 1e-5, -1e-4, 2e-4, accuracy_drop=-0.001, accuracy_drop_upper=0.002),
    ],
    dense=Measurement(0.27, 0.8933, 12000),
    compressed=Measurement(0.2721, 0.8913, 9000),
    certificate=CERTIFICATE,
    uncertified=None,
    calibration={"examples": 1480, "units": 1500, "loss": 0.25},
    held_out={"examples": 3000, "units": 3100},
    fingerprints={"held_out": "e1" * 32, "selection": "5e" * 32, "calibration": "ca" * 32},
    model_fingerprint="de" * 32,
    epsilon=None,
    versions={"python": "3.11.7", "torch": "2.13.0"},
    seconds={"statistics": 98.7},
)


def certified(**changes):
    """The report with another certificate."""
    return replace(REPORT, certificate=replace(CERTIFICATE, **changes))


def uncertified(reason):
    return replace(REPORT, certificate=None, uncertified=reason)
