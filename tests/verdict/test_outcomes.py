"""Paired outcomes of two models, against a slow double-precision oracle that takes one example at a time."""

import math
from copy import deepcopy
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.head_oracle import answered, is_right, log_softmax, loss_of
from support.processes import accelerator, in_two_processes, loader_of, needs_processes
from support.tiny_models import (
    IGNORED,
    TINY_MODELS,
    bert_masked_lm,
    bert_sequence_classification,
    bert_token_classification,
    build,
    gpt2,
    rows,
    split_batch,
)
from support.tolerances import FLOAT32
from torch import nn
from transformers import BertForSequenceClassification, BertForTokenClassification

from hf_lossless_lr import PairedOutcomes, paired_outcomes
from hf_lossless_lr.data.forward import forward_loss
from hf_lossless_lr.errors import DataError, NumericalError
from hf_lossless_lr.layers.replacement import replace_modules
from hf_lossless_lr.layers.targets import find_targets
from hf_lossless_lr.verdict import answers as answers_module
from hf_lossless_lr.verdict.answers import KeptAnswers
from hf_lossless_lr.verdict.outcomes import LOSS_TOLERANCE, TEMPERATURES, _divergence

pytestmark = pytest.mark.numerical

COUNT = 11
SIZE = 4
OTHERS = ("examples", "by_example", "explained", "example_of_unit")
ARRAYS = [field.name for field in fields(PairedOutcomes) if field.name not in OTHERS]
PER_UNIT = ("right", "confidence", "changed", "labels", "cluster_of_unit", "divergence")

# Largest deviation of a sum over some ten tokens whose losses reach ten nats, relative and in nats.
NEAR = {"rtol": 20 * FLOAT32, "atol": 20 * FLOAT32}


def changed_layers(model):
    """Layers of a model by name (the last of its targets), and others in their place."""
    kinds = ["Conv2d"] if "ResNet" in type(model).__name__ else None
    *_, (name, layer) = find_targets(model, kinds).chosen.items()
    layer = deepcopy(layer)
    with torch.no_grad():
        layer.weight.mul_(-1.5)
    return {name: layer}


def second_model(model, layers=None):
    other = deepcopy(model)
    replace_modules(other, changed_layers(model) if layers is None else deepcopy(layers))
    return other


def compare(dense, compressed, batches, **options):
    return paired_outcomes(dense, compressed, loader_of(batches), accelerator(), **options)


def pair(name, count=COUNT):
    """A tiny model, a changed copy of it, and a batch."""
    model, batch = TINY_MODELS[name](count)
    return model, second_model(model), batch


def expected(dense, compressed, batch):
    """All arrays of by-example outcomes, unit by unit."""
    columns = {name: [] for name in ARRAYS}
    answers = zip(answered(dense, batch), answered(compressed, batch), strict=True)
    for example in (list(zip(before, after, strict=True)) for before, after in answers):
        if not example:
            continue
        cluster = len(columns["units"])
        columns["units"].append(len(example))
        columns["loss"].append([sum(map(loss_of, units)) for units in zip(*example, strict=True)])
        columns["tempered"].append(
            [[sum(loss_of(u, t) for u in units) for t in TEMPERATURES] for units in zip(*example, strict=True)]
        )
        for units in example:
            logs = [[log_softmax(logits) for logits, _ in unit] for unit in units]
            columns["cluster_of_unit"].append(cluster)
            columns["labels"].append(units[0][0][1])
            columns["right"].append([is_right(unit) for unit in units])
            columns["confidence"].append([math.prod(np.exp(log.max()) for log in unit) for unit in logs])
            columns["changed"].append(any(p.argmax() != q.argmax() for p, q in zip(*logs, strict=True)))
            columns["divergence"].append(np.mean([np.exp(p) @ (p - q) for p, q in zip(*logs, strict=True)]))
    arrays = {name: np.array(column) for name, column in columns.items()}
    return {name: np.moveaxis(arrays[name], 0, -1) for name in ARRAYS}


def check_arrays(outcomes, others, exact=False):
    """Assert that outcomes have the arrays of a mapping or of others: counts and answers exactly."""
    for name in ARRAYS:
        mine = getattr(outcomes, name)
        other = others[name] if isinstance(others, dict) else getattr(others, name)
        assert (mine is None) == (other is None), name
        if mine is None:
            continue
        assert mine.shape == other.shape, name
        if exact or mine.dtype.kind != "f":
            assert np.array_equal(mine, other), name
        else:
            np.testing.assert_allclose(mine, other, **NEAR, err_msg=name)


