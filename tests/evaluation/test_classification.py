"""GLUE, SWAG and picture classification: agreement with scikit-learn and scipy, labels by name, and the examples."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, top_k_accuracy_score
from support.score_checks import check_right_answers
from support.tiny_models import VOCABULARY, bert_multiple_choice, build
from support.word_tokenizer import CLS, PAD, SEP, word_tokenizer
from torch import nn
from transformers import ViTImageProcessorPil
from transformers.utils import logging

from hf_lossless_lr import verify
from hf_lossless_lr.errors import DataError, NumericalError
from hf_lossless_lr.evaluation.classification import align_labels, warn_of_other_order
from hf_lossless_lr.evaluation.glue import F1, GLUE, GLUE_LABELS, MATTHEWS, PEARSON
from hf_lossless_lr.evaluation.hf_metrics import load_metric
from hf_lossless_lr.evaluation.imagenet import IMAGE_CLASSIFICATION
from hf_lossless_lr.evaluation.scores import Scores, compare
from hf_lossless_lr.evaluation.swag import SWAG
from hf_lossless_lr.evaluation.task import ScoringOptions

OPTIONS = ScoringOptions(batch_size=8, max_length=32)
COUNT = 40
COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "stsb": ["sentence1", "sentence2"],
    "mnli": ["premise", "hypothesis"],
    "mnli_mismatched": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
METRICS = {"cola": ["Matthews correlation"], "mrpc": ["F1", "accuracy"], "qqp": ["F1", "accuracy"]}
METRICS |= {"stsb": ["Pearson correlation"]}
CLASSIFIED = [name for name in COLUMNS if name != "stsb"]
BERT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.2}
MNLI = ("entailment", "neutral", "contradiction")


@pytest.fixture
def warned(monkeypatch):
    """Collect the warnings of the shared scoring."""
    messages = []
    logger = logging.get_logger("hf_lossless_lr.evaluation.classification")
    monkeypatch.setattr(logger, "warning", lambda text, *parts: messages.append(text % parts))
    return messages


def sentences(count, seed):
    generator = np.random.default_rng(seed)
    return [
        " ".join(f"w{n}" for n in generator.integers(5, VOCABULARY, generator.integers(2, 9))) for _ in range(count)
    ]


def glue_data(name, count=COUNT, seed=0, classes=None, named=True):
    """Random sentences in the schema of a GLUE task."""
    generator = np.random.default_rng(seed)
    columns = {column: sentences(count, seed + 10 + i) for i, column in enumerate(COLUMNS[name])}
    names = GLUE_LABELS[name]
    if not names:
        return Dataset.from_dict({**columns, "label": generator.uniform(0, 5, count).tolist()})
    labels = generator.integers(0, classes or len(names), count)
    labels[: classes or len(names)] = np.arange(classes or len(names))
    features = Features({column: Value("string") for column in columns})
    features["label"] = ClassLabel(names=list(names)) if named else Value("int64")
    return Dataset.from_dict({**columns, "label": labels.tolist()}, features=features)


def classifier(classes, names=None, seed=0):
    model = build("BertForSequenceClassification", "BertConfig", seed=seed, num_labels=classes, **BERT)
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    return decided(model)


@torch.no_grad()
def decided(model):
    """Scale a head, so that answers differ between examples and no logit is near another."""
    model.classifier.weight.mul_(20)
    inputs = word_tokenizer()(sentences(30, 99), padding=True, return_tensors="pt")
    if "MultipleChoice" not in type(model).__name__:
        model.classifier.bias.sub_(model(**inputs).logits.mean(0))
    return model


@torch.no_grad()
def logits_one_by_one(model, texts):
    """The logits of each example without padding, by the tokenizer alone."""
    tokenizer = word_tokenizer()
    return np.concatenate([model(**tokenizer(*parts, return_tensors="pt")).logits.numpy() for parts in texts])


def glue_logits(model, name, data):
    return logits_one_by_one(model, zip(*(data[column] for column in COLUMNS[name]), strict=True))


def values(scores):
    return {name: value for name, (value, _) in scores.values().items()}


class TestFormulas:
    """Against the libraries, on random answers."""

    @pytest.mark.parametrize("seed", range(5))
    def test_f1_and_matthews_are_those_of_scikit_learn(self, seed):
        generator = np.random.default_rng(seed)
        truth, found = generator.random((2, 50)) < [[0.3], [0.6]]
        table = [truth & found, ~truth & found, truth & ~found, ~truth & ~found]
        counts = np.stack([np.ones(50), truth == found, *table], 1).astype(float)
        got = values(Scores(counts, (F1, MATTHEWS)))
        assert got["F1"] == pytest.approx(f1_score(truth, found), abs=1e-6)
        assert got["Matthews correlation"] == pytest.approx(matthews_corrcoef(truth, found), abs=1e-6)

    def test_f1_and_matthews_by_hand(self):
        sums = np.array([10.0, 7, 4, 2, 1, 3])  # TP 4, FP 2, FN 1, TN 3
        assert F1.of_sums(sums) == 8 / 11
        assert MATTHEWS.of_sums(sums) == pytest.approx((4 * 3 - 2 * 1) / np.sqrt(6 * 5 * 5 * 4), rel=1e-12)

    def test_f1_and_matthews_are_0_where_undefined(self):
        sums = np.array([[5.0, 5, 0, 0, 0, 5], [5, 0, 0, 0, 5, 0]])
        assert F1.of_sums(sums).tolist() == [0, 0]
        assert MATTHEWS.of_sums(sums).tolist() == [0, 0]

    @pytest.mark.parametrize("seed", range(5))
    def test_pearson_is_that_of_scipy(self, seed):
        generator = np.random.default_rng(seed)
        x = generator.uniform(0, 3, 80)
        y = x * generator.uniform(-1, 1) + generator.uniform(0, 1, 80) + 1
        counts = np.stack([np.ones(80), x, y, x * x, y * y, x * y], 1)
        got = values(Scores(counts, (PEARSON,)))["Pearson correlation"]
        assert got == pytest.approx(pearsonr(x, y).statistic, abs=1e-9)

    def test_pearson_of_a_constant_is_0(self):
        x, y = np.full(7, 0.1), np.arange(7)
        for a, b in ((x, y), (y, x), (x, x), (0 * x, y)):
            assert PEARSON.of_sums(np.array([7, a.sum(), b.sum(), a @ a, b @ b, a @ b])) == 0


class TestGlue:
    def test_has_the_ten_names_their_splits_and_metrics(self):
        assert list(GLUE) == list(COLUMNS)
        for name, task in GLUE.items():
            split = {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"}.get(name, "validation")
            assert task.dataset == ("nyu-mll/glue", name.removesuffix("_mismatched"), "train", split)
            assert task.auto_model == "AutoModelForSequenceClassification"

    @pytest.mark.parametrize("name", CLASSIFIED)
    def test_figures_are_those_of_scikit_learn_on_unpadded_examples(self, name):
        model, data = classifier(len(GLUE_LABELS[name])), glue_data(name)
        got = values(GLUE[name].score(model, data, word_tokenizer(), OPTIONS))
        assert list(got) == METRICS.get(name, ["accuracy"])
        found, truth = glue_logits(model, name, data).argmax(1), data["label"][:]
        assert len(set(found.tolist())) > 1
        expected = {"accuracy": accuracy_score(truth, found)}
        if name in METRICS:
            expected |= {"F1": f1_score(truth, found), "Matthews correlation": matthews_corrcoef(truth, found)}
        for metric, value in got.items():
            assert value == pytest.approx(expected[metric], abs=1e-6)

    def test_figures_of_similarity_are_those_of_scipy(self):
        model, data = classifier(1), glue_data("stsb")
        scores = GLUE["stsb"].score(model, data, word_tokenizer(), OPTIONS)
        expected = pearsonr(glue_logits(model, "stsb", data)[:, 0], data["label"][:]).statistic
        assert values(scores) == {"Pearson correlation": pytest.approx(expected, abs=1e-6)}
        assert (scores.counts >= 0).all()

    @pytest.mark.parametrize("name", ["mnli", "mrpc", "stsb"])
    def test_figures_are_those_of_the_metric_of_the_same_answers(self, name, tmp_path):
        model, data = classifier(len(GLUE_LABELS[name]) or 1), glue_data(name)
        logits = glue_logits(model, name, data)
        answers = logits.argmax(1) if GLUE_LABELS[name] else logits[:, 0]
        got = load_metric("glue", name, cache_dir=tmp_path).compute(predictions=answers, references=data["label"][:])
        for key, figures in GLUE[name].score(model, data, word_tokenizer(), OPTIONS).values().items():
            assert (got[key], got[f"{key}_standard_error"]) == pytest.approx(figures, abs=1e-6)

    @pytest.mark.parametrize("name", ["mrpc", "stsb"])
    def test_models_can_be_compared(self, name):
        data = glue_data(name)
        one, other = (
            GLUE[name].score(classifier(len(GLUE_LABELS[name]) or 1, seed=seed), data, word_tokenizer(), OPTIONS)
            for seed in (0, 1)
        )
        for metric, difference in compare(one, other, 0.9).items():
            assert difference.mean == pytest.approx(values(one)[metric] - values(other)[metric], abs=1e-9)
            assert difference.lower < difference.mean < difference.upper

    def test_there_is_a_row_of_counts_for_each_example_in_its_order_whatever_the_batch_size(self):
        model, data = classifier(2), glue_data("mrpc")
        whole = GLUE["mrpc"].score(model, data, word_tokenizer(), OPTIONS).counts
        assert whole.shape == (COUNT, 6)
        assert np.array_equal(whole[:, 0], np.ones(COUNT))
        assert np.array_equal(whole[:, 2:].sum(1), np.ones(COUNT))
        other = GLUE["mrpc"].score(model, data, word_tokenizer(), OPTIONS._replace(batch_size=7)).counts
        assert np.array_equal(other, whole)
        order = np.random.default_rng(0).permutation(COUNT)
        moved = GLUE["mrpc"].score(model, data.select(order), word_tokenizer(), OPTIONS).counts
        assert np.array_equal(moved, whole[order])

    def test_accuracy_has_the_textbook_error(self):
        scores = GLUE["sst2"].score(classifier(2), glue_data("sst2"), word_tokenizer(), OPTIONS)
        assert scores.counts.shape == (COUNT, 2)
        check_right_answers(scores, "accuracy")
        p, error = scores.values()["accuracy"]
        assert 0 < p < 1
        assert error == pytest.approx(np.sqrt(p * (1 - p) / (COUNT - 1)), rel=1e-9)

    def test_the_pair_is_in_the_order_of_the_columns_and_cut_to_length(self):
        row = {"hypothesis": "w9", "idx": 3, "label": 2, "premise": "w5 w6"}
        task, data = GLUE["mnli"], Dataset.from_list([row])
        examples = task.prepare(data, word_tokenizer(), 32)
        assert examples["input_ids"][:] == [[CLS, 5, 6, SEP, 9, SEP]]
        assert examples["labels"][:] == [2]
        assert task.prepare(data, word_tokenizer(), 5)["input_ids"][:] == [[CLS, 5, SEP, 9, SEP]]
        assert task.collator(word_tokenizer())(list(examples))["labels"].tolist() == [2]

    def test_similarities_are_prepared_as_floating_point_numbers_even_if_they_are_whole(self):
        data = Dataset.from_dict({"sentence1": ["w5"], "sentence2": ["w6"], "label": [4]})
        examples = GLUE["stsb"].prepare(data, word_tokenizer(), 8)
        assert GLUE["stsb"].collator(word_tokenizer())(list(examples))["labels"].tolist() == [4.0]
        assert isinstance(examples[0]["labels"], float)

    def test_the_model_is_left_as_it_was(self):
        model = classifier(2).train()
        before = model.config.to_dict()
        GLUE["sst2"].score(model, glue_data("sst2"), word_tokenizer(), OPTIONS)
        assert all(module.training for module in model.modules())
        assert model.config.to_dict() == before

    def test_is_scored_without_dropout(self):
        model, data = classifier(2), glue_data("sst2")
        counts = GLUE["sst2"].score(model, data, word_tokenizer(), OPTIONS).counts
        assert np.array_equal(GLUE["sst2"].score(model.train(), data, word_tokenizer(), OPTIONS).counts, counts)

    def test_the_certificate_states_the_same_accuracy(self):
        models = [classifier(3, MNLI[::-1], seed=seed) for seed in (0, 1)]
        task, tokenizer, data = GLUE["mnli"], word_tokenizer(), glue_data("mnli", 120)
        aligned = align_labels(data, models[0])
        examples = task.prepare(aligned, tokenizer, 32)
        certificate = verify(*models, examples, batch_size=8, data_collator=task.collator(tokenizer))
        expected = [values(task.score(model, data, tokenizer, OPTIONS))["accuracy"] for model in models]
        assert certificate.accuracy == pytest.approx(expected, abs=1e-9)


class TestLabels:
    """Names of the model's labels against those of the data set."""

    def accuracy(self, names, data, head=None):
        model = classifier(3, names)
        if head is not None:  # move the outputs with the names
            for tensor in model.classifier.parameters():
                tensor.data = tensor.data[list(head)]
        return GLUE["mnli"].score(model, data, word_tokenizer(), OPTIONS).counts

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
    def test_of_a_model_in_another_order_are_matched_whatever_their_case(self, order, named):
        data = glue_data("mnli", named=named)
        expected = self.accuracy(MNLI, data)
        names = [MNLI[index].upper() for index in order]
        assert np.array_equal(self.accuracy(names, data, order), expected)
        assert not np.array_equal(self.accuracy(names, data), expected)

    def test_are_matched_once(self):
        data, model = glue_data("mnli", named=False), classifier(3, ("CONTRADICTION", "ENTAILMENT", "NEUTRAL"))
        aligned = align_labels(data, model, names=MNLI)
        assert aligned["label"][:] == [(1, 2, 0)[label] for label in data["label"]]
        assert aligned.features["label"].names == ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"]
        assert align_labels(aligned, model, names=MNLI) is aligned
        counts = [GLUE["mnli"].score(model, part, word_tokenizer(), OPTIONS).counts for part in (data, aligned)]
        assert np.array_equal(*counts)

    def test_that_are_in_order_leave_the_data_set_as_it_is(self):
        data = glue_data("mnli")
        for names in (MNLI, [name.title() for name in MNLI], None):
            assert align_labels(data, classifier(3, names)) is data

    def test_keep_the_rows_of_a_selection(self):
        data = glue_data("mnli").select([7, 3, 30])
        aligned = align_labels(data, classifier(3, MNLI[::-1]))
        assert aligned["premise"][:] == data["premise"][:]
        assert aligned["label"][:] == [2 - label for label in data["label"]]

    @pytest.mark.parametrize("name", ["mrpc", "qqp"])
    @pytest.mark.parametrize("align_first", [True, False])
    def test_in_another_order_leave_the_positive_class_of_f1(self, name, align_first):
        data, names = glue_data(name), GLUE_LABELS[name][::-1]
        model = classifier(2, names)
        found = 1 - glue_logits(model, name, data).argmax(1)
        given = align_labels(data, model) if align_first else data
        got = values(GLUE[name].score(model, given, word_tokenizer(), OPTIONS))
        assert got["F1"] == pytest.approx(f1_score(data["label"][:], found), abs=1e-6)
        assert got["accuracy"] == pytest.approx(accuracy_score(data["label"][:], found), abs=1e-6)

    def test_that_are_some_of_the_models_are_matched(self):
        data = glue_data("sst2")  # negative, positive
        aligned = align_labels(data, classifier(3, ("Positive", "neutral", "Negative")))
        assert aligned["label"][:] == [(2, 0)[label] for label in data["label"]]

    def test_of_two_classes_do_not_fit_a_model_of_three(self):
        model = classifier(3, ("CONTRADICTION", "ENTAILMENT", "NEUTRAL"))
        text = r"has 2 labels \(0, 1\) and the model 3 labels \(CONTRADICTION, ENTAILMENT, NEUTRAL\)"
        with pytest.raises(DataError, match=text):
            GLUE["mnli"].score(model, glue_data("mnli", classes=2, named=False), word_tokenizer(), OPTIONS)
        text = r"has 2 labels \(entailment, not_entailment\) and the model 3 labels .*, and they cannot be matched by"
        with pytest.raises(DataError, match=text):
            GLUE["rte"].score(model, glue_data("rte"), word_tokenizer(), OPTIONS)
        with pytest.raises(DataError, match=r"has 3 labels \(ent.*\) and the model 2 labels \(LABEL_0, LABEL_1\)"):
            GLUE["mnli"].score(classifier(2), glue_data("mnli"), word_tokenizer(), OPTIONS)
        with pytest.raises(DataError, match=r"and the model 1 label \(LABEL_0\)"):
            GLUE["mnli"].score(classifier(1), glue_data("mnli"), word_tokenizer(), OPTIONS)

    def test_of_two_classes_in_the_schema_of_three_fit_a_model_of_two(self):
        data = glue_data("mnli", classes=2, named=False)
        model = classifier(2)
        got = values(GLUE["mnli"].score(model, data, word_tokenizer(), OPTIONS))
        assert got["accuracy"] == accuracy_score(data["label"][:], glue_logits(model, "mnli", data).argmax(1))

    def test_with_some_names_in_common_in_other_places_are_refused(self):
        model = classifier(3, ("neutral", "entailment", "other"))
        with pytest.raises(DataError, match=r"they cannot be matched by name\. Give a model of this task, or set mod"):
            align_labels(glue_data("mnli"), model)

    def test_with_some_names_in_common_in_the_same_places_are_taken_in_order(self, warned):
        data = glue_data("mnli")
        assert align_labels(data, classifier(3, ("entailment", "unclear", "contradiction"))) is data
        assert not warned

    def test_without_a_common_name_are_taken_in_order_with_a_warning(self, warned):
        data = glue_data("mnli")
        assert align_labels(data, classifier(3, ("yes", "perhaps", "no"))) is data
        assert len(warned) == 1
        assert "3 labels (yes, perhaps, no): they have no name in common" in warned[0]

    def test_with_a_name_twice_are_taken_in_order(self):
        names = ["crane", "crane2", "bird"]
        data = Dataset.from_dict({"label": [0, 1, 2]}).cast_column("label", ClassLabel(names=names))
        assert align_labels(data, classifier(3, ("crane", "crane", "bird"))) is data
        some = Dataset.from_dict({"label": [0, 1]}).cast_column("label", ClassLabel(names=["bird", "crane"]))
        with pytest.raises(DataError, match="they cannot be matched by name"):
            align_labels(some, classifier(3, ("bird", "crane", "crane")))

    @pytest.mark.parametrize("count", [120, 99])
    def test_of_a_nameless_model_in_another_order_are_reported(self, warned, count):
        confusion = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]) * count // 3
        warn_of_other_order(classifier(3), confusion)
        assert len(warned) == (count > 100)
        if warned:
            text = "is 0.000, but it would be 1.000 if the labels 0, 1, ... of the data were the model's 1, 2, 0."
            assert text in warned[0]

    def test_that_are_right_are_not_reported(self, warned):
        warn_of_other_order(classifier(3), np.eye(3) * 50 + 10)
        warn_of_other_order(classifier(3, MNLI), np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]) * 50)
        assert not warned

    def test_of_a_nameless_model_are_reported_when_it_is_scored(self, warned):
        model, data = classifier(3), glue_data("mnli", 120)
        answers = glue_logits(model, "mnli", data).argmax(1)
        moved = data.remove_columns("label").add_column("label", (answers + 1) % 3)
        GLUE["mnli"].score(model, moved, word_tokenizer(), OPTIONS)
        assert "the accuracy is 0.000, but it would be 1.000" in warned[0]


