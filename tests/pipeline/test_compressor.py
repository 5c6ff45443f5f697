"""`LowRankCompressor`: what it accepts, what it gives back, and that a failure leaves no trace."""

import importlib.metadata
import json
import pkgutil
from dataclasses import asdict, fields
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.compressions import (
    BATCH_SIZE,
    COUNT,
    build,
    certifiable,
    check_same_model,
    check_same_state,
    compress,
    count_parameters,
    factorized_layers,
)
from support.example_data import ListDataset, StreamDataset, collate
from support.processes import in_two_processes, needs_processes
from support.tiny_models import IGNORED, TINY_MODELS, as_examples, other_inputs, rows, split_batch
from support.tolerances import FLOAT32
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, BitsAndBytesConfig

from hf_lossless_lr import (
    CompressionReport,
    ConfigurationError,
    DataError,
    LosslessLowRankConfig,
    LowRankCompressor,
    NumericalError,
    TargetError,
)
from hf_lossless_lr.checkpoint.options import METRICS, OBJECTIVES, CompressionOptions
from hf_lossless_lr.fingerprint import tensors_fingerprint
from hf_lossless_lr.layers.factorized import is_factorized

LAYER = "bert.encoder.layer.0.attention.self.query"


def bert():
    return build("bert-sequence-classification")


def run(model, data, evaluation=None, **options):
    """Compress on any data, without a refit, and return the report."""
    compressor = LowRankCompressor(LosslessLowRankConfig(**{"batch_size": BATCH_SIZE, "refit": False} | options))
    assert compressor.compress(model, data, eval_dataset=evaluation) is model
    return compressor.report


def modules_of(model):
    return dict(model.named_modules(remove_duplicate=False))


# --- data -----------------------------------------------------------------------------------------------------------


def loader(data, **options):
    return DataLoader(data, **{"batch_size": BATCH_SIZE, "collate_fn": collate} | options)


KINDS = {
    "batches": lambda batch: split_batch(batch, BATCH_SIZE),
    "generator of batches": lambda batch: (part for part in split_batch(batch, BATCH_SIZE)),
    "examples": as_examples,
    "examples of tensors": lambda batch: [rows(batch, index) for index in range(COUNT)],
    "torch dataset": lambda batch: ListDataset(as_examples(batch)),
    "torch stream": lambda batch: StreamDataset(as_examples(batch)),
    "datasets.Dataset": lambda batch: datasets.Dataset.from_list(as_examples(batch)),
    "datasets.Dataset with other columns": lambda batch: datasets.Dataset.from_list(
        [example | {"sentence": "a b c", "idx": 3} for example in as_examples(batch)]
    ),
    "loader": lambda batch: loader(as_examples(batch)),
    "shuffled loader": lambda batch: loader(as_examples(batch), shuffle=True),
    "loader of batches": lambda batch: DataLoader(split_batch(batch, BATCH_SIZE), batch_size=None),
    "loader of a stream": lambda batch: loader(StreamDataset(as_examples(batch))),
}


@pytest.fixture(scope="module")
def from_batches():
    """What comes of batches: the model and the report."""
    model, batch = bert()
    report = run(model, *(split_batch(part, BATCH_SIZE) for part in (batch, other_inputs(batch))))
    return model, report


