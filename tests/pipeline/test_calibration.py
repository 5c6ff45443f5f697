"""One calibration for many ratios: each result is that of a fresh run, and saved statistics resume."""

import functools
import itertools
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from support.compressions import build, check_same_state, factorized_layers
from support.tiny_models import IGNORED, TINY_MODELS, as_examples, other_inputs, split_batch
from torch import nn

from hf_lossless_lr import (
    CheckpointError,
    ConfigurationError,
    DataError,
    LosslessLowRankConfig,
    LowRankCompressor,
    NumericalError,
    TargetError,
    timing,
)
from hf_lossless_lr.data.digests import combined_digest, item_digests
from hf_lossless_lr.data.loaders import make_dataloader
from hf_lossless_lr.data.splits import split_data
from hf_lossless_lr.layers.model_state import on_device
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.pipeline import calibration as calibration_module
from hf_lossless_lr.pipeline import residual_stream as stream_module

NAME = "bert-sequence-classification"
LAYER = "bert.encoder.layer.0.attention.self.query"


def calibrated(path=None, examples=None, model=None, **options):
    """A compressor after `calibrate`, and its model."""
    dense, batch = build(NAME)
    model = dense if model is None else model
    batches = split_batch(batch, 4) if examples is None else examples
    compressor = LowRankCompressor(LosslessLowRankConfig(**options))
    compressor.calibrate(model, batches, eval_dataset=[other_inputs(batch)], statistics_path=path)
    return compressor, model


def fresh(**options):
    model, batch = build(NAME)
    compressor = LowRankCompressor(LosslessLowRankConfig(**options))
    compressor.compress(model, split_batch(batch, 4), eval_dataset=[other_inputs(batch)])
    return model, compressor.report


def check_same_model(model, other):
    check_same_state(model.state_dict(), other.state_dict())
    assert model.config.to_dict() == other.config.to_dict()
    assert factorized_layers(model).keys() == factorized_layers(other).keys()


def facts(report):
    """All but what depends on the ratios before: the certificate (see test_reporting.py)."""
    return report.to_dict() | dict.fromkeys(("seconds", "speed", "memory", "certificate", "uncertified", "verdict"))