def spoiled(name, **columns):
    data = glue_data(name, named=False)
    for column, row in columns.items():
        data = data.remove_columns(column)
        if row is not None:
            data = data.add_column(column, row)
    return data


BAD = {  # task, data set, part of the error
    "no text": ("mnli", lambda: spoiled("mnli", hypothesis=None), "no column 'hypothesis'; it has premise, label"),
    "no label": ("sst2", lambda: spoiled("sst2", label=None), "no column 'label'; it has sentence"),
    "hidden labels": ("sst2", lambda: spoiled("sst2", label=[0] * 39 + [-1]), "example 39 is -1: the labels of this"),
    "hidden similarities": ("stsb", lambda: spoiled("stsb", label=[1.0] * 39 + [-1.0]), "example 39 is -1.0: the lab"),
    "no number": (
        "stsb",
        lambda: spoiled("stsb", label=[1.0] * 39 + [float("nan")]),
        "example 39 is nan; a similarity",
    ),
    "a name": (
        "sst2",
        lambda: spoiled("sst2", label=["yes"] * 40),
        "example 0 is 'yes'; labels must be whole numbers",
    ),
    "a fraction": (
        "sst2",
        lambda: spoiled("sst2", label=[0.5] * 40),
        "example 0 is 0.5; labels must be whole numbers",
    ),
    "a gap": ("sst2", lambda: spoiled("sst2", label=[0] * 39 + [None]), "example 39 is None; labels must be whole nu"),
    "nothing": ("sst2", lambda: glue_data("sst2").select([]), "the data set is empty"),
    "no similarity": ("stsb", lambda: spoiled("stsb", label=[1.0] * 40).select([]), "the data set is empty"),
}