class TestData:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_every_kind_gives_the_same_model_and_can_be_evaluated_on(self, kind, from_batches):
        model, batch = bert()
        loss, accuracy = measured(model, other_inputs(batch))
        report = run(model, KINDS[kind](batch), KINDS[kind](other_inputs(batch)))
        expected_model, expected_report = from_batches
        check_same_state(model.state_dict(), expected_model.state_dict())
        assert report.calibration == expected_report.calibration
        assert report.fingerprints == expected_report.fingerprints
        assert report.calibration["examples"] == COUNT
        assert report.held_out == {"examples": COUNT, "units": COUNT}
        assert report.dense.loss == pytest.approx(loss, rel=FLOAT32)
        assert report.dense.accuracy == pytest.approx(accuracy)

    def test_goes_through_the_collator_that_is_given(self):
        (model, batch), seen = bert(), []

        def spy(items):
            seen.append(len(items))
            return collate(items)

        compressor = LowRankCompressor(LosslessLowRankConfig(batch_size=5, refit=False))
        evaluation = as_examples(other_inputs(batch))
        compressor.compress(model, as_examples(batch), eval_dataset=evaluation, data_collator=spy)
        assert set(seen) == {5, 2, 1}  # and the first example alone, to see that it works

    def test_that_is_held_out_is_a_fifth_and_takes_no_part_in_the_calibration(self, monkeypatch):
        model, batch = TINY_MODELS["bert-sequence-classification"](15)
        examples, seen = as_examples(batch), {}

        def spy(target):
            owner, name = target.rsplit(".", 1)
            original = getattr(pkgutil.resolve_name(owner), name)

            def spied(*arguments, **options):
                data = next(argument for argument in arguments if isinstance(argument, DataLoader))
                seen[name] = [row.tolist() for part in data for row in part["input_ids"]]
                return original(*arguments, **options)

            monkeypatch.setattr(target, spied)

        spy("hf_lossless_lr.pipeline.compressor.paired_outcomes")
        spy("hf_lossless_lr.pipeline.calibration.collect_statistics")
        report = run(model, examples)
        assert report.calibration["examples"] == 12
        assert report.held_out["examples"] == 3
        everything = [example["input_ids"] for example in examples]
        assert sorted(seen["paired_outcomes"] + seen["collect_statistics"]) == sorted(everything)
        held_out = [index for index, row in enumerate(everything) if row in seen["paired_outcomes"]]

        for index, same in ((held_out[0], True), (next(i for i in range(15) if i not in held_out), False)):
            changed = [
                example | {"labels": (example["labels"] + (i == index)) % 3} for i, example in enumerate(examples)
            ]
            other = bert()[0]
            other_report = run(other, changed)
            assert (other_report.calibration == report.calibration) is same
            # Labels of classes have no part in what a model is compressed to.
            assert tensors_fingerprint(other.state_dict()) == tensors_fingerprint(model.state_dict())

    def test_that_is_held_out_depends_on_the_seed_alone(self):
        batch = bert()[1]
        fingerprints = [run(bert()[0], as_examples(batch), seed=s).fingerprints for s in (0, 0, 1)]
        assert fingerprints[0] == fingerprints[1] != fingerprints[2]

    @pytest.mark.parametrize(
        "options", [{}, {"refit": True, "metric": "kronecker"}, {"objective": "compact"}], ids=str
    )
    def test_to_evaluate_on_is_run_once_by_each_model_and_takes_no_other_part(self, options):
        """But for its first item, to see that it is a batch and that it works."""
        model, batch = bert()
        evaluation, examples = other_inputs(batch), as_examples(batch)
        words, runs = evaluation["input_ids"].tolist(), []
        model.register_forward_pre_hook(
            lambda _, args, inputs: runs.extend(words.index(w) for w in inputs["input_ids"].tolist() if w in words),
            with_kwargs=True,
        )
        run(model, examples, split_batch(evaluation, 1), **options)
        assert runs == [0, 0, *(index for index in range(COUNT) for _ in range(2))]

    def test_that_is_in_both_sets_is_left_out_of_the_calibration_with_a_warning(self, monkeypatch):
        said = []
        monkeypatch.setattr(
            "hf_lossless_lr.data.splits.logger.warning", lambda text, *values: said.append(text % values)
        )
        (model, batch), other = bert(), bert()[0]
        examples, evaluation = as_examples(batch), as_examples(other_inputs(batch))
        report = run(model, examples, [*evaluation, *(examples[index] for index in (2, 5))])
        assert said == ["2 calibration items are in eval_dataset, too; they are left out of the calibration."]
        assert report.calibration["examples"] == COUNT - 2
        assert report.held_out["examples"] == COUNT + 2
        run(other, [example for index, example in enumerate(examples) if index not in (2, 5)], evaluation)
        check_same_state(model.state_dict(), other.state_dict())

    def test_that_is_the_same_in_both_sets_is_refused(self):
        model, batch = bert()
        before = Snapshot(model)
        with pytest.raises(
            DataError, match="calib_dataset and eval_dataset overlap: 12 of 12 calibration items are in"
        ):
            run(model, as_examples(batch), [batch])
        before.check(model)


# --- the result -----------------------------------------------------------------------------------------------------

METRIC_OF = {
    "uniform": "activation",
    "lossless": "fisher",
    "compact": "kronecker",
    "paper-lossless": "identity",
    "paper-compact": "identity",
}
"""Each objective to a metric that it takes; `budget` goes with every metric, `ranks` has tests of its own."""


