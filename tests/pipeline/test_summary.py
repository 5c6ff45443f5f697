"""From trials and outcomes to a report: its figures, its certificate, and which of several models can have one."""

import math
from dataclasses import replace

import pytest
from support.compressions import certifiable, factorized_layers
from support.processes import accelerator, loader_of
from support.tiny_models import TINY_MODELS, other_inputs, rows, split_batch
from support.tolerances import FLOAT32
from torch.nn.functional import cross_entropy
from transformers import BertForTokenClassification

from hf_lossless_lr import CompressionReport, LosslessLowRankConfig, LowRankCompressor, certify, paired_outcomes
from hf_lossless_lr.checkpoint.cards import card_of
from hf_lossless_lr.data.loaders import make_dataloader
from hf_lossless_lr.factors.factorize import factorize, loss_curve
from hf_lossless_lr.layers.layout import weight_matrices
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.pipeline import summary as reporting_module
from hf_lossless_lr.pipeline.summary import visited_point
from hf_lossless_lr.pipeline.trial import Trial
from hf_lossless_lr.ranks.sizes import Choice
from hf_lossless_lr.report.records import Difference, TrialRecord
from hf_lossless_lr.statistics.collect import collect_statistics
from hf_lossless_lr.verdict.certificate import MIN_EXAMPLES

WIDE = {"loss_margin": 9.0, "accuracy_margin": 1.0}  # margins that every model meets
USED = (
    "the held-out data were used already, for a model that keeps less; ask for ratios in descending order, or "
    "calibrate with another eval_dataset"
)
DEMOTED = "a model that keeps more was not certified on the same examples"


def calibrated(examples=slice(None), **options):
    """A compressor of a model that is always right, and the data to evaluate on."""
    model, batch, evaluation = certifiable()
    evaluation = rows(evaluation, examples)
    compressor = LowRankCompressor(LosslessLowRankConfig(**{"refit": False} | WIDE | options))
    compressor.calibrate(model, split_batch(batch, 8), eval_dataset=split_batch(evaluation, 8))
    return compressor, evaluation


def reports_of(compressor, *ratios):
    reports = []
    for ratio in ratios:
        compressor.compress_to(ratio)
        reports.append(compressor.report)
    return reports


def force(monkeypatch, *statuses):
    """Let certificates have these statuses, one after the other."""
    left = list(statuses)
    monkeypatch.setattr(
        reporting_module, "certify", lambda *arguments: replace(certify(*arguments), status=left.pop(0))
    )


class TestFigures:
    @pytest.fixture
    def case(self):
        compressor, evaluation = calibrated(keep_ratio=0.5)
        logits = [certifiable()[0](**evaluation).logits.detach().double()]
        dense = compressor.compress_to()
        logits.append(dense(**evaluation).logits.detach().double())
        return compressor.report, logits, evaluation["labels"]

    def test_are_those_of_both_models_on_the_evaluation_data(self, case):
        report, logits, labels = case
        for measured, scores in zip((report.dense, report.compressed), logits, strict=True):
            assert measured.loss == pytest.approx(float(cross_entropy(scores, labels)), rel=10 * FLOAT32)
            assert measured.accuracy == pytest.approx(float((scores.argmax(-1) == labels).double().mean()))
        assert report.held_out == {"examples": 40, "units": 40}

    def test_are_those_of_the_certificate(self, case):
        certificate = case[0].certificate
        report = case[0]
        assert certificate.loss == (report.dense.loss, report.compressed.loss)
        assert certificate.accuracy == (report.dense.accuracy, report.compressed.accuracy)
        assert (certificate.examples, certificate.units) == (40, 40)
        assert certificate.fingerprint == report.fingerprints["held_out"]

    def test_survive_json_with_a_certificate(self, case):
        assert case[0].certificate is not None
        assert CompressionReport.from_json(case[0].to_json()) == case[0]