class TestByExample:
    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_match_the_oracle(self, name):
        dense, compressed, batch = pair(name)
        outcomes = compare(dense, compressed, split_batch(batch, SIZE), temperatures=True)
        oracle = expected(dense, compressed, batch)
        check_arrays(outcomes, oracle)
        assert outcomes.by_example
        assert outcomes.examples == outcomes.clusters == COUNT
        assert oracle["divergence"].mean() > 1e-3  # else the comparison says nothing
        assert np.abs(np.diff(oracle["loss"], axis=0)).max() > 1e-2

    @pytest.mark.parametrize("size", [1, COUNT])
    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_do_not_depend_on_the_batches(self, name, size):
        dense, compressed, batch = pair(name)
        by_size = [compare(dense, compressed, split_batch(batch, s), temperatures=True) for s in (SIZE, size)]
        check_arrays(*by_size)
        assert by_size[0].examples == by_size[1].examples
        assert by_size[0].by_example is by_size[1].by_example is True

    @pytest.mark.parametrize("name", TINY_MODELS)
    def test_with_layers_are_those_with_a_second_model_bit_for_bit(self, name):
        model, batch = TINY_MODELS[name](COUNT)
        layers, batches = changed_layers(model), split_batch(batch, SIZE)
        with_model = compare(model, second_model(model, layers), batches, temperatures=True)
        check_arrays(compare(model, layers, batches, temperatures=True), with_model, exact=True)

    def test_of_a_model_with_itself_show_no_difference(self):
        model, batch = bert_token_classification(COUNT)
        for other in (model, {}):
            outcomes = compare(model, other, split_batch(batch, SIZE))
            assert not outcomes.loss_increase.any()
            assert not outcomes.accuracy_drop.any()
            assert not outcomes.changed.any()
            assert outcomes.mean_divergence == 0.0

    def test_take_no_losses_at_temperatures_unless_asked(self):
        dense, compressed, batch = pair("vit")
        assert compare(dense, compressed, [batch]).tempered is None

    def test_have_the_models_loss_at_temperature_one(self):
        dense, compressed, batch = pair("vit")
        outcomes = compare(dense, compressed, [batch], temperatures=True)
        assert TEMPERATURES[5] == 1.0
        np.testing.assert_allclose(outcomes.tempered[:, 5], outcomes.loss, **NEAR)
        for loss, model in zip(outcomes.mean_loss, (dense, compressed), strict=True):
            assert loss == pytest.approx(model(**batch).loss.item(), rel=FLOAT32)

    @pytest.mark.parametrize("name", ["bert-token-classification", "bert-question-answering", "vit"])
    def test_of_a_model_in_bfloat16_are_by_example_too(self, name):
        dense, compressed, batch = pair(name)
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
        outcomes = compare(dense.bfloat16(), compressed.bfloat16(), split_batch(batch, SIZE))
        assert outcomes.by_example

    def test_run_each_model_once_for_each_batch(self):
        dense, compressed, batch = pair("vit")
        calls = []
        for model in (dense, compressed):
            model.register_forward_hook(lambda module, *_: calls.append(module))
        compare(dense, compressed, split_batch(batch, SIZE), temperatures=True)
        assert calls == [dense, compressed] * 3


def test_temperatures_go_from_a_half_to_four_in_equal_steps_of_the_logarithm():
    assert (TEMPERATURES[1], TEMPERATURES[-2]) == (0.5, 4.0)
    assert np.diff(np.log(TEMPERATURES)) == pytest.approx(np.log(2) / 4)


def without_labels(name, examples):
    """A pair of models, and a batch in which some examples have no label."""
    dense, compressed, batch = pair(name)
    batch["labels"][list(examples)] = IGNORED
    return dense, compressed, batch


