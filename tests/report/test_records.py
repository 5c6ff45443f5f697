"""`CompressionReport`: to JSON and back, and onto the disk in one piece."""

import json
import math
from dataclasses import replace

import pytest

from hf_lossless_lr import Certificate, CheckpointError, CompressionReport
from hf_lossless_lr.report.records import REPORT_NAME, Difference, Measurement, TrialRecord
from hf_lossless_lr.report.weights import LayerReport, SkippedWeight

FACTORIZED = LayerReport("Linear", 8, 10, 3, "pivoted", 80, 45, -0.25, 0.5)
DENSE = LayerReport("Conv1D", 4, 5, None, None, 20, 20, 0.0, 0.0)

CERTIFICATE = Certificate(
    status="lossless",
    reasons=("the first reason", "the second"),
    loss_margin=0.01,
    accuracy_margin=0.02,
    confidence=0.95,
    p_value=1e-30,
    examples=500,
    units=700,
    clusters="examples",
    fingerprint="ab" * 32,
    loss=(0.1 + 0.2, 0.25),
    loss_increase=Difference(-0.05, -0.06, -0.04),
    accuracy=(0.9, 0.875),
    accuracy_drop=Difference(0.015, 0.01, 0.02),
    chance=0.5,
    temperatures=(1.25, 2**0.25),
    tempered_loss_increase=Difference(1e-300, -1e-3, 1e-3),
    calibration_error=(0.03, 0.02),
    changed=0.04,
    divergence=0.001,
    examples_needed=12345,
)
NO_CLASSES = replace(  # of a head that does not classify, on one batch
    CERTIFICATE,
    status="inconclusive",
    reasons=(),
    clusters="batches",
    loss_increase=Difference(0.1, -math.inf, math.inf),
    accuracy=None,
    accuracy_drop=None,
    chance=None,
    temperatures=None,
    tempered_loss_increase=None,
    calibration_error=None,
    changed=None,
    divergence=None,
    examples_needed=None,
)


@pytest.fixture
def report():
    return CompressionReport(
        model="BertForSequenceClassification",
        config={"objective": "budget", "keep_ratio": 0.5, "target_modules": None, "ignore": ["a", "é"]},
        layers={"one": FACTORIZED, "two": DENSE, "three": replace(FACTORIZED, second_order=0.125)},
        skipped={"classifier": SkippedWeight("task head", 64, 0.064)},
        refitted=True,
        trials=[TrialRecord(0.5, 0.02, refitted=True, loss_increase=0.01, passes=False)],
        dense=Measurement(0.1 + 0.2, 0.75, 1000),
        compressed=Measurement(1e-9, None, 930),
        certificate=None,
        uncertified="too few examples",
        calibration={"examples": 12, "units": 30, "loss": 0.4},
        held_out={"examples": 3, "units": 8},
        fingerprints={"calibration": "00" * 32, "held_out": "ab" * 32},
        model_fingerprint="ff" * 32,
        epsilon=None,
        versions={"python": "3.11"},
        seconds={"statistics": 1.5},
    )