class TestCompressing:
    def test_is_tried_for_each_objective(self):
        assert {*METRIC_OF, "budget", "ranks"} == set(OBJECTIVES)

    def test_is_in_place(self):
        model, batch = bert()
        before = modules_of(model)
        dense = {name: id(parameter) for name, parameter in model.named_parameters()}
        assert compress(model, batch)[0] is model
        after = modules_of(model)
        factorized = factorized_layers(model)
        assert factorized
        for path, module in before.items():
            assert (after[path] is module) == (path not in factorized), path
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0] not in factorized and ".down" not in name and ".up" not in name:
                assert id(parameter) == dense[name]

    def test_twice_gives_the_same_bits(self):
        (model, batch), other = bert(), bert()[0]
        report, other_report = compress(model, batch)[1], compress(other, batch)[1]
        check_same_state(model.state_dict(), other.state_dict())
        assert model.config.to_dict() == other.config.to_dict()
        of_the_machine = {"seconds": 0, "speed": 0, "memory": 0}
        assert asdict(report) | of_the_machine == asdict(other_report) | of_the_machine

    def test_leaves_its_configuration_alone(self):
        model, batch = bert()
        config = LosslessLowRankConfig(keep_ratio=0.4, refit=False)
        before = config.to_dict()
        LowRankCompressor(config).compress(model, [batch], eval_dataset=[other_inputs(batch)])
        assert config.to_dict() == before
        assert config.modules == {}
        assert model.config.quantization_config.modules

    @pytest.mark.parametrize(
        ("keep_ratio", "storage", "objective"),
        [  # any two of a row's values, and each size in each storage
            (0.25, "auto", "budget"),
            (0.25, "two-factor", "uniform"),
            (0.25, "pivoted", "budget"),
            (0.5, "auto", "uniform"),
            (0.5, "two-factor", "budget"),
            (0.5, "pivoted", "uniform"),
            (0.9, "auto", "budget"),
            (0.9, "two-factor", "uniform"),
            (0.9, "pivoted", "budget"),
        ],
    )
    def test_keeps_at_most_what_was_asked_for_and_not_much_less(self, keep_ratio, objective, storage):
        model, batch = bert()
        _, report = compress(model, batch, objective=objective, keep_ratio=keep_ratio, storage=storage)
        assert keep_ratio - 0.07 < report.keep_ratio <= keep_ratio
        layers = report.layers.values()
        if objective == "uniform":
            assert all(layer.parameters <= keep_ratio * layer.dense_parameters for layer in layers)
        assert {layer.storage for layer in layers} - {None} <= (
            {storage} if storage != "auto" else {"pivoted", "two-factor"}
        )

    def test_rounds_ranks_down_to_a_multiple(self):
        model, batch = bert()
        _, report = compress(model, batch, rank_multiple=4)
        assert all(layer.rank % 4 == 0 for layer in report.layers.values() if layer.rank)

    def test_factorizes_the_chosen_layers_alone(self):
        model, batch = bert()
        names = {LAYER, LAYER.replace("query", "key")}
        _, report = compress(
            model,
            batch,
            target_modules=["query", "key"],
            ignore=[name.replace("layer.0", "layer.1") for name in names],
        )
        assert set(factorized_layers(model)) == set(report.layers) == names

    @pytest.mark.parametrize(
        ("objective", "metric"), [*METRIC_OF.items(), *(("budget", metric) for metric in METRICS)]
    )
    def test_works_for_every_objective_and_every_metric(self, objective, metric):
        paper = objective.startswith("paper-")
        extra = {"epsilon": 1.0} if paper else {"loss_margin": 10.0, "accuracy_margin": 1.0}
        model, batch = bert()
        _, report = compress(model, batch, objective=objective, metric=metric, **extra)
        assert (report.config["objective"], report.config["metric"]) == (objective, metric)
        assert report.keep_ratio < 1
        assert report.compressed.parameters == count_parameters(model) < report.dense.parameters
        assert set(factorized_layers(model)) == {name for name, layer in report.layers.items() if layer.rank}
        assert (report.epsilon is not None) == paper

    def test_with_a_metric_that_sees_the_loss_costs_less_than_plain_svd(self):
        costs = {}
        for metric in ("kronecker", "identity"):
            model, batch = bert()
            costs[metric] = compress(model, batch, metric=metric, objective="uniform")[1].predicted_loss_increase
        assert costs["kronecker"] < 0.7 * costs["identity"]

    def test_with_a_larger_margin_gives_a_smaller_model(self):
        sizes = []
        for margin in (1e-3, 0.3, 1e6):
            model, batch = bert()
            report = compress(
                model, batch, objective="compact", loss_margin=margin, accuracy_margin=1.0, storage="pivoted"
            )[1]
            sizes.append(report.compressed.parameters)
        assert sizes[0] > sizes[1] > sizes[2]
        assert {layer.rank for layer in report.layers.values()} == {1}

    def test_by_the_paper_gives_algorithm_2_no_larger_ranks_than_algorithm_1(self):
        ranks = {}
        for objective in ("paper-lossless", "paper-compact"):
            model, batch = bert()
            report = compress(model, batch, objective=objective, epsilon=10.0)[1]
            ranks[objective] = {name: layer.rank for name, layer in report.layers.items()}
            assert all(layer.first_order < 0 for layer in report.layers.values() if layer.rank)
            assert set(report.epsilon.values()) == {10.0}
        pairs = [(ranks["paper-compact"][name], rank) for name, rank in ranks["paper-lossless"].items()]
        assert all((a is None) == (b is None) for a, b in pairs)
        assert all(a <= b for a, b in pairs if b)
        assert any(a < b for a, b in pairs if b)

    def test_by_the_paper_without_an_epsilon_calibrates_one_for_each_layer(self):
        model, batch = bert()
        report = compress(model, batch, objective="paper-lossless", epsilon_tolerance=0.05)[1]
        assert report.epsilon.keys() == report.layers.keys()
        assert len(set(report.epsilon.values())) == len(report.layers)

    @pytest.mark.parametrize("training", [True, False])
    def test_preserves_the_training_mode(self, training):
        model, batch = bert()
        model.train(training)
        model.bert.encoder.layer[1].train(not training)
        before = {path: module.training for path, module in modules_of(model).items()}
        compress(model, batch)
        after = {path: module.training for path, module in modules_of(model).items()}
        assert {path: after[path] for path in before} == before
        for path, layer in factorized_layers(model).items():
            assert layer.down.training == layer.up.training == before[path]

    def test_preserves_gradients_and_what_requires_them(self):
        model, batch = bert()
        model.bert.embeddings.requires_grad_(False)
        model(**batch).loss.backward()
        kept = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters() if "encoder" not in name}
        compress(model, batch)
        after = dict(model.named_parameters())
        assert {name: (after[name].requires_grad, after[name].grad) for name in kept} == kept
        assert all(layer.up.weight.requires_grad for layer in factorized_layers(model).values())

    def test_uses_no_dropout(self):
        model, batch = bert()
        other = bert()[0].train()
        compress(model, batch)
        compress(other, batch)
        check_same_state(model.state_dict(), other.state_dict())

    def test_replaces_a_shared_layer_at_each_of_its_places(self):
        model, batch = bert()
        model.bert.encoder.layer[1].intermediate.dense = model.bert.encoder.layer[0].intermediate.dense
        _, report = compress(model, batch)
        first, second = (model.bert.encoder.layer[i].intermediate.dense for i in (0, 1))
        assert first is second
        assert is_factorized(first)
        assert "bert.encoder.layer.1.intermediate.dense" not in report.layers
        manifest = model.config.quantization_config.modules
        assert (
            manifest["bert.encoder.layer.0.intermediate.dense"] == manifest["bert.encoder.layer.1.intermediate.dense"]
        )