class TestExamplesWithoutLabels:
    NAMES = ("bert-sequence-classification", "bert-token-classification", "llama", "t5")
    UNLABELLED = (0, 2, 4, 5, 6, 7)  # one in each batch of four, and the whole second batch

    @pytest.mark.parametrize("size", [1, SIZE, COUNT])
    @pytest.mark.parametrize("name", NAMES)
    def test_are_left_out(self, name, size):
        dense, compressed, batch = without_labels(name, self.UNLABELLED)
        labelled = [index for index in range(COUNT) if index not in self.UNLABELLED]
        outcomes = compare(dense, compressed, split_batch(batch, size), temperatures=True)
        check_arrays(outcomes, compare(dense, compressed, [rows(batch, labelled)], temperatures=True))
        check_arrays(outcomes, expected(dense, compressed, batch))
        assert outcomes.by_example
        assert outcomes.examples == outcomes.clusters == len(labelled)

    def test_of_a_causal_model_may_have_a_first_token(self):
        """It is never predicted, so it labels nothing."""
        dense, compressed, batch = without_labels("gpt2", self.UNLABELLED)
        batch["labels"][:, 0] = 7
        assert compare(dense, compressed, split_batch(batch, SIZE)).clusters == COUNT - len(self.UNLABELLED)

    def test_alone_are_an_error(self):
        dense, compressed, batch = without_labels("llama", range(COUNT))
        with pytest.raises(DataError, match="no held-out example has a label: every label is -100"):
            compare(dense, compressed, split_batch(batch, SIZE))


class OwnLoss:
    """The loss is the smoothed cross-entropy times a factor, in the batches that are `apart`; else the plain one."""

    smoothing, factor = 0.0, 1.0
    apart = staticmethod(lambda words: True)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if self.apart(input_ids):
            logits = outputs.logits.flatten(0, -2)
            smoothed = nn.functional.cross_entropy(logits, labels.flatten(), label_smoothing=self.smoothing)
            outputs.loss = self.factor * smoothed
        return outputs


class OwnClassifier(OwnLoss, BertForSequenceClassification):
    pass


class OwnTagger(OwnLoss, BertForTokenClassification):
    pass


def with_own_loss(model, **attributes):
    own_class = OwnClassifier if isinstance(model, BertForSequenceClassification) else OwnTagger
    own = own_class(model.config)
    own.load_state_dict(model.state_dict())
    vars(own).update(attributes)
    return own.eval()


def own_loss(**attributes):
    model, batch = bert_sequence_classification(COUNT)
    return with_own_loss(model, **attributes), batch


def regression(count=COUNT):
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = build("BertForSequenceClassification", "BertConfig", num_labels=1, problem_type="regression", **options)
    batch = bert_sequence_classification(count)[1]
    return model, batch | {"labels": batch["labels"].float()}


def check_clusters_are_batches(outcomes, models, batches):
    assert not outcomes.by_example
    assert outcomes.clusters == len(batches)
    assert outcomes.units.tolist() == [len(part["labels"]) for part in batches]
    assert outcomes.examples == sum(len(part["labels"]) for part in batches)
    assert outcomes.tempered is None
    with torch.no_grad():
        losses = [[model(**part).loss.item() * len(part["labels"]) for part in batches] for model in models]
    np.testing.assert_allclose(outcomes.loss, losses, rtol=FLOAT32)