class TestReport:
    def test_adds_up_its_layers(self, report):
        assert report.keep_ratio == (45 + 20 + 45) / (80 + 20 + 80)
        assert report.model_keep_ratio == 0.93
        assert report.predicted_loss_increase == 0.625

    def test_survives_json_exactly(self, report):
        assert CompressionReport.from_json(report.to_json()) == report

    def test_survives_json_with_noise_bounds(self, report):
        report = replace(report, epsilon={"one": 0.1, "two": 1e-300})
        assert CompressionReport.from_json(report.to_json()) == report

    @pytest.mark.parametrize("certificate", [CERTIFICATE, NO_CLASSES])
    def test_survives_json_with_a_certificate(self, report, certificate):
        report = replace(report, certificate=certificate, uncertified=None)
        again = CompressionReport.from_json(report.to_json())
        assert again == report
        assert type(again.certificate.loss_increase) is Difference
        assert type(again.certificate.reasons) is type(again.certificate.loss) is tuple

    def test_has_null_in_json_for_what_is_not_finite(self, report):
        report = replace(
            report,
            certificate=NO_CLASSES,
            trials=[TrialRecord(0.5, 0.02, refitted=True, loss_increase_upper=math.inf)],
        )

        def refuse(name):
            pytest.fail(f"{name} is no JSON")

        data = json.loads(report.to_json(), parse_constant=refuse)
        assert data["trials"][0]["loss_increase_upper"] is None
        assert data["certificate"]["loss_increase"] == {"mean": 0.1, "lower": None, "upper": None}

    def test_of_before_is_read_with_numbers_that_are_no_json(self, report):
        data = json.loads(replace(report, certificate=NO_CLASSES).to_json())
        data["certificate"]["loss_increase"] = {"mean": 0.1, "lower": -math.inf, "upper": math.inf}
        assert CompressionReport.from_json(json.dumps(data)).certificate == NO_CLASSES

    def test_shows_the_certificate_and_the_verdict_in_json(self, report):
        data = json.loads(replace(report, certificate=CERTIFICATE, uncertified=None).to_json())
        assert data["certificate"]["status"] == "lossless"
        assert data["certificate"]["reasons"] == list(CERTIFICATE.reasons)
        assert data["certificate"]["loss_increase"] == {"mean": -0.05, "lower": -0.06, "upper": -0.04}
        assert data["verdict"] == "lossless@(0.01 nats, 2 points)"
        assert json.loads(report.to_json())["verdict"] == "none"

    def test_shows_the_derived_numbers_in_json(self, report):
        data = json.loads(report.to_json())
        assert data["keep_ratio"] == report.keep_ratio
        assert data["model_keep_ratio"] == report.model_keep_ratio
        assert data["predicted_loss_increase"] == report.predicted_loss_increase
        assert data["layers"]["one"]["rank"] == 3
        assert data["layers"]["two"]["rank"] is None

    def test_does_not_believe_derived_numbers_that_were_edited(self, report):
        data = json.loads(report.to_json()) | {"keep_ratio": 0.001}
        assert CompressionReport.from_json(json.dumps(data)).keep_ratio == report.keep_ratio

    def test_saves_under_its_name_as_readable_as_any_file(self, report, tmp_path):
        path = report.save(tmp_path)
        assert path == tmp_path / REPORT_NAME
        assert CompressionReport.from_json(path.read_text(encoding="utf-8")) == report
        (tmp_path / "other").touch()
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
        assert {file.name for file in tmp_path.iterdir()} == {REPORT_NAME, "other"}


class TestVerdict:
    @pytest.mark.parametrize("status", ["improved", "inconclusive", "lossy"])
    def test_is_the_status_of_the_certificate(self, report, status):
        certificate = replace(CERTIFICATE, status=status)
        assert replace(report, certificate=certificate).verdict == certificate.verdict == status

    @pytest.mark.parametrize(
        ("certificate", "loss_margin", "accuracy_margin", "verdict"),
        [
            (CERTIFICATE, 0.01, 0.01, "lossless@(0.01 nats, 1 point)"),
            (CERTIFICATE, 0.0, 0.005, "lossless@(0 nats, 0.5 points)"),
            (NO_CLASSES, 0.02, 0.01, "lossless@(0.02 nats)"),
        ],
    )
    def test_of_a_lossless_model_names_the_margins(self, report, certificate, loss_margin, accuracy_margin, verdict):
        margins = {"loss_margin": loss_margin, "accuracy_margin": accuracy_margin}
        certificate = replace(certificate, status="lossless", **margins)
        assert replace(report, certificate=certificate).verdict == verdict

    def test_of_a_model_without_a_certificate_is_none(self, report):
        assert report.verdict == "none"


def without(name):
    return lambda data: data.pop(name)


NO_REPORTS = {
    "no JSON": "{",
    "empty": "",
    "a list": "[]",
    "a number": "3",
    "another object": '{"model": "x"}',
}
BROKEN = {
    "no layers": without("layers"),
    "no loss": lambda data: data["dense"].pop("loss"),
    "a layer without rank": lambda data: data["layers"]["one"].pop("rank"),
    "a layer with more": lambda data: data["layers"]["one"].update(colour="red"),
    "layers in a list": lambda data: data.update(layers=[1]),
    "a measurement that is none": lambda data: data.update(compressed=3),
    "a trial with more": lambda data: data["trials"][0].update(colour="red"),
    "a trial without a size": lambda data: data["trials"][0].pop("keep_ratio"),
    "no certificate": without("certificate"),
    "no fingerprints": without("fingerprints"),
    "a certificate without a status": lambda data: data["certificate"].pop("status"),
    "a certificate with more": lambda data: data["certificate"].update(colour="red"),
    "a certificate in a list": lambda data: data.update(certificate=[1]),
    "a certificate without a difference": lambda data: data["certificate"].pop("tempered_loss_increase"),
    "a status that is a number": lambda data: data["certificate"].update(status=3),
    "one loss": lambda data: data["certificate"].update(loss=[0.1]),
    "a difference without a bound": lambda data: data["certificate"]["loss_increase"].pop("upper"),
}