class TestRefusal:
    @pytest.mark.parametrize("case", BAD)
    def test_of_bad_data(self, case):
        name, make, message = BAD[case]
        model = classifier(len(GLUE_LABELS[name]) or 1)
        with pytest.raises(DataError, match=message):
            GLUE[name].score(model, make(), word_tokenizer(), OPTIONS)
        with pytest.raises(DataError, match=message):
            GLUE[name].prepare(make(), word_tokenizer(), 32)

    def test_of_a_classifier_for_similarities(self):
        with pytest.raises(DataError, match=r"one output \(num_labels=1\), but it has 3"):
            GLUE["stsb"].score(classifier(3), glue_data("stsb"), word_tokenizer(), OPTIONS)

    def test_of_too_few_examples(self):
        with pytest.raises(DataError, match="the data set: has 7 examples; at least 8"):
            GLUE["sst2"].score(classifier(2), glue_data("sst2", 7), word_tokenizer(), OPTIONS)

    def test_of_a_model_with_another_head(self):
        model = build("BertForTokenClassification", "BertConfig", num_labels=2, **BERT)
        with pytest.raises(
            DataError, match="BertForTokenClassification does not give one row of logits for each exam"
        ):
            GLUE["sst2"].score(model, glue_data("sst2"), word_tokenizer(), OPTIONS)

    def test_of_logits_that_are_not_finite(self):
        model = classifier(2)
        model.classifier.bias.data[1] = float("nan")
        with pytest.raises(NumericalError, match="batch 0: a logit is not finite"):
            GLUE["sst2"].score(model, glue_data("sst2"), word_tokenizer(), OPTIONS)