class TestByBatch:
    @pytest.mark.parametrize("own", ["both", "dense", "compressed"])
    def test_are_those_of_a_loss_that_is_not_the_cross_entropy_of_the_logits(self, own):
        model, batch = own_loss(smoothing=0.3)
        plain = bert_sequence_classification()[0]
        dense = plain if own == "compressed" else model
        compressed = second_model(plain if own == "dense" else model)
        batches = split_batch(batch, SIZE)
        outcomes = compare(dense, compressed, batches, temperatures=True)
        check_clusters_are_batches(outcomes, (dense, compressed), batches)
        oracle = expected(plain, second_model(plain), batch)
        for name in PER_UNIT:
            if name != "cluster_of_unit":
                mine = getattr(outcomes, name)
                np.testing.assert_allclose(mine, oracle[name], **NEAR, err_msg=name)
        assert outcomes.cluster_of_unit.tolist() == [0] * 4 + [1] * 4 + [2] * 3
        drop = oracle["right"][0].astype(int) - oracle["right"][1]
        assert outcomes.accuracy_drop.tolist() == drop.tolist()  # which example an answer is to is known all the same
        assert outcomes.answers.tolist() == [1] * len(drop)

    def test_are_all_of_them_if_one_batch_is(self):
        last = bert_sequence_classification(COUNT)[1]["input_ids"][-1]
        model, batch = own_loss(smoothing=0.3, apart=lambda words: bool((words == last).all(1).any()))
        batches = split_batch(batch, SIZE)
        check_clusters_are_batches(compare(model, second_model(model), batches), (model, second_model(model)), batches)
        assert compare(model, second_model(model), batches[:-1]).by_example

    def test_are_told_by_more_than_rounding(self):
        for factor, by_example in ((1 + LOSS_TOLERANCE / 2, True), (1 + 3 * LOSS_TOLERANCE, False)):
            model, batch = own_loss(factor=factor)
            assert compare(model, second_model(model), split_batch(batch, SIZE)).by_example is by_example

    def test_of_a_regression_have_no_answers(self):
        model, batch = regression()
        batches = split_batch(batch, SIZE)
        outcomes = compare(model, second_model(model), batches, temperatures=True)
        check_clusters_are_batches(outcomes, (model, second_model(model)), batches)
        assert all(getattr(outcomes, name) is None for name in PER_UNIT)
        assert outcomes.accuracy is outcomes.accuracy_drop is outcomes.mean_divergence is None

    def test_have_no_answers_if_one_batch_has_none(self):
        dense, compressed, batch = pair("bert-sequence-classification")
        batches = split_batch(batch, SIZE)
        losses = compare(dense, compressed, batches).loss
        for model in (dense, compressed):
            without_logits(model, lambda words: len(words) < SIZE)
        outcomes = compare(dense, compressed, batches, temperatures=True)
        check_clusters_are_batches(outcomes, (dense, compressed), batches)
        np.testing.assert_allclose(outcomes.loss, np.add.reduceat(losses, (0, 4, 8), axis=1), **NEAR)
        assert all(getattr(outcomes, name) is None for name in PER_UNIT)

    def test_take_in_a_span_that_was_cut_off(self):
        """Its place is behind the last word, and the model's loss leaves it out."""
        dense, compressed, batch = pair("bert-question-answering")
        whole = compare(dense, compressed, split_batch(batch, SIZE))
        batch["start_positions"][5] = batch["end_positions"][5] = batch["input_ids"].shape[1]
        outcomes = compare(dense, compressed, split_batch(batch, SIZE))
        assert not outcomes.by_example
        assert outcomes.units.tolist() == [4, 4, 3]
        assert not outcomes.right[:, 5].any()
        kept = [index for index in range(COUNT) if index != 5]
        assert np.array_equal(outcomes.right[:, kept], whole.right[:, kept])
        for losses, model in zip(outcomes.loss, (dense, compressed), strict=True):
            own = [
                model(**part).loss.item() * size
                for part, size in zip(split_batch(batch, SIZE), (4, 4, 3), strict=True)
            ]
            np.testing.assert_allclose(losses, own, **NEAR)

    def test_leave_out_a_batch_without_a_label(self):
        dense, compressed, batch = without_labels("bert-token-classification", range(4, 8))
        batches = split_batch(batch, SIZE)
        outcomes = compare(*(with_own_loss(model, smoothing=0.5) for model in (dense, compressed)), batches)
        assert not outcomes.by_example
        assert outcomes.units.tolist() == [int((batches[index]["labels"] != IGNORED).sum()) for index in (0, 2)]
        assert outcomes.cluster_of_unit.tolist() == np.repeat([0, 1], outcomes.units).tolist()
        assert outcomes.examples == COUNT - 4