class TestReading:
    @pytest.mark.parametrize("text", NO_REPORTS.values(), ids=NO_REPORTS)
    def test_something_else_is_refused(self, text):
        with pytest.raises(CheckpointError, match="this is no compression report"):
            CompressionReport.from_json(text)

    @pytest.mark.parametrize("case", BROKEN)
    def test_a_broken_report_is_refused(self, case, report):
        data = json.loads(replace(report, certificate=CERTIFICATE).to_json())
        BROKEN[case](data)
        with pytest.raises(CheckpointError, match="this is no compression report"):
            CompressionReport.from_json(json.dumps(data))


def in_certificate(**changes):
    return lambda data: data["certificate"].update(changes)


def bounds(mean, lower, upper):
    return {"mean": mean, "lower": lower, "upper": upper}


SPEED = {"shape": [8, 16], "device": "cpu", "threads": 1, "turns": 9, "seconds": [2.0, 1.0]}
SPEED |= {"quartiles": [[1.0, 3.0], [1.0, 1.0]], "ratio": 0.5, "ratio_quartiles": [0.4, 0.6]}

CONTRADICTIONS = {
    "a better status": (
        in_certificate(loss_increase=bounds(0.02, 0.005, 0.03)),
        "status is 'lossless', but the upper bound of loss_increase is beyond its margin",
    ),
    "a much better status": (
        in_certificate(loss_increase=bounds(0.02, 0.015, 0.03)),
        "status is 'lossless', but the lower bound of loss_increase is beyond its margin",
    ),
    "no bound": (
        in_certificate(accuracy_drop=bounds(0.0, -0.01, None)),
        "status is 'lossless', but the upper bound of accuracy_drop is beyond its margin",
    ),
    "not improved": (in_certificate(status="improved"), "the bounds do not show a lower loss"),
    "not lossy": (in_certificate(status="lossy"), "status is 'lossy', but no lower bound is beyond its margin"),
    "lossy": (
        in_certificate(status="inconclusive", accuracy_drop=bounds(0.04, 0.03, 0.05)),
        "status is 'inconclusive', but the lower bound of accuracy_drop is beyond",
    ),
    "an unknown status": (in_certificate(status="perfect"), "there is no status 'perfect'"),
    "a mean outside": (
        in_certificate(loss_increase=bounds(0.0, -0.06, -0.04)),
        "bounds of loss_increase are not arou",
    ),
    "a chance of 2": (in_certificate(chance=2), "chance is 2, which is no share of 1"),
    "no examples": (in_certificate(examples=0), "a number of examples or units"),
    "no layers": (lambda data: data.update(layers={}), "there are no layers"),
    "a rank above the full one": (lambda data: data["layers"]["one"].update(rank=99), "the rank of the layer 'one'"),
    "no parameters": (lambda data: data["dense"].update(parameters=0), "the bytes or the accuracy of the dense mod"),
    "bytes below 0": (lambda data: data["dense"].update(bytes=-5), "bytes or the accuracy of the dense model"),
    "an unknown format": (lambda data: data["layers"]["one"].update(format="int9"), "'one' has the format 'int9'"),
    "the time of one model": (lambda data: data.update(speed=SPEED | {"seconds": [1.0]}), "in two models"),
    "no batch": (lambda data: data.update(speed=SPEED | {"shape": []}), "not those of a batch in two models"),
    "a time below 0": (lambda data: data.update(speed=SPEED | {"ratio": -1.0}), "a time or a count of the speed"),
    "a margin of text": (lambda data: data["config"].update(loss_margin="x"), "the configuration has the loss_margin"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(case, report):
    change, message = CONTRADICTIONS[case]
    data = json.loads(replace(report, certificate=CERTIFICATE).to_json())
    change(data)
    with pytest.raises(CheckpointError, match=f"this compression report contradicts itself: .*{message}"):
        CompressionReport.from_json(json.dumps(data))


def test_times_of_two_models_are_read(report):
    data = json.loads(report.to_json()) | {"speed": SPEED}
    assert CompressionReport.from_json(json.dumps(data)).speed.seconds == (2.0, 1.0)


@pytest.mark.parametrize("value", ["3", True, math.nan, 1e31, 10**400, [0.1], {}, None])
def test_a_value_of_another_type_is_refused_by_its_name(value, report):
    data = json.loads(report.to_json())
    data["dense"]["loss"] = value
    with pytest.raises(
        CheckpointError, match=r"this is no compression report: TypeError\(.report.dense.loss cannot be"
    ):
        CompressionReport.from_json(json.dumps(data))