class TestManyRatios:
    @pytest.mark.parametrize(
        "options", [{}, {"refit": False}, {"objective": "uniform", "metric": "activation"}], ids=str
    )
    def test_of_one_calibration_are_those_of_fresh_runs_bit_for_bit(self, options):
        compressor, model = calibrated(**options)
        for ratio in (0.5, 0.8, 0.5):
            assert compressor.compress_to(ratio) is model
            other, report = fresh(**options, keep_ratio=ratio)
            check_same_model(model, other)
            assert facts(compressor.report) == facts(report)

    def test_do_not_calibrate_again(self, monkeypatch):
        compressor, _ = calibrated()
        monkeypatch.setattr(calibration_module, "collect_statistics", lambda *_: pytest.fail("a second pass"))
        monkeypatch.setattr(
            "hf_lossless_lr.pipeline.factoring.factorize", lambda *_: pytest.fail("a second factorization")
        )
        reports = []
        for ratio in (0.7, 0.4):
            compressor.compress_to(ratio)
            reports.append(compressor.report)
        assert 0.6 < reports[0].keep_ratio <= 0.7
        assert 0.3 < reports[1].keep_ratio <= 0.4

    def test_are_timed_apart(self, monkeypatch):
        """By a clock that ticks once each time it is read."""
        monkeypatch.setattr(timing.time, "perf_counter", functools.partial(next, itertools.count()))
        compressor, _ = calibrated()
        reports = []
        for _ in range(2):
            compressor.compress_to(0.5)
            reports.append(compressor.report)
        assert reports[0].seconds == reports[1].seconds
        assert {"statistics", "refit", "held_out"} < reports[0].seconds.keys()

    def test_without_a_ratio_are_those_of_the_configuration(self):
        compressor, model = calibrated(keep_ratio=0.6)
        compressor.compress_to(0.3)
        compressor.compress_to()
        check_same_model(model, fresh(keep_ratio=0.6)[0])

    def test_do_not_go_on_after_the_model_was_cast_which_rounds_the_dense_weights_too(self):
        compressor, model = calibrated()
        compressor.compress_to(0.8)
        model.to(torch.bfloat16)
        with pytest.raises(TargetError, match=r"changed since it was calibrated \(by training or a cast"):
            compressor.compress_to(0.5)
        assert not factorized_layers(model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_leave_the_model_dense_before_the_first_and_after_a_restore(self):
        dense = build(NAME)[0]
        compressor, model = calibrated()
        modules = dict(model.named_modules())
        for _ in range(2):
            check_same_model(model, dense)
            compressor.compress_to(0.5)
            compressor.restore()
            assert all(module is modules[name] for name, module in model.named_modules())
        check_same_model(model, dense)

    @pytest.mark.parametrize(
        "target",
        [
            "hf_lossless_lr.ranks.objectives.select_budget",
            "hf_lossless_lr.pipeline.trial.refit",
            "hf_lossless_lr.pipeline.placing.mark_compressed",
            "hf_lossless_lr.pipeline.compressor.paired_outcomes",
            "hf_lossless_lr.pipeline.compressor.make_report",
        ],
    )
    def test_that_fail_leave_a_dense_model_that_can_be_compressed(self, target, monkeypatch):
        compressor, model = calibrated()
        compressor.compress_to(0.5)
        report = compressor.report

        def fail(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(KeyboardInterrupt):
                compressor.compress_to(0.8)
        assert compressor.report is report
        check_same_model(model, build(NAME)[0])
        compressor.compress_to(0.8)
        check_same_model(model, fresh(keep_ratio=0.8)[0])

    def test_need_a_calibration(self):
        compressor = LowRankCompressor()
        with pytest.raises(ConfigurationError, match=r"compress_to\(\) needs a calibration: call calibrate"):
            compressor.compress_to(0.5)
        compressor, model = calibrated()
        compressor.compress_to(0.5)
        compressor.release()
        assert factorized_layers(model)
        with pytest.raises(ConfigurationError, match="needs a calibration"):
            compressor.compress_to(0.5)

    @pytest.mark.parametrize("ratio", [0, 1.5])
    def test_out_of_range_leave_the_earlier_model(self, ratio):
        compressor, model = calibrated()
        compressor.compress_to(0.5)
        with pytest.raises(ConfigurationError, match="keep_ratio: must be a number in"):
            compressor.compress_to(ratio)
        check_same_model(model, fresh(keep_ratio=0.5)[0])


class TestStatisticsFile:
    @pytest.fixture
    def path(self, tmp_path):
        calibrated(tmp_path / "statistics.safetensors")
        return tmp_path / "statistics.safetensors"

    def test_gives_the_same_model_without_a_second_pass(self, path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(calibration_module, "collect_statistics", lambda *_: pytest.fail("a second pass"))
            compressor, model = calibrated(path)
        compressor.compress_to(0.5)
        other, report = fresh(keep_ratio=0.5)
        check_same_model(model, other)
        assert facts(compressor.report) == facts(report)

    def test_in_no_folder_is_refused_before_the_pass(self, tmp_path, monkeypatch):
        monkeypatch.setattr(calibration_module, "collect_statistics", lambda *_: pytest.fail("a pass"))
        with pytest.raises(ConfigurationError, match="statistics_path: there is no folder"):
            calibrated(tmp_path / "nowhere" / "statistics.safetensors")

    def test_of_another_model_is_refused(self, path):
        model = build(NAME)[0]
        with torch.no_grad():
            model.classifier.bias[0] += 1
        with pytest.raises(CheckpointError, match="these statistics belong to another model"):
            calibrated(path, model=model)

    def test_of_other_data_is_refused(self, path):
        other = TINY_MODELS[NAME](12, seed=5)[1]
        with pytest.raises(CheckpointError, match="these statistics belong to other calibration data"):
            calibrated(path, split_batch(other, 4))

    def test_of_another_split_is_refused(self, path):
        with pytest.raises(CheckpointError, match="these statistics belong to other calibration data"):
            calibrated(path, selection_fraction=0.3)

    def test_of_fewer_layers_is_refused(self, tmp_path):
        calibrated(tmp_path / "few", target_modules=["query"], ignore=[LAYER])
        with pytest.raises(CheckpointError, match=f"these statistics do not cover '{LAYER}'"):
            calibrated(tmp_path / "few", target_modules=["query"])


PARTS = ("calibration", "selection", "held_out")


def split_into(calibration, evaluation=None, **options):
    model = TINY_MODELS[NAME]()[0]
    config = LosslessLowRankConfig(**options)
    chosen = {name: getattr(config, name) for name in ("batch_size", "seed", "selection_fraction")}
    return split_data(model, calibration, evaluation, **chosen)


def split(examples, evaluation=None, **options):
    """The examples in each part of the data, as numbers."""
    everything = as_examples(TINY_MODELS[NAME](examples)[1])
    data = split_into(everything, evaluation, **options)
    rows = [example["input_ids"] for example in everything]
    loaders = (getattr(data, part) for part in PARTS)
    return [
        None if loader is None else [rows.index(row.tolist()) for part in loader for row in part["input_ids"]]
        for loader in loaders
    ]


def numbered(numbers):
    """Examples whose only word is a number."""
    return [{"input_ids": [number], "labels": index % 3} for index, number in enumerate(numbers)]


def numbers_in(data):
    """The numbers in each part."""
    loaders = {part: getattr(data, part) for part in PARTS}
    return {
        part: [word for batch in loader for word in batch["input_ids"].flatten().tolist()]
        for part, loader in loaders.items()
        if loader is not None
    }


class TestSplits:
    @pytest.mark.parametrize(
        ("options", "sizes"),
        [
            ({"selection_fraction": 0.25}, (24, 8, 8)),
            ({"objective": "compact"}, (16, 16, 8)),
            ({"refit": False}, (32, 0, 8)),
        ],
    )
    def test_are_disjoint_and_hold_everything(self, options, sizes):
        parts = split(40, **options)
        assert tuple(len(part or []) for part in parts) == sizes
        assert sorted(number for part in parts for number in part or []) == list(range(40))
        assert (parts[1] is None) == (sizes[1] == 0)

    @pytest.mark.parametrize(("fewest", "sizes"), [(2, (30, 2, 8)), (3, (32, 0, 8))])
    def test_keep_none_apart_where_they_would_be_too_few_to_judge(self, fewest, sizes):
        examples = as_examples(TINY_MODELS[NAME](40)[1])
        model = TINY_MODELS[NAME]()[0]
        options = {"batch_size": 8, "seed": 0, "selection_fraction": 1 / 16}
        data = split_data(model, examples, None, **options, fewest_selected=fewest)
        loaders = (data.calibration, data.selection, data.held_out)
        assert tuple(0 if loader is None else len(loader.dataset) for loader in loaders) == sizes
        needed = split_data(model, examples, None, **options, fewest_selected=99, selection_needed=True)
        assert len(needed.selection.dataset) == 2

    def test_keep_a_share_that_was_asked_for_whatever_its_size(self):
        assert LosslessLowRankConfig().fewest_selected == 16
        assert LosslessLowRankConfig(selection_fraction=0.1).fewest_selected == 1

    def test_take_the_selection_from_the_calibration_alone(self):
        evaluation, batch = (TINY_MODELS[NAME](count, seed=seed)[1] for count, seed in ((9, 1), (40, 0)))
        data = split_into(as_examples(batch), as_examples(evaluation), selection_fraction=0.5)
        assert [len(loader.dataset) for loader in (data.calibration, data.selection, data.held_out)] == [20, 20, 9]

    @pytest.mark.parametrize("fraction", [0.0, 0.0625, 0.25, 0.5])
    def test_are_disjoint_by_content(self, fraction):
        numbers = [index % 29 + 5 for index in range(60)]
        for seed in range(8):
            parts = numbers_in(split_into(numbered(numbers), seed=seed, selection_fraction=fraction))
            assert len(parts) == (3 if fraction else 2)
            assert len(parts["held_out"]) == 12
            contents = [set(part) for part in parts.values()]
            assert sum(map(len, contents)) == len(set().union(*contents)) == 29
            lost = 60 - sum(map(len, parts.values()))
            assert lost > 0

    @pytest.mark.parametrize("fraction", [0.0, 0.25])
    def test_leave_out_of_the_calibration_what_the_evaluation_data_has_too(self, fraction):
        data = split_into(numbered(range(40)), numbered(range(30, 50)), selection_fraction=fraction)
        parts = numbers_in(data)
        assert parts["held_out"] == list(range(30, 50))
        assert sorted(parts["calibration"] + parts.get("selection", [])) == list(range(30))

    def test_of_the_same_data_twice_are_an_error_with_the_counts(self):
        examples = numbered(range(20))
        with pytest.raises(DataError, match="calib_dataset and eval_dataset overlap: 20 of 20 calibration items are"):
            split_into(examples, examples)
        with pytest.raises(DataError, match="calib_dataset and eval_dataset overlap: 10 of 20 calibration items are"):
            split_into(examples, [example | {"labels": 0} for example in examples[10:]])

    @pytest.mark.parametrize("fraction", [0.0, 0.25])
    @pytest.mark.parametrize("held_out", [True, False])
    def test_have_the_fingerprints_of_their_examples(self, fraction, held_out):
        evaluation = None if held_out else numbered(range(50, 60))
        data = split_into(numbered(range(40)), evaluation, selection_fraction=fraction)
        model = TINY_MODELS[NAME]()[0]
        parts = numbers_in(data)
        loaders = {part: getattr(data, part) for part in parts}
        loaders["calib_dataset"] = make_dataloader(numbered(range(40)), model, batch_size=8)
        assert data.fingerprints == {p: combined_digest(item_digests(loader, model)) for p, loader in loaders.items()}
        assert len(set(data.fingerprints.values())) == len(loaders) - (held_out is False and fraction == 0)

    def test_have_fingerprints_that_do_not_depend_on_the_order(self):
        calibration, evaluation = numbered(range(20)), numbered(range(50, 60))
        options = {"refit": False}
        fingerprints = split_into(calibration, evaluation, **options).fingerprints
        assert split_into(calibration[::-1], evaluation[::-1], **options).fingerprints == fingerprints
        changed = split_into(calibration, [*evaluation[1:], {"input_ids": [60], "labels": 0}], **options).fingerprints
        assert changed["calibration"] == fingerprints["calibration"]
        assert changed["held_out"] != fingerprints["held_out"]

    def test_depend_on_the_seed(self):
        assert split(40, seed=1) == split(40, seed=1) != split(40, seed=2)


class TestData:
    """What is wrong with the data shows before the work."""

    @pytest.fixture
    def tagger(self, monkeypatch):
        monkeypatch.setattr(calibration_module, "collect_statistics", lambda *_: pytest.fail("statistics collected"))
        model, batch = build("bert-token-classification")
        return model, as_examples(batch), as_examples(other_inputs(batch))

    @staticmethod
    def calibrate(model, calibration, evaluation, **options):
        LowRankCompressor(LosslessLowRankConfig(**options)).calibrate(model, calibration, eval_dataset=evaluation)

    def test_without_labels_to_evaluate_on_is_refused(self, tagger):
        model, calibration, evaluation = tagger
        for example in evaluation:
            del example["labels"]
        with pytest.raises(DataError, match="the data has no labels"):
            self.calibrate(model, calibration, evaluation)

    @pytest.mark.parametrize("selection_fraction", [0.0, 0.5])
    def test_that_gives_no_finite_loss_is_refused(self, tagger, selection_fraction):
        model, calibration, evaluation = tagger
        with torch.no_grad():
            model.classifier.bias[0] = torch.nan
        with pytest.raises(NumericalError, match="batch 0: the loss is nan"):
            self.calibrate(model, calibration, evaluation, selection_fraction=selection_fraction)

    def test_may_begin_with_an_example_without_a_label(self, tagger, monkeypatch):
        monkeypatch.undo()
        model, calibration, evaluation = tagger
        evaluation[0]["labels"] = [IGNORED] * len(evaluation[0]["labels"])
        self.calibrate(model, calibration, evaluation)


class TestOnDevice:
    @pytest.fixture
    def moves(self, monkeypatch):
        moves = []
        monkeypatch.setattr(nn.Module, "to", lambda module, device: moves.append((module, device)))
        return moves

    CPU, OTHER = torch.device("cpu"), torch.device("cuda", 3)

    @pytest.mark.parametrize("fails", [False, True])
    def test_moves_there_and_back_with_the_layers_that_left(self, moves, fails):
        model, layer = nn.Linear(2, 2), nn.Linear(2, 2)
        try:
            with on_device(model, self.OTHER, [layer]):
                assert moves == [(model, self.OTHER)]
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert moves[1:] == [(model, self.CPU), (layer, self.CPU)]

    def test_moves_nothing_that_is_there(self, moves):
        with on_device(nn.Linear(2, 2), self.CPU, [nn.Linear(2, 2)]):
            pass
        assert moves == []

    def test_moves_nothing_that_is_spread_over_devices(self, moves):
        mapped = nn.Linear(2, 2)
        mapped.hf_device_map = {"": 0}
        with torch.device("meta"):
            part = nn.Linear(2, 2)
        for model in (mapped, nn.Sequential(nn.Linear(2, 2), part)):
            with on_device(model, self.OTHER):
                pass
        assert moves == []

    def test_takes_the_replaced_layers_back_from_the_device_after_a_compression(self, monkeypatch):
        compressor, model = calibrated()
        targets = find_targets(model).chosen
        moves, to = [], nn.Module.to
        monkeypatch.setattr(Accelerator, "device", property(lambda _: torch.device("cpu", 0)))
        monkeypatch.setattr(nn.Module, "to", lambda m, *a, **k: (moves.append((m, a)), to(m, *a, **k))[1])
        compressor.compress_to(0.5)
        back = {id(module) for module, arguments in moves if arguments == (torch.device("cpu"),)}
        assert {id(module) for module in targets.values()} <= back
        assert id(model) in back


class TestLayersWithoutASignal:
    """What the data say nothing about stays dense, with the reason; it does not get rank 1 because that is free."""

    @staticmethod
    def frozen_part():
        """A classifier whose first layer is run without gradients."""
        model, batch = build("bert-sequence-classification")
        part, plain = model.bert.encoder.layer[0], model.bert.encoder.layer[0].forward

        def forward(*arguments, **options):
            with torch.no_grad():
                return plain(*arguments, **options)

        part.forward = forward
        return model, batch

    @pytest.mark.parametrize("metric", ["kronecker", "activation"])
    def test_stay_dense_with_the_reason_and_a_warning_that_names_them(self, metric, monkeypatch):
        model, batch = self.frozen_part()
        warnings = []
        monkeypatch.setattr(
            "hf_lossless_lr.pipeline.narrowing.logger.warning", lambda text, *parts: warnings.append(text % parts)
        )
        compressor = LowRankCompressor(LosslessLowRankConfig(metric=metric, refit=False))
        compressor.compress(model, split_batch(batch, 2), eval_dataset=[other_inputs(batch)])
        report = compressor.report
        quiet = {
            name for name, weight in report.skipped.items() if "no gradient of the loss reaches it" in weight.reason
        }
        assert quiet == {
            name for name in find_targets(build("bert-sequence-classification")[0]).chosen if ".0." in name
        }
        assert all(".1." in name for name in report.layers)
        assert any("6 layers stay dense" in text and next(iter(sorted(quiet))) in text for text in warnings)

    def test_are_compressed_where_nothing_depends_on_a_gradient(self):
        model, batch = self.frozen_part()
        config = LosslessLowRankConfig(objective="uniform", metric="activation", refit=False)
        compressor = LowRankCompressor(config)
        compressor.compress(model, split_batch(batch, 2), eval_dataset=[other_inputs(batch)])
        assert all(layer.rank is not None for layer in compressor.report.layers.values())
        assert any(".0." in name for name in compressor.report.layers)

    def test_are_an_error_where_all_are_such(self):
        model, batch = build("bert-sequence-classification")
        model.classifier.weight.data.zero_()
        with pytest.raises(NumericalError, match=r"no layer can be compressed .* no gradient of the loss reaches it"):
            LowRankCompressor(LosslessLowRankConfig()).compress(model, split_batch(batch, 2))
        assert not factorized_layers(model)


class TestAModelThatChangedSinceItsCalibration:
    @staticmethod
    def swap(model):
        layer = model.bert.encoder.layer[0].output
        layer.dense = nn.Linear(layer.dense.in_features, layer.dense.out_features)

    CHANGES: ClassVar = {
        "a target's weight": lambda model: model.bert.encoder.layer[1].output.dense.weight.data.mul_(1.01),
        "another weight": lambda model: model.classifier.bias.data.add_(0.1),
        "a cast": lambda model: model.to(torch.bfloat16),
        "a target": lambda model: TestAModelThatChangedSinceItsCalibration.swap(model),
    }

    @pytest.mark.parametrize("case", CHANGES)
    def test_is_refused_and_left_as_it_is(self, case):
        compressor, model = calibrated()
        compressor.compress_to(0.7)
        compressor.restore()
        self.CHANGES[case](model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(TargetError, match=r"[Cc]alibrate .*again"):
            compressor.compress_to(0.5)
        check_same_state(model.state_dict(), before)
        assert not factorized_layers(model)

    def test_is_not_one_that_was_compressed_in_between(self):
        compressor, _ = calibrated()
        for ratio in (0.8, 0.6):
            assert factorized_layers(compressor.compress_to(ratio))


class TestResidualConnections:
    """Errors of the residual stream are made up for where at least half of a layer's tokens have labels."""

    @staticmethod
    def found(name, unlabelled=0, **options):
        model, batch = TINY_MODELS[name](9)
        if unlabelled:
            batch["labels"][:, :unlabelled] = IGNORED
        compressor = LowRankCompressor(LosslessLowRankConfig(**options))
        compressor.calibrate(model, split_batch(batch, 3), eval_dataset=[other_inputs(batch)])
        return compressor._calibration.residuals

    @pytest.mark.parametrize(
        ("name", "layers"),
        [("llama", 4), ("gpt2", 4), ("bert-token-classification", 4), ("t5", 6), (NAME, 0), ("vit", 0)],
    )
    def test_are_known_where_tokens_have_labels_of_their_own(self, name, layers):
        found = self.found(name)
        assert len(found) == layers
        assert not any(layer.startswith("encoder") for layer in found)

    def test_are_not_looked_for_without_a_refit(self):
        assert self.found("llama", refit=False) == {}

    def test_do_not_count_where_most_tokens_have_no_label(self):
        assert self.found("llama", unlabelled=7) == {}

    def test_change_the_refit(self, monkeypatch):
        states = []
        for share in (0.5, 2.0):
            monkeypatch.setattr(stream_module, "LABELLED_SHARE", share)
            model, batch = TINY_MODELS["llama"](96)
            compressor = LowRankCompressor(LosslessLowRankConfig(selection_fraction=0.25))
            compressor.compress(model, split_batch(batch, 8)[:-2], eval_dataset=split_batch(batch, 8)[-2:])
            assert compressor.report.refitted
            states.append(model.state_dict())
        name = "model.layers.1.mlp.down_proj.up.weight"
        assert not torch.equal(states[0][name], states[1][name])