class TestSums:
    """By hand: three clusters of 2, 1 and 2 units."""

    OUTCOMES = PairedOutcomes(
        loss=np.array([[1.0, 2.0, 3.0], [1.5, 1.0, 4.0]]),
        units=np.array([2, 1, 2]),
        examples=3,
        by_example=True,
        right=np.array([[1, 1, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=bool),
        cluster_of_unit=np.array([0, 0, 1, 2, 2]),
        divergence=np.array([0.1, 0.2, 0.3, 0.4, 0.5]),
    )

    def test_are_right(self):
        assert self.OUTCOMES.clusters == 3
        assert self.OUTCOMES.mean_loss == pytest.approx((6 / 5, 6.5 / 5))
        assert self.OUTCOMES.accuracy == pytest.approx((3 / 5, 1 / 5))
        assert self.OUTCOMES.loss_increase.tolist() == [0.5, -1.0, 1.0]
        assert self.OUTCOMES.accuracy_drop.tolist() == [2.0, -1.0, 1.0]
        assert self.OUTCOMES.mean_divergence == pytest.approx(0.3)

    def test_are_none_where_the_head_does_not_classify(self):
        plain = PairedOutcomes(self.OUTCOMES.loss, self.OUTCOMES.units, 3, by_example=False)
        assert plain.accuracy is plain.accuracy_drop is plain.mean_divergence is None
        assert plain.mean_loss == self.OUTCOMES.mean_loss


def test_the_divergence_of_classes_that_are_ruled_out_is_finite():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[0.4, 0.6, 0.0]], dtype=torch.float64).log()
    expected = 0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.5 / 0.6)
    assert _divergence(p, q).tolist() == pytest.approx([expected], rel=1e-6)


class TestTheModels:
    @pytest.fixture
    def pair(self):
        """Two models in mixed modes with dropout, and what they are now."""
        dense, compressed, batch = pair("bert-sequence-classification")
        quiet = compare(dense, compressed, split_batch(batch, SIZE))
        dense.train()
        dense.classifier.eval()
        compressed.train()
        compressed.bert.encoder.layer[0].eval()
        return dense, compressed, batch, quiet

    @staticmethod
    def state(*models):
        return [
            [(name, module, module.training) for name, module in model.named_modules(remove_duplicate=False)]
            for model in models
        ]

    @pytest.mark.parametrize("as_layers", [True, False])
    def test_are_left_as_they_were_and_used_without_dropout(self, pair, as_layers):
        dense, compressed, batch, quiet = pair
        before = self.state(dense, compressed)
        other = changed_layers(dense) if as_layers else compressed
        check_arrays(compare(dense, other, split_batch(batch, SIZE)), quiet, exact=True)
        assert self.state(dense, compressed) == before

    @pytest.mark.parametrize("as_layers", [True, False])
    def test_are_left_as_they_were_after_an_error(self, pair, as_layers):
        dense, compressed, batch, _ = pair
        before = self.state(dense, compressed)
        layers = changed_layers(dense)
        broken = next(iter(layers.values())) if as_layers else compressed.classifier
        broken.weight.data[:] = math.nan
        with pytest.raises(NumericalError, match="batch 0: the loss is nan"):
            compare(dense, layers if as_layers else compressed, split_batch(batch, SIZE))
        assert self.state(dense, compressed) == before

    def test_build_no_graph(self, pair):
        dense, compressed, batch, _ = pair
        seen = []
        for model in (dense, compressed):
            model.classifier.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
        compare(dense, compressed, [batch])
        assert seen == [False, False]


def without_logits(model, at=lambda words: True):
    """Let a model return its loss alone, in some batches."""
    plain = model.forward

    def forward(input_ids=None, **inputs):
        outputs = plain(input_ids=input_ids, **inputs)
        return SimpleNamespace(loss=outputs.loss) if at(input_ids) else outputs

    model.forward = forward
    return model


def token_tagger(classes):
    return build("BertForTokenClassification", "BertConfig", num_labels=classes)


# dense model, compressed model, and the data of the dense one
APART = {
    "another number of labelled units": lambda: (*gpt2(COUNT), bert_masked_lm()[0]),
    "another number of classes": lambda: (
        *bert_sequence_classification(COUNT),
        build("BertForSequenceClassification", "BertConfig", num_labels=4),
    ),
    "no classes": lambda: (*bert_sequence_classification(COUNT), single_output()),
    "other classes of tokens": lambda: (*bert_token_classification(COUNT), token_tagger(6)),
}


def single_output():
    """A head that answers a number, with a loss of its own."""
    model = build("BertForSequenceClassification", "BertConfig", num_labels=1, problem_type="regression")
    plain = model.forward

    def forward(labels=None, **inputs):
        outputs = plain(**inputs)
        outputs.loss = (outputs.logits[:, 0] - labels).square().mean()
        return outputs

    model.forward = forward
    return model