def swag_data(count=COUNT, seed=0):
    generator = np.random.default_rng(seed)
    columns = ["sent1", "sent2", *(f"ending{i}" for i in range(4))]
    data = {column: sentences(count, seed + i) for i, column in enumerate(columns)}
    return Dataset.from_dict({**data, "label": generator.integers(0, 4, count).tolist()})


class TestSwag:
    def test_pairs_the_context_with_each_ending(self):
        row = {"sent1": "w5 w6", "sent2": "w7", "ending0": "w10", "ending1": "w11", "ending2": "w12 w13"}
        row |= {"ending3": "w14", "label": 2, "video-id": "a"}
        examples = SWAG.prepare(Dataset.from_list([row]), word_tokenizer(), 32)
        start = [CLS, 5, 6, SEP, 7]
        ends = [[10], [11], [12, 13], [14]]
        assert examples["input_ids"][0] == [[*start, *end, SEP] for end in ends]
        assert examples["attention_mask"][0] == [[1] * (6 + len(end)) for end in ends]
        assert set(examples.column_names) == {"input_ids", "attention_mask", "labels"}
        assert examples["labels"][:] == [2]
        batch = SWAG.collator(word_tokenizer())(list(examples))
        assert batch["input_ids"].shape == (1, 4, 8)
        assert batch["input_ids"][0, 0].tolist() == [*start, 10, SEP, PAD]
        assert batch["labels"].tolist() == [2]

    def test_cuts_to_length(self):
        examples = SWAG.prepare(swag_data(), word_tokenizer(), 9)
        assert max(len(choice) for example in examples["input_ids"] for choice in example) == 9

    def test_accuracy_is_that_of_scikit_learn_on_unpadded_choices(self):
        model, data = decided(bert_multiple_choice()[0]), swag_data()
        logits = []
        for row in data:
            texts = [(row["sent1"], f"{row['sent2']} {row[f'ending{i}']}") for i in range(4)]
            with torch.no_grad():
                encoded = [word_tokenizer()(*pair, return_tensors="pt") for pair in texts]
                single = [model(**{k: v[None] for k, v in each.items()}).logits.item() for each in encoded]
            logits.append(single)
        scores = SWAG.score(model, data, word_tokenizer(), OPTIONS)
        expected = accuracy_score(data["label"][:], np.argmax(logits, 1))
        assert values(scores) == {"accuracy": pytest.approx(expected, abs=1e-6)}
        again = SWAG.score(model, data, word_tokenizer(), OPTIONS._replace(batch_size=11))
        assert np.array_equal(again.counts, scores.counts)

    def test_the_certificate_states_the_same_accuracy(self):
        models = [decided(bert_multiple_choice(seed=seed)[0]) for seed in (0, 1)]
        tokenizer, data = word_tokenizer(), swag_data(100)
        examples = SWAG.prepare(data, tokenizer, 32)
        certificate = verify(*models, examples, batch_size=8, data_collator=SWAG.collator(tokenizer))
        expected = [values(SWAG.score(model, data, tokenizer, OPTIONS))["accuracy"] for model in models]
        assert certificate.accuracy == pytest.approx(expected, abs=1e-9)

    def test_refuses_bad_data(self):
        model, tokenizer = bert_multiple_choice()[0], word_tokenizer()
        for column in ("sent1", "sent2", "ending3", "label"):
            with pytest.raises(DataError, match=f"the data set has no column '{column}'; it has"):
                SWAG.score(model, swag_data().remove_columns(column), tokenizer, OPTIONS)
        for label, message in (
            (-1, "example 39 is -1: the labels of this split are hidden"),
            (4, "has the label 4, bu"),
        ):
            data = swag_data().remove_columns("label").add_column("label", [0] * 39 + [label])
            with pytest.raises(DataError, match=message):
                SWAG.prepare(data, tokenizer, 32)