NOTHING_QUALIFIES = {
    "compact": {"objective": "compact", "loss_margin": 0.0, "confidence": 0.999999},
    "lossless": {"objective": "lossless", "rank_multiple": 64},
    "paper-lossless": {"objective": "paper-lossless", "epsilon": 1e-9},
    "paper-compact": {"objective": "paper-compact", "epsilon": 1e-9},
    "budget": {"objective": "budget", "keep_ratio": 1.0},
    "uniform": {"objective": "uniform", "keep_ratio": 1.0},
}


class TestWhenNothingQualifies:
    @pytest.mark.parametrize("case", NOTHING_QUALIFIES)
    def test_the_model_stays_dense_and_saves_as_a_plain_one(self, case, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(
            "hf_lossless_lr.pipeline.choosing.logger.warning", lambda text, *values: said.append(text % values)
        )
        model, batch = bert()
        model(**batch)  # which sets the problem type in the configuration, where it is not known yet
        before = Snapshot(model)
        _, report = compress(model, batch, **NOTHING_QUALIFIES[case])
        before.check(model)
        assert said == [
            "no compressed model met loss_margin=0.0 and accuracy_margin=0.01 on the selection split; the targeted "
            "layers stay dense. Raise the margins, or give more calibration data."
            if case == "compact"
            else f"no rank meets objective={case!r} in any layer; the targeted layers stay dense."
        ]
        assert report.keep_ratio == report.model_keep_ratio == 1.0
        assert report.predicted_loss_increase == 0.0
        assert report.dense == report.compressed
        assert (report.certificate, report.uncertified, report.verdict) == (None, "nothing was compressed", "none")
        assert all(layer.rank is None and layer.storage is None for layer in report.layers.values())
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        check_same_model(model, type(model).from_pretrained(tmp_path), batch)

    def test_the_model_can_be_compressed_with_other_options(self):
        model, batch = bert()
        compress(model, batch, **NOTHING_QUALIFIES["compact"])
        assert compress(model, batch, keep_ratio=0.5)[1].keep_ratio <= 0.5


# --- the report -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measured(model, batch):
    """Loss and accuracy of a classifier, in double precision."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    loss = nn.functional.cross_entropy(logits, batch["labels"])
    return float(loss), float((logits.argmax(-1) == batch["labels"]).double().mean())


@pytest.fixture(scope="module")
def reported():
    """A compressed model, its data and its report; treat them as read-only."""
    model, batch = bert()
    held_out = TINY_MODELS["bert-sequence-classification"](9, seed=1)[1]
    facts = {
        "fingerprint": tensors_fingerprint(model.state_dict()),
        "measured": measured(model, held_out),
        "parameters": count_parameters(model),
        "weights": {path: module.weight.shape for path, module in modules_of(model).items() if is_dense(module)},
    }
    compressor = LowRankCompressor(LosslessLowRankConfig(keep_ratio=0.4, batch_size=4, refit=False))
    assert compressor.report is None
    compressor.compress(model, as_examples(batch), eval_dataset=as_examples(held_out))
    return model, batch, held_out, facts, compressor.report


class TestReport:
    def test_has_the_losses_and_accuracies_of_both_models_on_the_held_out_data(self, reported):
        model, _, held_out, facts, report = reported
        for measurement, (loss, accuracy) in (
            (report.dense, facts["measured"]),
            (report.compressed, measured(model, held_out)),
        ):
            assert measurement.loss == pytest.approx(loss, rel=FLOAT32)
            assert measurement.accuracy == pytest.approx(accuracy)
        assert report.dense.loss != report.compressed.loss
        assert report.held_out == {"examples": 9, "units": 9}

    def test_has_the_parameters_that_can_be_counted(self, reported):
        model, _, _, facts, report = reported
        assert report.dense.parameters == facts["parameters"]
        assert report.compressed.parameters == count_parameters(model)
        assert report.model_keep_ratio == count_parameters(model) / facts["parameters"]
        kept = dense = 0
        for name, layer in report.layers.items():
            module = model.get_submodule(name)
            assert (layer.out_features, layer.in_features) == tuple(facts["weights"][name])
            assert layer.dense_parameters == facts["weights"][name].numel()
            weights = (module.down.weight, module.up.weight) if is_factorized(module) else (module.weight,)
            assert layer.parameters == sum(weight.numel() for weight in weights)
            assert layer.rank == (module.rank if is_factorized(module) else None)
            assert layer.storage == (module.storage if is_factorized(module) else None)
            kept, dense = kept + layer.parameters, dense + layer.dense_parameters
        assert report.keep_ratio == kept / dense <= 0.4
        assert facts["parameters"] - count_parameters(model) == dense - kept

    def test_says_what_became_of_every_layer(self, reported):
        model, _, _, facts, report = reported
        embeddings = {f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")}
        assert report.layers.keys() | report.skipped.keys() == facts["weights"].keys() | embeddings
        reasons = {name: weight.reason for name, weight in report.skipped.items()}
        assert reasons == {
            "bert.pooler.dense": "pooler",
            "classifier": "task head",
            **dict.fromkeys(embeddings, "embeddings"),
        }
        for name, weight in report.skipped.items():
            assert weight.parameters == model.get_submodule(name).weight.numel()
            assert weight.share == weight.parameters / facts["parameters"]

    def test_says_what_it_ran_on(self, reported):
        _, batch, _, facts, report = reported
        assert report.model == "BertForSequenceClassification"
        assert report.config == {
            f.name: getattr(LosslessLowRankConfig(keep_ratio=0.4, batch_size=4, refit=False), f.name)
            for f in fields(CompressionOptions)
        }
        assert report.model_fingerprint == facts["fingerprint"]
        assert {name: report.calibration[name] for name in ("examples", "units")} == {
            "examples": COUNT,
            "units": COUNT,
        }
        dense = bert()[0]
        assert report.calibration["loss"] == pytest.approx(measured(dense, batch)[0], rel=FLOAT32)
        assert report.fingerprints.keys() == {"calib_dataset", "calibration", "held_out"}
        assert all(len(fingerprint) == 64 for fingerprint in report.fingerprints.values())
        assert report.versions["torch"] == importlib.metadata.version("torch")
        assert report.versions["hf-lossless-lr"] == importlib.metadata.version("hf-lossless-lr")
        assert list(report.seconds) == ["statistics", "factorization", "replacement", "held_out", "speed"]
        assert all(seconds > 0 for seconds in report.seconds.values())

    def test_predicts_what_the_layers_cost(self, reported):
        report = reported[-1]
        for layer in report.layers.values():
            assert (layer.second_order > 0) == (layer.rank is not None)
            assert layer.first_order is None  # which only the paper's objectives use
        assert report.predicted_loss_increase == sum(layer.second_order for layer in report.layers.values())

    def test_survives_json(self, reported):
        report = reported[-1]
        assert CompressionReport.from_json(report.to_json()) == report

    def test_is_that_of_the_last_success(self, reported):
        _, batch, *_ = reported
        compressor = LowRankCompressor(LosslessLowRankConfig(refit=False))
        model = bert()[0]
        compressor.compress(model, [batch], eval_dataset=[other_inputs(batch)])
        report = compressor.report
        with pytest.raises(TargetError, match="already compressed"):
            compressor.compress(model, [batch], eval_dataset=[other_inputs(batch)])
        assert compressor.report is report


def is_dense(module):
    return type(module) is nn.Linear


# --- failures -------------------------------------------------------------------------------------------------------


class Snapshot:
    """Everything about a model that a failure must leave as it was."""

    HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def __init__(self, model):
        self.modules = modules_of(model)
        self.flags = {
            path: (module.training, *(list(getattr(module, hook).items()) for hook in self.HOOKS))
            for path, module in self.modules.items()
        }
        self.parameters = {
            name: (id(p), p.requires_grad, id(p.grad), p.device) for name, p in model.named_parameters()
        }
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
        self.config = model.config.to_dict()
        self.attributes = (set(vars(model)), set(vars(model.config)))

    def check(self, model):
        now = Snapshot(model)
        assert now.modules.keys() == self.modules.keys()
        assert all(now.modules[path] is module for path, module in self.modules.items())
        assert now.flags == self.flags
        assert now.parameters == self.parameters
        assert {n: tensors_fingerprint({n: t}) for n, t in now.state.items()} == {
            n: tensors_fingerprint({n: t}) for n, t in self.state.items()
        }
        assert now.grads.keys() == self.grads.keys()
        assert all(torch.equal(grad, self.grads[name]) for name, grad in now.grads.items())
        assert now.config == self.config
        assert now.attributes == self.attributes


def fail_in(monkeypatch, target, call, error):
    """Let the given call of a function raise; return the list that counts the calls."""
    path, name = target.rsplit(".", 1)
    owner, calls = pkgutil.resolve_name(path), []
    original = getattr(owner, name)

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    return calls


# Three batches to evaluate on, two to calibrate on, and one as selection split. In a comparison, the dense model has
# each odd call and the compressed one each even call. An interrupt is no `Exception`, so most stages get one: what
# cleans up after errors alone fails there. A `NumericalError` is what the package itself raises, and wraps.
STAGES = {  # what fails, at which call, and with which error
    "the first item of the evaluation data": ("hf_lossless_lr.pipeline.calibration.forward_loss", 1, RuntimeError),
    "the first item of the selection split": (
        "hf_lossless_lr.pipeline.calibration.forward_loss",
        2,
        KeyboardInterrupt,
    ),
    "statistics, forward": ("hf_lossless_lr.statistics.collector.forward_loss", 2, KeyboardInterrupt),
    "statistics, backward": ("torch.autograd.backward", 2, RuntimeError),
    "factorization": ("hf_lossless_lr.pipeline.factoring.factorize", 3, NumericalError),
    "prediction": ("hf_lossless_lr.pipeline.factoring.loss_curve", 3, RuntimeError),
    "choice of the ranks": ("hf_lossless_lr.ranks.objectives.select_budget", 1, KeyboardInterrupt),
    "building a layer": ("hf_lossless_lr.layers.FactorizedLinear.load_factors", 3, RuntimeError),
    "the third replacement": ("torch.nn.Module.set_submodule", 3, KeyboardInterrupt),
    "dense model on the selection split": ("hf_lossless_lr.verdict.answers.forward_loss", 1, KeyboardInterrupt),
    "comparison before the refit": ("hf_lossless_lr.verdict.answers.forward_loss", 2, KeyboardInterrupt),
    "refit, forward": ("hf_lossless_lr.statistics.streams.run_batch", 3, KeyboardInterrupt),
    "refit, third layer": ("hf_lossless_lr.factors.refit._solve", 3, NumericalError),
    "comparison after the refit": ("hf_lossless_lr.verdict.answers.forward_loss", 3, RuntimeError),
    "dense model on the evaluation data": ("hf_lossless_lr.verdict.answers.forward_loss", 6, NumericalError),
    "compressed model on the evaluation data": ("hf_lossless_lr.verdict.answers.forward_loss", 9, KeyboardInterrupt),
    "unfusing experts": ("hf_lossless_lr.pipeline.compressor.replace_modules", 1, KeyboardInterrupt),
    "putting the chosen layers in": ("hf_lossless_lr.pipeline.placing.replace_modules", 2, KeyboardInterrupt),
    "marking": ("hf_lossless_lr.pipeline.placing.mark_compressed", 1, RuntimeError),
    "the certificate": ("hf_lossless_lr.pipeline.summary.certify", 1, KeyboardInterrupt),
    "the report": ("hf_lossless_lr.pipeline.summary.CompressionReport", 1, RuntimeError),
    "the card": ("hf_lossless_lr.pipeline.compressor.attach_card", 1, KeyboardInterrupt),
}


class TestFailure:
    @pytest.fixture
    def used(self):
        """A model in the middle of a user's work: mixed modes, frozen parts, gradients, hooks; and a batch."""
        model, batch = bert()
        model(**batch).loss.backward()
        model.config.problem_type = None  # the loss has set it
        model.bert.embeddings.requires_grad_(False)
        model.train()
        model.bert.encoder.layer[1].eval()
        model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
        return model, batch

    @pytest.mark.parametrize("stage", STAGES)
    def test_leaves_the_model_exactly_as_it_was(self, used, stage, monkeypatch):
        model, batch = used
        before = Snapshot(model)
        compressor = LowRankCompressor(LosslessLowRankConfig(selection_fraction=0.3))
        target, call, error = STAGES[stage]
        with monkeypatch.context() as patch:
            calls = fail_in(patch, target, call, error("broken on purpose"))
            with pytest.raises(error, match="broken on purpose"):
                compressor.compress(model, split_batch(batch, 4), eval_dataset=split_batch(other_inputs(batch), 4))
        assert len(calls) >= call
        before.check(model)
        assert compressor.report is None
        compressor.compress(model, split_batch(batch, 4), eval_dataset=[other_inputs(batch)])
        assert factorized_layers(model)

    def test_leaves_the_model_exactly_as_it_was_while_a_weight_is_replaced_to_measure(self, used, monkeypatch):
        model, batch = used
        before = Snapshot(model)
        fail_in(monkeypatch, "hf_lossless_lr.ranks.paper.mean_loss", 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compress(model, batch, objective="paper-compact")
        before.check(model)

    def test_at_the_replacement_restores_every_place_of_a_shared_layer(self, monkeypatch):
        model, batch = build("albert")
        model.albert.encoder.twin = model.albert.encoder.albert_layer_groups[0]
        before = Snapshot(model)
        fail_in(monkeypatch, "torch.nn.Module.set_submodule", 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compress(model, batch)
        before.check(model)

    def test_names_the_layer_that_cannot_be_factorized(self, used, monkeypatch):
        model, batch = used
        error = NumericalError("not finite")
        fail_in(monkeypatch, "hf_lossless_lr.pipeline.factoring.factorize", 1, error)
        with pytest.raises(NumericalError, match=f"'{LAYER}': not finite") as caught:
            compress(model, batch)
        assert caught.value.__cause__ is error


def no_labels(model, batch):
    return model, [{name: value for name, value in batch.items() if name != "labels"}]


def headless(model, batch):
    return model.base_model, [batch]


def frozen(model, batch):
    model.bert.encoder.layer[0].attention.self.query.requires_grad_(False)
    return model, [batch]


def all_frozen(model, batch):
    return model.requires_grad_(False), [batch]


def on_meta(model, batch):
    with torch.device("meta"):
        return BertForSequenceClassification(model.config), [batch]


def no_room_on_its_device(device):
    """Its weights come to a device one after the other; on this machine there may be none."""

    def offload(model, batch):
        cpu_offload(model)
        for module in model.modules():
            for hook in getattr(getattr(module, "_hf_hook", None), "hooks", [getattr(module, "_hf_hook", None)]):
                if hook is not None:
                    hook.execution_device = device
        return model, [batch]

    return offload


def offloaded_by_blocks(model, batch):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"execution_device": torch.device("cpu"), "offload": True, "weights_map": state}
    attach_align_device_hook(model, preload_module_classes=["BertLayer"], **options)
    return model, [batch]


def already_compressed(model, batch):
    return compress(model, batch)[0], [batch]


def quantized(model, batch):
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    return model, [batch]


class Int8Linear(nn.Linear):
    def __init__(self):
        super().__init__(32, 32)
        self.weight = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def quantized_layer(model, batch):
    model.bert.encoder.layer[0].attention.self.query = Int8Linear()
    return model, [batch]


def adapted(model, batch):
    return get_peft_model(model, LoraConfig(target_modules=["query"])), [batch]


def nan_weight(model, batch):
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = torch.nan
    return model, [batch]


def infinite_loss(model, batch):
    with torch.no_grad():
        model.classifier.bias[0] = torch.inf
    return model, [batch]


def all_ignored(model, batch):
    model, batch = build("bert-token-classification")
    batch["labels"][:] = IGNORED
    return model, [batch]


def data(change):
    """A bad data set for a good model."""
    return lambda model, batch: (model, change(batch))


BAD_INPUTS = {  # what is wrong: change of model and batch, error, its text
    "no labels": (
        no_labels,
        DataError,
        "has no labels: BertForSequenceClassification takes labels, the batch has inp",
    ),
    "no loss": (headless, DataError, "batch 0: BertModel returned no loss. Use a model class with a task head"),
    "no example": (data(lambda batch: []), DataError, "calib_dataset: is empty"),
    "few examples": (
        data(lambda batch: as_examples(batch)[:5]),
        DataError,
        "calib_dataset: has 5 examples; at least 8 are needed",
    ),
    "few examples in batches": (
        data(lambda batch: split_batch(rows(batch, slice(7)), 2)),
        DataError,
        "calib_dataset: has 7 examples; at least 8 are needed",
    ),
    "one batch": (
        data(lambda batch: batch),
        DataError,
        "expected a Dataset, a DataLoader or an iterable of batches, got",
    ),
    "text": (
        data(lambda batch: [{"sentence": "a b", "id": 1}] * 9),
        DataError,
        "has the columns sentence, id, none of which BertForSequenceClassification takes. Tokenize the text",
    ),
    "a tuple": (data(lambda batch: [(1, 2)] * 9), DataError, "batch 0 is a tuple; each batch must map"),
    "every label ignored": (all_ignored, DataError, "every label is -100"),
    "compressed": (
        already_compressed,
        TargetError,
        "this BertForSequenceClassification is already compressed. Call `m",
    ),
    "quantized": (
        quantized,
        TargetError,
        "this BertForSequenceClassification is quantized. Compress it in floating poi",
    ),
    "quantized layer": (quantized_layer, TargetError, rf"'{LAYER}' is quantized \(Int8Linear, torch.int8\)"),
    "meta": (on_meta, TargetError, "this BertForSequenceClassification is on the meta device and has no values. Load"),
    "no room": (
        no_room_on_its_device(torch.device("cuda", 0)),
        TargetError,
        "are offloaded .* no room on cuda:0. Load it without a device_map",
    ),
    "no room on a numbered device": (no_room_on_its_device(0), TargetError, "are offloaded .* no room on 0. Load"),
    "blocks on their way together": (offloaded_by_blocks, TargetError, "Offload it without `preload_module_classes`"),
    "frozen layer": (frozen, TargetError, rf"'{LAYER}' is frozen \(requires_grad=False\), so it gets no gradient"),
    "frozen model": (all_frozen, TargetError, r"is frozen .* Call `model.requires_grad_\(True\)`"),
    "no Transformers model": (
        lambda model, batch: (nn.Linear(3, 3), [batch]),
        TargetError,
        "takes a transformers PreTrainedModel, got Linear. Unwrap it first",
    ),
    "adapter": (adapted, TargetError, r"got PeftModel. Unwrap it first \(for PEFT: `merge_and_unload\(\)`"),
    "NaN weight": (nan_weight, NumericalError, "batch 0: the loss is nan; check the labels and the inputs"),
    "infinite loss": (infinite_loss, NumericalError, "batch 0: the loss is (inf|nan)"),
}


class TestRefusal:
    @pytest.mark.parametrize("case", BAD_INPUTS)
    def test_of_a_bad_input_says_what_is_wrong_and_changes_nothing(self, case):
        change, error, text = BAD_INPUTS[case]
        model, batch = bert()
        model, calibration = change(model, batch)
        before = Snapshot(model) if hasattr(model, "config") and not hasattr(model, "peft_config") else None
        as_bad = case in ("every label ignored", "no loss", "no labels")
        evaluation = [other_inputs(calibration[0] if as_bad else batch)]
        with pytest.raises(error, match=text):
            LowRankCompressor(LosslessLowRankConfig(refit=False)).compress(model, calibration, eval_dataset=evaluation)
        if before is not None:
            before.check(model)

    def test_of_a_model_that_a_quantizer_loaded(self):
        model, batch = bert()
        model.is_quantized = True
        with pytest.raises(TargetError, match="this BertForSequenceClassification is quantized"):
            compress(model, batch)

    def test_of_an_empty_evaluation_set_names_it(self):
        model, batch = bert()
        with pytest.raises(DataError, match="eval_dataset: is empty"):
            LowRankCompressor().compress(model, [batch], eval_dataset=[])

    def test_of_one_batch_to_split_asks_for_an_evaluation_set(self):
        model, batch = bert()
        with pytest.raises(
            DataError, match=r"1 items \(.*\) are too few to hold some out for verification; pass eval_d"
        ):
            LowRankCompressor().compress(model, [batch])

    @pytest.mark.parametrize(("objective", "way_out"), [("budget", ", or selection_fraction=0"), ("compact", "")])
    def test_of_one_batch_to_select_on_says_what_to_do(self, objective, way_out):
        model, batch = bert()
        text = rf"too few to hold some out for choosing by measurement; pass more \(and smaller\) items{way_out}\.$"
        with pytest.raises(DataError, match=text):
            LowRankCompressor(LosslessLowRankConfig(objective=objective, selection_fraction=0.3)).compress(
                model, [batch], eval_dataset=[other_inputs(batch)]
            )

    @pytest.mark.parametrize("keep_ratio", [0, -0.5, 1.01])
    def test_of_a_share_that_is_none(self, keep_ratio):
        with pytest.raises(ConfigurationError, match=r"keep_ratio: must be a number in \(0, 1\], got"):
            LowRankCompressor(LosslessLowRankConfig(keep_ratio=keep_ratio))

    @pytest.mark.parametrize("objective", ["budget", "uniform"])
    def test_of_a_size_that_cannot_be_reached(self, objective):
        model, batch = bert()
        before = Snapshot(model)
        with pytest.raises(ConfigurationError, match=r"keep_ratio=0\.001 cannot be reached"):
            compress(model, batch, objective=objective, keep_ratio=0.001)
        before.check(model)

    def test_of_a_pattern_that_matches_nothing(self):
        model, batch = bert()
        with pytest.raises(TargetError, match="target_modules: 'q_proj' matches no layer"):
            compress(model, batch, target_modules=["q_proj"])


# --- several processes ----------------------------------------------------------------------------------------------

LAUNCHED = {  # name of the case: model, options, how the data is given, whether there is evaluation data
    "budget": ("bert-sequence-classification", {}, "batches", True),
    "held out": ("bert-sequence-classification", {"batch_size": 3}, "examples", False),
    "shared layers": ("albert", {"metric": "activation", "storage": "two-factor"}, "batches", True),
    "uniform": ("llama", {"objective": "uniform", "keep_ratio": 0.4}, "batches", True),
    "the paper": ("bert-sequence-classification", {"objective": "paper-compact"}, "batches", True),
    "certified": ("bert-sequence-classification", {"loss_margin": 9.0, "accuracy_margin": 1.0}, "batches", True),
}


def compress_case(name):
    model_name, options, kind, evaluate = LAUNCHED[name]
    model, batch = build(model_name)
    evaluation = split_batch(other_inputs(batch), 5)
    if name == "certified":
        model, batch, other = certifiable()
        evaluation = split_batch(other, 7)
    compressor = LowRankCompressor(LosslessLowRankConfig(**options))
    compressor.compress(model, KINDS[kind](batch), eval_dataset=evaluation if evaluate else None)
    return model, compressor.report


def facts_of(model, report):
    losses = [report.dense.loss, report.compressed.loss, report.calibration["loss"]]
    if report.certificate is not None:
        bounds = (report.certificate.loss_increase, report.certificate.tempered_loss_increase)
        losses += [value for bound in bounds for value in (bound.lower, bound.upper)]
    return {
        "ranks": {name: layer.rank for name, layer in report.layers.items()},
        "losses": losses,
        "data": [report.calibration["examples"], report.fingerprints, report.held_out],
        "accuracies": [report.dense.accuracy, report.compressed.accuracy],
        "manifest": getattr(model.config, "quantization_config", LosslessLowRankConfig()).modules,
        "parameters": report.compressed.parameters,
        "verdict": [report.verdict, report.uncertified],
    }


def compress_cases(folder: Path, process: int) -> None:
    """What each launched process runs: all cases, saved under the number of the process."""
    facts = {}
    for case in LAUNCHED:
        model, report = compress_case(case)
        assert torch.distributed.get_world_size() == 2
        facts[case] = facts_of(model, report)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, folder / f"{case}-{process}.safetensors")
    (folder / f"{process}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(compress_cases, folder)
    facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return folder, facts


@needs_processes
class TestTwoProcesses:
    @pytest.mark.parametrize("case", LAUNCHED)
    def test_end_with_the_same_model_to_the_last_bit(self, case, launched):
        folder, (facts, others) = launched
        assert facts[case] == others[case]
        check_same_state(*(load_file(folder / f"{case}-{rank}.safetensors") for rank in (0, 1)))

    @pytest.mark.parametrize("case", LAUNCHED)
    def test_end_with_the_model_of_one_process(self, case, launched):
        folder, (facts, _) = launched
        model, report = compress_case(case)
        assert (report.certificate is not None) == (case == "certified")
        expected = json.loads(json.dumps(facts_of(model, report)))
        losses = facts[case].pop("losses")
        assert losses == pytest.approx(expected.pop("losses"), rel=10 * FLOAT32)
        assert facts[case] == expected
        facts[case]["losses"] = losses
        products = {name: layer.dense_weight().clone() for name, layer in factorized_layers(model).items()}
        model.load_state_dict(load_file(folder / f"{case}-0.safetensors"), strict=False)
        for name, layer in factorized_layers(model).items():
            error = (layer.dense_weight() - products[name]).abs().max() / products[name].abs().max()
            assert error <= 10 * FLOAT32, name
