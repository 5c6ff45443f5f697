"""Measured loss and accuracy: each labelled unit once, whatever the batches."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from tiny_models import IGNORED, TINY_MODELS, rows, split_batch
from tolerances import FLOAT32
from torch.utils.data import DataLoader

from hf_lossless_lr.errors import DataError, NumericalError
from hf_lossless_lr.verification import BatchOutcome, Evaluation, evaluate, mean_divergence, paired_differences

COUNT = 11


def first(items):
    return items[0]


def loader_of(batches):
    return DataLoader(list(batches), batch_size=1, collate_fn=first)


def accelerator():
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))


def measure(model, batches):
    return evaluate(model, loader_of(batches), accelerator(), description=None)


def pairs(name, model, batch):
    """Double-precision logits and labels of all labelled units, one row each, example by example."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "start_positions", "end_positions")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model._shift_right(batch["labels"])
    model = model.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        outputs = model(**inputs)
    if name == "bert-question-answering":
        logits = torch.stack([outputs.start_logits, outputs.end_logits], 1)
        return logits, torch.stack([batch["start_positions"], batch["end_positions"]], 1)
    logits, labels = outputs.logits, batch["labels"]
    if name in ("llama", "gpt2"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != IGNORED
    return logits[kept], labels[kept]


def expected(name, model, batch):
    """Mean cross entropy over units, accuracy and number of units, written out."""
    logits, labels = pairs(name, model, batch)
    logs = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    right = logits.argmax(-1) == labels
    if name == "bert-question-answering":  # one unit an example: the mean of two losses, both answers right
        logs, right = logs.mean(1), right.all(1)
    return float(-logs.mean()), float(right.double().mean()), len(logs)


class TestEvaluation:
    @pytest.mark.parametrize("size", [1, 4, COUNT])
    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_is_the_mean_over_labelled_units_whatever_the_batches(self, name, size):
        model, batch = TINY_MODELS[name](COUNT)
        result = measure(model, split_batch(batch, size))
        loss, accuracy, units = expected(name, model, batch)
        assert (result.examples, result.units) == (COUNT, units)
        assert result.loss == pytest.approx(loss, rel=FLOAT32)
        assert result.accuracy == pytest.approx(accuracy, abs=1e-12)

    def test_weighs_ragged_batches_by_their_units(self):
        """The mean of the batches' losses would be another number."""
        model, batch = TINY_MODELS["bert-token-classification"](COUNT)
        parts = [rows(batch, slice(0, 1)), rows(batch, slice(1, 8)), rows(batch, slice(8, COUNT))]
        for part in parts:  # cut each to its own longest text
            longest = int(part["attention_mask"].sum(1).max())
            part.update({name: value[:, :longest].contiguous() for name, value in part.items()})
        result = measure(model, parts)
        with torch.no_grad():
            naive = sum(model(**part).loss.item() for part in parts) / 3
        loss, _, units = expected("bert-token-classification", model, batch)
        assert result.units == units
        assert result.loss == pytest.approx(loss, rel=FLOAT32)
        assert abs(naive - loss) > 100 * FLOAT32 * loss

    def test_passes_over_a_batch_without_a_label(self):
        model, batch = TINY_MODELS["bert-token-classification"](COUNT)
        parts = split_batch(batch, 4)
        whole = measure(model, parts[:1] + parts[2:])
        parts[1]["labels"] = torch.full_like(parts[1]["labels"], IGNORED)
        result = measure(model, parts)
        assert (result.loss, result.accuracy, result.units) == (whole.loss, whole.accuracy, whole.units)
        assert result.examples == COUNT

    def test_has_no_accuracy_for_a_regression(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        model.config.problem_type, model.config.num_labels, model.num_labels = "regression", 1, 1
        model.classifier = torch.nn.Linear(32, 1)
        batch["labels"] = batch["labels"].float()
        result = measure(model, split_batch(batch, 4))
        with torch.no_grad():
            loss = torch.nn.functional.mse_loss(model(**batch).logits[:, 0].double(), batch["labels"].double())
        assert result.accuracy is None
        assert result.loss == pytest.approx(float(loss), rel=FLOAT32)

    def test_has_the_accuracy_of_a_model_that_is_always_right(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        with torch.no_grad():
            batch["labels"] = model(**batch).logits.argmax(-1)
        assert measure(model, split_batch(batch, 4)).accuracy == 1.0
        batch["labels"][:3] = (batch["labels"][:3] + 1) % 3
        assert measure(model, split_batch(batch, 4)).accuracy == pytest.approx((COUNT - 3) / COUNT)

    def test_turns_dropout_off_and_leaves_the_modes(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        quiet = measure(model, [batch])
        model.train()
        model.classifier.eval()
        assert measure(model, [batch]) == quiet
        modes = {name: module.training for name, module in model.named_modules()}
        assert not modes.pop("classifier")
        assert all(modes.values())

    def test_leaves_the_modes_after_an_error(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        del batch["labels"]
        with pytest.raises(DataError, match="has no labels"):
            measure(model.train(), [batch])
        assert all(module.training for module in model.modules())

    def test_builds_no_graph(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        seen = []
        model.classifier.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
        measure(model, [batch])
        assert seen == [False]


class TestRefusal:
    def test_of_data_in_which_every_label_is_ignored(self):
        model, batch = TINY_MODELS["llama"](COUNT)
        batch["labels"][:] = IGNORED
        with pytest.raises(DataError, match="no example of the evaluation set has a label: every label is -100"):
            measure(model, split_batch(batch, 4))

    def test_of_a_loss_that_is_not_finite_names_the_batch(self):
        model, batch = TINY_MODELS["vit"](COUNT)
        batch["pixel_values"][5] = math.nan
        with pytest.raises(NumericalError, match="batch 1: the loss is nan"):
            measure(model, split_batch(batch, 4))


def evaluation_of(losses, units, correct=None):
    """An evaluation that has nothing but its batches."""
    correct = [None] * len(units) if correct is None else correct
    return Evaluation(0.0, None, 0, sum(units), tuple(map(BatchOutcome, losses, units, correct)))


class TestPairedDifferences:
    UNITS = (3, 1, 2)
    DENSE = evaluation_of([1.0, 2.0, 3.0], UNITS, [2, 1, 2])
    COMPRESSED = evaluation_of([1.3, 2.4, 2.9], UNITS, [1, 1, 2])

    def test_are_the_ratio_estimator_and_its_t_bound_by_hand(self):
        """d = 0.3, 0.4, -0.1 over 3, 1, 2 units; t with two degrees of freedom has a closed form."""
        loss, drop = paired_differences(self.DENSE, self.COMPRESSED, 0.95)
        t = 0.9 / math.sqrt(2 * 0.95 * 0.05)
        assert loss.mean == pytest.approx(0.1)
        residuals = 0.0**2 + 0.3**2 + 0.3**2
        assert loss.upper == pytest.approx(0.1 + t * math.sqrt(1.5 * residuals) / 6)
        assert drop.mean == pytest.approx(1 / 6)
        residuals = (1 - 3 / 6) ** 2 + (1 / 6) ** 2 + (2 / 6) ** 2
        assert drop.upper == pytest.approx(1 / 6 + t * math.sqrt(1.5 * residuals) / 6)

    def test_have_no_drop_without_an_accuracy(self):
        dense, compressed = (evaluation_of(losses, (1, 1)) for losses in ([1.0, 2.0], [1.5, 2.0]))
        assert paired_differences(dense, compressed, 0.9)[1] is None

    def test_of_a_model_with_itself_are_zero_with_certainty(self):
        for difference in paired_differences(self.DENSE, self.DENSE, 0.95):
            assert (difference.mean, difference.upper) == (0.0, 0.0)

    def test_of_one_batch_have_no_bound(self):
        loss, drop = paired_differences(evaluation_of([1.0], (4,), [3]), evaluation_of([2.0], (4,), [2]), 0.95)
        assert (loss.mean, loss.upper) == (0.25, math.inf)
        assert (drop.mean, drop.upper) == (0.25, math.inf)

    def test_rise_with_the_confidence(self):
        uppers = [paired_differences(self.DENSE, self.COMPRESSED, c)[0].upper for c in (0.6, 0.9, 0.99)]
        assert uppers == sorted(set(uppers))

    def test_have_bounds_that_hold_as_often_as_they_say(self):
        """Batches of several sizes whose units err together, so that a bound by units would fail."""
        random, trials, held = np.random.default_rng(0), 2000, 0
        for _ in range(trials):
            units = random.integers(1, 6, 20)
            common = random.normal(0.2, 1.0, 20)
            dense = evaluation_of([0.0] * 20, units.tolist())
            compressed = evaluation_of((common * units).tolist(), units.tolist())
            held += paired_differences(dense, compressed, 0.9)[0].upper >= 0.2
        assert held / trials == pytest.approx(0.9, abs=0.025)

    @pytest.mark.parametrize("units", [(3, 1), (3, 2, 1), (3, 1, 2, 1)])
    def test_of_other_batches_are_an_error(self, units):
        other = evaluation_of([1.0] * len(units), units)
        with pytest.raises(DataError, match="the two evaluations are not of the same batches, so they cannot be pair"):
            paired_differences(self.DENSE, other, 0.95)


DIVERGENT = {  # a model to the layer that its compressed version changes
    "bert-sequence-classification": "bert.encoder.layer.1.output.dense",
    "bert-token-classification": "bert.encoder.layer.1.output.dense",
    "bert-question-answering": "bert.encoder.layer.1.output.dense",
    "llama": "model.layers.1.mlp.down_proj",
    "vit": None,
}


def changed_layer(model, name):
    """A layer of a model by name (or else the last linear one before the head), and another in its place."""
    if name is None:
        *_, (name, _), _ = (item for item in model.named_modules() if isinstance(item[1], torch.nn.Linear))
    layer = deepcopy(model.get_submodule(name))
    with torch.no_grad():
        layer.weight.mul_(-1.5)
    return name, layer


def divergence(model, layers, batches):
    return mean_divergence(model, layers, loader_of(batches), accelerator())


class TestDivergence:
    @pytest.mark.parametrize("name", DIVERGENT)
    def test_is_the_kl_divergence_over_labelled_units_in_double_precision(self, name):
        model, batch = TINY_MODELS[name](COUNT)
        path, layer = changed_layer(model, DIVERGENT[name])
        found = [divergence(model, {path: layer}, split_batch(batch, size)) for size in (1, 4, COUNT)]
        p = pairs(name, model, batch)[0].log_softmax(-1)
        model.set_submodule(path, layer)
        q = pairs(name, model, batch)[0].log_softmax(-1)
        oracle = float((p.exp() * (p - q)).sum(-1).mean())
        assert oracle > 1e-3
        assert found == pytest.approx([oracle] * 3, rel=100 * FLOAT32)

    def test_of_identical_layers_is_nothing(self):
        model, batch = TINY_MODELS["bert-token-classification"](COUNT)
        name = DIVERGENT["bert-token-classification"]
        assert divergence(model, {name: deepcopy(model.get_submodule(name))}, split_batch(batch, 4)) == 0.0

    def test_is_none_for_a_regression(self):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        model.config.problem_type, model.config.num_labels, model.num_labels = "regression", 1, 1
        model.classifier = torch.nn.Linear(32, 1)
        batch["labels"] = batch["labels"].float()
        path, layer = changed_layer(model, DIVERGENT["bert-sequence-classification"])
        assert divergence(model, {path: layer}, split_batch(batch, 4)) is None

    @pytest.mark.parametrize("fails", [False, True])
    def test_leaves_the_model_dense_and_its_modes(self, fails):
        model, batch = TINY_MODELS["bert-sequence-classification"](COUNT)
        path, layer = changed_layer(model, DIVERGENT["bert-sequence-classification"])
        model.train()
        model.classifier.eval()
        modules = dict(model.named_modules())
        modes = {name: module.training for name, module in modules.items()}
        if fails:
            layer.weight.data[0, 0] = math.nan
            with pytest.raises(NumericalError, match="batch 0: the loss is nan"):
                divergence(model, {path: layer}, [batch])
        else:
            quiet = divergence(model, {path: layer}, [batch])
            assert quiet == divergence(model, {path: layer}, [batch])  # no dropout
        after = dict(model.named_modules())
        assert after.keys() == modules.keys()
        assert all(after[name] is module for name, module in modules.items())
        assert {name: module.training for name, module in after.items()} == modes