def processor():
    return ViTImageProcessorPil(size={"height": 12, "width": 12})


def pictures(classes=7, names=None, count=COUNT, seed=0):
    generator = np.random.default_rng(seed)
    arrays = [generator.integers(0, 256, (9, 9, 3)[: 2 + i % 2], dtype=np.uint8) for i in range(count)]
    label = ClassLabel(names=names) if names else Value("int64")
    labels = generator.integers(0, classes, count).tolist()
    return Dataset.from_dict({"image": arrays, "label": labels}, features=Features({"image": Image(), "label": label}))


def vit(classes, names=None, seed=0):
    options = {"image_size": 12, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    options |= {"intermediate_size": 48, "num_labels": classes, "initializer_range": 0.5}
    model = build("ViTForImageClassification", "ViTConfig", seed=seed, **options)
    if names:
        model.config.id2label = dict(enumerate(names))
    return model


@torch.no_grad()
def picture_logits(model, data):
    pixels = processor()([image.convert("RGB") for image in data["image"]], return_tensors="pt")
    return model(**pixels).logits.numpy()


class TestPictures:
    @pytest.mark.parametrize(("classes", "top"), [(7, 5), (5, 5), (4, 4), (3, 3)])
    def test_figures_are_those_of_scikit_learn(self, classes, top):
        model, data = vit(classes), pictures(classes)
        scores = IMAGE_CLASSIFICATION.score(model, data, processor(), OPTIONS)
        check_right_answers(scores, *scores.values())
        got = values(scores)
        logits, truth, labels = picture_logits(model, data), data["label"][:], range(classes)
        assert list(got) == ["top-1 accuracy", f"top-{top} accuracy"]
        assert got["top-1 accuracy"] == pytest.approx(accuracy_score(truth, logits.argmax(1)), abs=1e-6)
        expected = 1 if top == classes else top_k_accuracy_score(truth, logits, k=top, labels=labels)
        assert got[f"top-{top} accuracy"] == pytest.approx(expected, abs=1e-6)
        assert expected == 1 or 0.5 < expected < 1

    def test_figures_are_those_of_the_metric_of_the_same_classes(self, tmp_path):
        model, data = vit(7), pictures(7)
        ranked = np.argsort(-picture_logits(model, data), axis=1)
        got = load_metric("top_k_accuracy", cache_dir=tmp_path).compute(
            predictions=ranked, references=data["label"][:]
        )
        for key, figures in IMAGE_CLASSIFICATION.score(model, data, processor(), OPTIONS).values().items():
            assert (got[key], got[f"{key}_standard_error"]) == pytest.approx(figures, abs=1e-9)

    def test_equal_logits_rank_in_the_order_of_the_classes(self):
        model, data = vit(7), pictures(7)
        nn.init.zeros_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
        counts, labels = IMAGE_CLASSIFICATION.score(model, data, processor(), OPTIONS).counts, np.array(data["label"])
        assert np.array_equal(counts[:, 1], labels == 0)
        assert np.array_equal(counts[:, 2], labels < 5)

    def test_are_prepared_as_they_are_asked_for(self):
        data = pictures()
        examples = IMAGE_CLASSIFICATION.prepare(data, processor(), 0)
        expected = processor()([image.convert("RGB") for image in data["image"]], return_tensors="pt")["pixel_values"]
        assert len(examples) == COUNT
        batch = IMAGE_CLASSIFICATION.collator(processor())([examples[index] for index in range(COUNT)])
        assert torch.equal(batch["pixel_values"], expected)
        assert batch["labels"].tolist() == data["label"][:]
        assert not data.with_format(None).select_columns("label").cache_files

    def test_labels_are_matched_by_name(self):
        names = [f"class {letter}" for letter in "abcdefg"]
        order = [3, 0, 6, 1, 5, 2, 4]
        data = pictures(7, names)
        plain = IMAGE_CLASSIFICATION.score(vit(7, names), data, processor(), OPTIONS).counts
        model = vit(7, [names[index] for index in order])
        model.classifier.weight.data = model.classifier.weight.data[order]
        model.classifier.bias.data = model.classifier.bias.data[order]
        assert np.array_equal(IMAGE_CLASSIFICATION.score(model, data, processor(), OPTIONS).counts, plain)

    def test_of_some_of_the_classes_are_matched_by_name(self):
        data = pictures(2, ["dog", "cat"])
        aligned = align_labels(data, vit(4, ["Bird", "Cat", "Cow", "Dog"]))
        assert aligned["label"][:] == [(3, 1)[label] for label in data["label"]]

    def test_other_column_names_are_found(self):
        data, model = pictures(), vit(7)
        renamed = data.rename_columns({"image": "img", "label": "labels"})
        counts = [IMAGE_CLASSIFICATION.score(model, part, processor(), OPTIONS).counts for part in (data, renamed)]
        assert np.array_equal(*counts)

    def test_order_and_batch_size_change_nothing(self):
        data, model = pictures(), vit(7)
        order = np.random.default_rng(0).permutation(COUNT)
        whole = IMAGE_CLASSIFICATION.score(model, data, processor(), OPTIONS).counts
        moved = IMAGE_CLASSIFICATION.score(model, data.select(order), processor(), OPTIONS._replace(batch_size=3))
        assert np.array_equal(moved.counts, whole[order])

    def test_the_certificate_states_the_same_accuracy(self):
        models, data = [vit(3, seed=seed) for seed in (0, 1)], pictures(3, count=100)
        examples = IMAGE_CLASSIFICATION.prepare(data, processor(), 0)
        certificate = verify(*models, examples, data_collator=IMAGE_CLASSIFICATION.collator(processor()))
        scores = [IMAGE_CLASSIFICATION.score(model, data, processor(), OPTIONS) for model in models]
        assert certificate.accuracy == pytest.approx([values(s)["top-1 accuracy"] for s in scores], abs=1e-9)

    def test_refuse_bad_data(self):
        with pytest.raises(DataError, match="has the label 6, but the data set has unnamed labels and the model 5 la"):
            IMAGE_CLASSIFICATION.score(vit(5), pictures(7), processor(), OPTIONS)
        with pytest.raises(
            DataError, match=r"the data set has 7 labels \(a, b, c, d, e, \.\.\.\) and the model 5 labels"
        ):
            IMAGE_CLASSIFICATION.score(vit(5), pictures(7, list("abcdefg")), processor(), OPTIONS)
        with pytest.raises(DataError, match="none of the columns image, img"):
            IMAGE_CLASSIFICATION.prepare(pictures().remove_columns("image"), processor(), 0)
        hidden = pictures().remove_columns("label").add_column("label", [-1] * COUNT)
        with pytest.raises(DataError, match="example 0 is -1: the labels of this split are hidden"):
            IMAGE_CLASSIFICATION.prepare(hidden, processor(), 0)