class TestCertificate:
    def test_is_that_of_the_outcomes_at_the_margins_and_the_confidence_of_the_configuration(self):
        options = {"loss_margin": 0.5, "accuracy_margin": 0.25, "confidence": 0.9}
        compressor, evaluation = calibrated(keep_ratio=0.5, **options)
        dense = certifiable()[0]
        model = compressor.compress_to()
        loader = make_dataloader(split_batch(evaluation, 8), dense, batch_size=8)
        outcomes = paired_outcomes(dense, model, loader, accelerator(), temperatures=True)
        fingerprint = compressor.report.fingerprints["held_out"]
        assert compressor.report.certificate == certify(outcomes, 0.5, 0.25, 0.9, fingerprint)
        assert compressor.report.uncertified is None
        assert len(evaluation["labels"]) == compressor.report.certificate.examples

    @pytest.mark.parametrize(
        ("margins", "verdicts"),
        [
            (WIDE, {"lossless@(9 nats, 100 points)", "improved"}),
            ({"loss_margin": 0.0, "accuracy_margin": 0.0}, {"inconclusive", "lossy"}),
        ],
    )
    def test_gives_the_verdict(self, margins, verdicts):
        (report,) = reports_of(calibrated(**margins)[0], 0.5)
        assert report.verdict == report.certificate.verdict
        assert report.verdict in verdicts

    @pytest.mark.parametrize("examples", [MIN_EXAMPLES - 1, MIN_EXAMPLES])
    def test_takes_at_least_30_examples(self, examples):
        (report,) = reports_of(calibrated(slice(examples))[0], 0.5)
        if examples == 30:
            assert report.certificate.examples == 30
            assert report.uncertified is None
        else:
            assert report.certificate is None
            assert report.uncertified == "29 examples are too few for a certificate; it takes at least 30."
            assert report.verdict == "none"

    def test_takes_more_than_one_class(self):
        model, batch, evaluation = certifiable(100)
        labels = evaluation["labels"]
        evaluation = rows(evaluation, labels == labels.mode().values)
        compressor = LowRankCompressor(LosslessLowRankConfig(refit=False, **WIDE))
        compressor.compress(model, [batch], eval_dataset=[evaluation])
        assert len(evaluation["labels"]) >= MIN_EXAMPLES
        assert compressor.report.certificate is None
        assert "one class cannot show what a model knows" in compressor.report.uncertified

    def test_is_none_where_nothing_was_compressed(self):
        (report,) = reports_of(calibrated()[0], 1.0)
        assert (report.certificate, report.uncertified, report.verdict) == (None, "nothing was compressed", "none")
        assert report.dense == report.compressed