class TestRefusal:
    @pytest.mark.parametrize("case", APART)
    def test_of_models_that_answer_other_questions_names_the_batch(self, case):
        dense, batch, compressed = APART[case]()
        for models in ((dense, compressed), (compressed, dense)):
            with pytest.raises(
                DataError,
                match=r"batch 0: the two models do not answer the same questions, so they cannot be compared\.",
            ):
                compare(*models, split_batch(batch, SIZE))

    def test_of_data_without_labels(self):
        dense, compressed, batch = pair("vit")
        del batch["labels"]
        with pytest.raises(DataError, match="the data has no labels: ViTForImageClassification takes labels"):
            compare(dense, compressed, [batch])

    def test_of_a_loss_that_is_not_finite_names_the_batch(self):
        dense, compressed, batch = pair("vit")
        batch["pixel_values"][5] = math.nan
        with pytest.raises(NumericalError, match="batch 1: the loss is nan"):
            compare(dense, compressed, split_batch(batch, SIZE))


# --- several processes ----------------------------------------------------------------------------------------------

# tiny model (or a function that builds one), examples, batch size; two processes get the batches in turn
LAUNCHED = {
    "uneven examples": ("bert-token-classification", 11, 2),  # three batches each, the last of one example
    "uneven batches": ("llama", 10, 4),
    "an idle process": ("t5", 5, 16),
    "questions": ("bert-question-answering", 7, 1),
    "by batch": (regression, 11, 2),
    "unlabelled": ("llama", 11, 2),
}


def compare_case(case):
    model, count, size = LAUNCHED[case]
    model, batch = TINY_MODELS[model](count) if isinstance(model, str) else model(count)
    if case == "unlabelled":  # the whole second batch, which is the first of the second process
        batch["labels"][1:4] = IGNORED
    return compare(model, changed_layers(model), split_batch(batch, size), temperatures=True)


def compare_cases(folder, process):
    """What each launched process runs: all cases, saved under the number of the process."""
    for case in LAUNCHED:
        outcomes = compare_case(case)
        arrays = {name: getattr(outcomes, name) for name in ARRAYS if getattr(outcomes, name) is not None}
        np.savez(folder / f"{case}-{process}.npz", facts=[outcomes.examples, outcomes.by_example], **arrays)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(compare_cases, folder)

    def load(case, process):
        with np.load(folder / f"{case}-{process}.npz") as file:
            return dict(file)

    return {case: [load(case, process) for process in (0, 1)] for case in LAUNCHED}


@needs_processes
class TestTwoProcesses:
    @pytest.mark.parametrize("case", LAUNCHED)
    def test_give_what_one_process_gives_in_the_same_order(self, case, launched):
        outcomes = compare_case(case)
        for arrays in launched[case]:
            assert arrays["facts"].tolist() == [outcomes.examples, outcomes.by_example]
            check_arrays(outcomes, dict.fromkeys(ARRAYS) | arrays)

    @pytest.mark.parametrize("case", LAUNCHED)
    def test_have_the_same_result_to_the_last_bit(self, case, launched):
        mine, others = launched[case]
        assert mine.keys() == others.keys()
        assert all(np.array_equal(mine[name], others[name]) for name in mine)


class TestKeptAnswers:
    @pytest.fixture
    def case(self):
        model, batch = TINY_MODELS["bert-token-classification"](8)
        return model, split_batch(batch, 2), changed_layers(model)

    def outcomes(self, case, kept):
        model, batches, layers = case
        return paired_outcomes(model, layers, loader_of(batches), accelerator(), dense_answers=kept)

    @pytest.mark.parametrize(("room", "again"), [(1.0, 0), (0.5, 2), (0.0, 4)])
    def test_are_given_once_as_far_as_they_fit(self, case, room, again, monkeypatch):
        model, batches, _ = case
        with torch.no_grad():
            asked = [forward_loss(model, batch, 0).questions for batch in batches]
        sizes = [sum(t.numel() * t.itemsize for question in one for t in question) for one in asked]
        kept = KeptAnswers(int(sum(sizes[: int(room * len(batches))])))
        first, calls = self.outcomes(case, kept), []
        monkeypatch.setattr(
            answers_module, "forward_loss", lambda *arguments: calls.append(1) or forward_loss(*arguments)
        )
        second = self.outcomes(case, kept)
        assert len(calls) == again + len(batches)
        for name in ("loss", "right", "confidence", "changed", "divergence"):
            assert np.array_equal(getattr(first, name), getattr(second, name)), name