class TestSequence:
    """Several models on one certificate set: from the largest down to the first that is not certified."""

    def test_of_descending_ratios_certifies_each_as_if_it_were_alone(self):
        ratios = (0.9, 0.7, 0.7, 0.4)
        reports = reports_of(calibrated()[0], *ratios)
        for ratio, report in zip(ratios, reports, strict=True):
            assert report.uncertified is None
            assert report.certificate.status in ("lossless", "improved")
            (alone,) = reports_of(calibrated()[0], ratio)
            assert report.certificate == alone.certificate
        assert len({report.certificate.loss_increase.mean for report in reports}) == 3

    @pytest.mark.parametrize("ratios", [(0.5, 0.8), (0.9, 0.4, 0.6)])
    def test_gives_a_larger_model_after_a_smaller_one_no_certificate(self, ratios):
        compressor, _ = calibrated()
        *earlier, last = reports_of(compressor, *ratios)
        assert all(report.certificate is not None for report in earlier)
        assert (last.certificate, last.uncertified) == (None, USED)
        assert last.keep_ratio <= ratios[-1]
        assert factorized_layers(compressor.compress_to(ratios[-1]))
        (alone,) = reports_of(calibrated()[0], ratios[-1])
        assert (last.dense, last.compressed) == (alone.dense, alone.compressed)

    @pytest.mark.parametrize("failure", ["inconclusive", "lossy"])
    def test_ends_with_the_first_that_is_not_certified(self, failure, monkeypatch):
        force(monkeypatch, "improved", "lossless", failure, "lossless", "improved", "lossy", "inconclusive")
        reports = reports_of(calibrated()[0], 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        assert [report.certificate.status for report in reports] == [
            *("improved", "lossless", failure),
            *("inconclusive", "inconclusive", "lossy", "inconclusive"),
        ]
        said = [DEMOTED in report.certificate.reasons for report in reports]
        assert said == [False] * 3 + [True] * 4
        assert [report.verdict for report in reports[3:]] == ["inconclusive", "inconclusive", "lossy", "inconclusive"]

    def test_ends_with_one_that_came_too_late(self):
        first, late, last = reports_of(calibrated()[0], 0.6, 0.9, 0.4)
        assert first.certificate.status in ("lossless", "improved")
        assert late.certificate is None
        assert last.certificate.status == "inconclusive"
        assert DEMOTED in last.certificate.reasons

    def test_passes_over_a_ratio_at_which_nothing_is_compressed(self):
        first, second, third, fourth = reports_of(calibrated()[0], 1.0, 0.7, 1.0, 0.5)
        for report in (first, third):
            assert (report.certificate, report.uncertified) == (None, "nothing was compressed")
        for report in (second, fourth):
            assert report.certificate.status in ("lossless", "improved")

    @pytest.mark.parametrize(
        "stage",
        ["compressor.paired_outcomes", "placing.mark_compressed", "compressor.make_report", "trial.build_layers"],
    )
    def test_passes_over_a_compression_that_failed(self, stage, monkeypatch):
        compressor, _ = calibrated()

        def fail(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"hf_lossless_lr.pipeline.{stage}", fail)
            with pytest.raises(KeyboardInterrupt):
                compressor.compress_to(0.4)
        (report,) = reports_of(compressor, 0.8)
        assert report.certificate.status in ("lossless", "improved")

    def test_begins_again_with_a_new_calibration(self):
        compressor, evaluation = calibrated()
        reports_of(compressor, 0.4)
        compressor.restore()
        model, batch, _ = certifiable()
        compressor.calibrate(model, split_batch(batch, 8), eval_dataset=[evaluation])
        (report,) = reports_of(compressor, 0.8)
        assert report.certificate.status in ("lossless", "improved")


class TestVisitedPoint:
    @pytest.fixture
    def case(self):
        model, batch, _ = certifiable()
        targets = find_targets(model).chosen
        statistics = collect_statistics(model, targets, loader_of([batch]), accelerator()).layers
        weights = {name: weight_matrices(module) for name, module in targets.items()}
        curves = {
            name: loss_curve(weight, factorize(weight, statistics[name], "kronecker", 0.03), statistics[name])
            for name, weight in weights.items()
        }
        return curves, dict.fromkeys(curves, Choice(3)), LosslessLowRankConfig(loss_margin=0.5)

    def record(self, case, loss, drop):
        curves, ranks, config = case
        return visited_point(curves, Trial(ranks, {}, True, loss, drop), config)

    def test_has_its_prediction_and_nothing_else_where_nothing_was_measured(self, case):
        curves = case[0].values()
        weights = [curve.dense_parameters for curve in curves]
        record = self.record(case, None, None)
        assert record.keep_ratio == pytest.approx(sum(curve.parameters(3) for curve in curves) / sum(weights))
        assert record.predicted_loss_increase == pytest.approx(sum(float(curve.second_order[3]) for curve in curves))
        assert record == TrialRecord(record.keep_ratio, record.predicted_loss_increase, refitted=True)

    def test_has_what_was_measured_and_whether_it_passes(self, case):
        record = self.record(case, Difference(0.1, -0.2, 0.4), Difference(0.01, -0.02, 0.01))
        assert record.passes is True
        assert (record.loss_increase, record.loss_increase_upper) == (0.1, 0.4)
        assert (record.accuracy_drop, record.accuracy_drop_upper) == (0.01, 0.01)
        record = self.record(case, Difference(0.1, -math.inf, math.inf), None)
        assert (record.loss_increase_upper, record.passes) == (None, False)
        record = self.record(case, Difference(0.1, -0.2, 0.6), None)
        assert record.passes is False
        assert record.accuracy_drop is None


class OfStates(BertForTokenClassification):
    """A head whose loss is none of classes, though its labels look like them."""

    def forward(self, labels=None, **inputs):
        outputs = super().forward(**inputs)
        outputs.loss = (outputs.logits - outputs.logits.mean()).square().mean()
        return outputs


@pytest.mark.parametrize("explained", [True, False])
def test_a_loss_that_does_not_show_which_logits_answer_is_noted(explained):
    model, batch = TINY_MODELS["bert-token-classification"](12)
    if not explained:
        model.__class__ = OfStates
    compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
    compressor.compress(model, split_batch(batch, 2), eval_dataset=split_batch(other_inputs(batch), 2))
    report = compressor.report
    assert (report.dense.accuracy is None) == (not explained)
    assert report.notes == (() if explained else (reporting_module.UNEXPLAINED,))
    assert (reporting_module.UNEXPLAINED in card_of(report)) == (not explained)
    assert CompressionReport.from_json(report.to_json()) == report
