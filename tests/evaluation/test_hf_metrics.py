"""The metrics as modules of evaluate: against other libraries on random predictions, in batches, and offline."""

import importlib
import sys
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import pearsonr
from seqeval.metrics import f1_score as entity_f1_score
from seqeval.metrics import precision_score, recall_score
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, top_k_accuracy_score
from support.squad_oracle import official
from support.tiny_models import VOCABULARY, build
from transformers import Trainer, TrainingArguments

from hf_lossless_lr.errors import ConfigurationError, DataError
from hf_lossless_lr.evaluation import hf_metrics as metrics
from hf_lossless_lr.evaluation.glue import GLUE_LABELS

COUNT = 60
SEEDS = pytest.mark.parametrize("seed", range(4))
TAGS = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
WORDS = ["the", "A", "an", "bee", "Bee.", "sea,", "d-e", "f!", "’", "gee", "eye"]


@pytest.fixture
def load(tmp_path):
    return partial(metrics.load_metric, cache_dir=tmp_path)


def draw_classes(seed, classes=2):
    generator = np.random.default_rng(seed)
    references = generator.integers(0, classes, COUNT)
    kept = generator.random(COUNT) < 0.5
    return np.where(kept, references, generator.integers(0, classes, COUNT)), references


def draw_similarities(seed):
    generator = np.random.default_rng(seed)
    references = generator.uniform(0, 5, COUNT)
    return references * generator.uniform(-1, 1) + generator.normal(0, 1, COUNT), references


def draw_ranked(seed, classes=12):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(COUNT, classes))
    return np.argsort(-logits, axis=1), generator.integers(0, classes, COUNT), logits


def draw_tags(seed):
    generator = np.random.default_rng(seed)
    references = [list(generator.choice(TAGS, length)) for length in generator.integers(0, 12, COUNT)]
    predictions = [
        [tag if generator.random() < 0.7 else str(generator.choice(TAGS)) for tag in row] for row in references
    ]
    return predictions, [list(map(str, row)) for row in references]


def draw_answers(seed, unanswerable=False):
    """Answers and questions, each in another order."""
    generator = np.random.default_rng(seed)

    def text(least):
        return " ".join(generator.choice(WORDS, generator.integers(least, 5)))

    references = []
    for number in range(COUNT):
        texts = [] if unanswerable and number % 3 == 0 else [text(1) for _ in range(generator.integers(1, 4))]
        answers = {"text": texts, "answer_start": [0] * len(texts)}
        references.append({"id": f"q{number}", "answers": answers})
    predictions = [{"id": row["id"], "prediction_text": text(0)} for row in references]
    return [predictions[index] for index in generator.permutation(COUNT)], references


def official_scores(predictions, references, v2):
    texts = {row["id"]: row["prediction_text"] for row in predictions}
    return np.array([official(row, texts[row["id"]], v2) for row in references])


def values(result):
    return {name: value for name, value in result.items() if not name.endswith("_standard_error")}


class TestValues:
    """Against other libraries, which do not know of counts."""

    @SEEDS
    def test_of_accuracy_are_those_of_scikit_learn(self, load, seed):
        predictions, references = draw_classes(seed, 4)
        result = load("accuracy").compute(predictions=predictions, references=references)
        expected = accuracy_score(references, predictions)
        assert list(result) == ["accuracy", "accuracy_standard_error"]
        assert result["accuracy"] == pytest.approx(expected, abs=1e-9)
        error = np.sqrt(expected * (1 - expected) / (COUNT - 1))
        assert result["accuracy_standard_error"] == pytest.approx(error, abs=1e-9)

    @SEEDS
    @pytest.mark.parametrize("name", GLUE_LABELS)
    def test_of_glue_are_those_of_scikit_learn_and_scipy(self, load, name, seed):
        predictions, references = (
            draw_classes(seed, len(GLUE_LABELS[name])) if GLUE_LABELS[name] else draw_similarities(seed)
        )
        got = values(load("glue", name).compute(predictions=predictions, references=references))
        if name == "stsb":
            expected = {"Pearson correlation": pearsonr(predictions, references).statistic}
        elif name == "cola":
            expected = {"Matthews correlation": matthews_corrcoef(references, predictions)}
        else:
            expected = {"accuracy": accuracy_score(references, predictions)}
        if name in {"mrpc", "qqp"}:
            expected["F1"] = f1_score(references, predictions)
        assert got == pytest.approx(expected, abs=1e-9)

    @SEEDS
    def test_of_top_k_accuracy_are_those_of_scikit_learn(self, load, seed):
        ranked, references, logits = draw_ranked(seed)
        expected = [top_k_accuracy_score(references, logits, k=k, labels=range(12)) for k in (1, 3, 5)]
        for width in (12, 5):
            got = load("top_k_accuracy").compute(predictions=ranked[:, :width], references=references)
            wanted = {"top-1 accuracy": expected[0], "top-5 accuracy": expected[2]}
            assert values(got) == pytest.approx(wanted, abs=1e-9)
        got = load("top_k_accuracy").compute(predictions=ranked[:, :3], references=references)
        assert values(got) == pytest.approx({"top-1 accuracy": expected[0], "top-3 accuracy": expected[1]}, abs=1e-9)

    @SEEDS
    def test_of_seqeval_are_those_of_its_strict_mode(self, load, seed):
        predictions, references = draw_tags(seed)
        got = values(load("seqeval").compute(predictions=predictions, references=references))
        strict = {"mode": "strict", "scheme": IOB2}
        expected = {"f1": entity_f1_score(references, predictions, **strict)}
        expected["precision"] = precision_score(references, predictions, **strict)
        expected["recall"] = recall_score(references, predictions, **strict)
        expected["conlleval_f1"] = entity_f1_score(references, predictions)
        assert got == pytest.approx(expected, abs=1e-9)
        assert 0 < got["f1"] != got["conlleval_f1"] < 1

    @SEEDS
    def test_of_squad_are_those_of_the_official_script(self, load, seed):
        predictions, references = draw_answers(seed)
        got = values(load("squad").compute(predictions=predictions, references=references))
        exact, f1 = official_scores(predictions, references, False).mean(0)
        assert got == pytest.approx({"f1": f1, "exact_match": exact}, abs=1e-9)
        assert 0 < exact < f1 < 1

    @SEEDS
    @pytest.mark.parametrize("threshold", [None, 0.5])
    def test_of_squad_v2_are_those_of_the_official_script(self, load, seed, threshold):
        predictions, references = draw_answers(seed, unanswerable=True)
        doubt, options = np.random.default_rng(seed).random(COUNT), {}
        given = expected = predictions
        if threshold:
            given = [{**row, "no_answer_probability": value} for row, value in zip(predictions, doubt, strict=True)]
            expected = [
                {**row, "prediction_text": "" if value > threshold else row["prediction_text"]}
                for row, value in zip(predictions, doubt, strict=True)
            ]
            options = {"no_answer_threshold": threshold}
        got = values(load("squad_v2").compute(predictions=given, references=references, **options))
        scores = official_scores(expected, references, True)
        answered = np.array([bool(row["answers"]["text"]) for row in references])
        for prefix, part in (("", scores), ("HasAns_", scores[answered]), ("NoAns_", scores[~answered])):
            exact, f1 = part.mean(0)
            assert got.pop(f"{prefix}exact_match") == pytest.approx(exact, abs=1e-9)
            assert got.pop(f"{prefix}f1") == pytest.approx(f1, abs=1e-9)
        assert not got

    def test_of_squad_v2_ignore_doubt_unless_a_threshold_is_given(self, load):
        predictions, references = draw_answers(0, unanswerable=True)
        doubtful = [{**row, "no_answer_probability": 1.0} for row in predictions]
        results = [
            load("squad_v2").compute(predictions=rows, references=references) for rows in (predictions, doubtful)
        ]
        assert results[0] == results[1]


CASES = {
    ("accuracy", None): draw_classes,
    ("glue", "mrpc"): draw_classes,
    ("glue", "stsb"): draw_similarities,
    ("top_k_accuracy", None): lambda seed: draw_ranked(seed)[:2],
    ("seqeval", None): draw_tags,
    ("squad", None): draw_answers,
    ("squad_v2", None): partial(draw_answers, unanswerable=True),
}
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))


class TestUse:
    @EVERY
    def test_in_batches_is_the_same_as_at_once(self, load, case):
        predictions, references = CASES[case](7)
        metric = load(*case)
        expected = metric.compute(predictions=predictions, references=references)
        if case[0] in {"squad", "squad_v2"}:  # the two are in another order
            references = [references[index] for index in np.random.default_rng(0).permutation(COUNT)]
        for first in range(0, COUNT, 25):
            part = slice(first, first + 25)
            metric.add_batch(predictions=predictions[part], references=references[part])
        assert metric.compute() == pytest.approx(expected, abs=1e-9)

    @EVERY
    def test_one_by_one_and_in_memory_is_the_same_as_at_once(self, load, case):
        predictions, references = CASES[case](8)
        metric = load(*case, keep_in_memory=True)
        for prediction, reference in zip(predictions, references, strict=True):
            metric.add(prediction=prediction, reference=reference)
        expected = load(*case).compute(predictions=predictions, references=references)
        assert metric.compute() == pytest.approx(expected, abs=1e-9)

    def test_takes_arrays_and_tensors(self, load):
        predictions, references = draw_classes(9)
        results = [
            load("accuracy").compute(predictions=kind(predictions), references=kind(references))
            for kind in (list, np.asarray, torch.tensor)
        ]
        assert results[0] == results[1] == results[2]

    @EVERY
    def test_needs_no_network(self, load, case, monkeypatch):
        calls = []

        def refuse(*arguments):
            calls.append(arguments)
            raise OSError("there is no network")

        for name in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
            monkeypatch.setenv(name, "1")
        for name in ("socket.socket.connect", "socket.getaddrinfo"):
            monkeypatch.setattr(name, refuse)
        predictions, references = CASES[case](10)
        assert load(*case).compute(predictions=predictions, references=references)
        assert not calls

    def test_knows_its_name(self, load):
        for name in metrics.METRICS:
            assert load(name, "rte" if name == "glue" else None).name == name

    def test_is_a_metric_for_a_trainer(self, load, tmp_path):
        metric = load("glue", "sst2")
        labels = np.arange(20) % 2
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
        model = build("BertForSequenceClassification", "BertConfig", vocab_size=VOCABULARY, num_labels=2, **sizes)
        model.classifier.weight.data.zero_()
        model.classifier.bias.data[:] = torch.tensor([1.0, 0.0])  # always the class 0
        trainer = Trainer(
            model,
            TrainingArguments(tmp_path, report_to=[], use_cpu=True),
            eval_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]] * 20, "labels": labels}),
            compute_metrics=lambda found: metric.compute(
                predictions=found.predictions.argmax(-1), references=found.label_ids
            ),
        )
        assert trainer.evaluate()["eval_accuracy"] == 0.5


def answer(text="bee", name="a", **more):
    return {"id": name, "prediction_text": text, **more}


def question(*texts, name="a"):
    return {"id": name, "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}


BAD = {  # metric, its configuration, predictions, references, message
    "other lengths": ("accuracy", None, [1, 0], [1], r"Mismatch in the number of predictions \(2\) and references"),
    "nothing": ("accuracy", None, [], [], "there are no predictions to score"),
    "nothing for squad_v2": ("squad_v2", None, [], [], "there are no predictions to score"),
    "a probability": ("accuracy", None, [0.7], [1], "classes must be whole numbers from 0, not 0.7"),
    "a gap": ("accuracy", None, [1, None], [1, 1], "classes must be whole numbers from 0, not nan"),
    "hidden labels": ("glue", "sst2", [1], [-1], "classes must be whole numbers from 0, not -1"),
    "logits": ("glue", "sst2", [[0.1, 0.9]], [1], "don't match the expected format"),
    "no number": ("glue", "stsb", [1.0, float("nan")], [1.0, 2.0], "similarities must be finite numbers"),
    "one class": ("top_k_accuracy", None, [1], [1], "don't match the expected format"),
    "ragged": ("top_k_accuracy", None, [[1, 2], [1]], [1, 1], r"equally many classes for each example, not \[1, 2\]"),
    "no class": ("top_k_accuracy", None, [[]], [1], r"equally many classes for each example, not \[0\]"),
    "other words": ("seqeval", None, [["O"]], [["O", "O"]], "sentence 0 has 2 tags, but 1 are predicted"),
    "no IOB2": ("seqeval", None, [["E-X"]], [["O"]], r"must be O, or B- or I- and a type \(IOB2\), not E-X"),
    "no list": ("seqeval", None, ["O"], ["O"], "Got a string but expected a list"),
    "numbers": ("seqeval", None, [[1]], [[1]], "don't match the expected format"),
    "a double id": ("squad", None, [answer()] * 2, [question("b"), question("b", name="b")], "id 'a' occurs 2 times"),
    "a double question": ("squad", None, [answer(), answer(name="b")], [question("b")] * 2, "id 'a' occurs 2 times"),
    "a missing id": ("squad", None, [answer(name="b")], [question("bee")], "no prediction for the question 'a'"),
    "no text": ("squad", None, [{"id": "a"}], [question("bee")], "no 'prediction_text' beside 'id'"),
    "no text later": (
        "squad",
        None,
        [answer(name="b"), {"id": "a"}],
        [question("bee"), question("bee", name="b")],
        "no prediction for the question 'a'",
    ),
    "no answer": ("squad", None, [answer()], [question()], r"'a' has no answers.*give empty lists to squad_v2"),
    "no answers": (
        "squad_v2",
        None,
        [answer(), answer(name="b")],
        [question(), {"id": "b"}],
        "'b' has no answers",
    ),
    "a number as id": ("squad", None, [answer(name=1)], [question("bee", name=1)], "don't match the expected format"),
}


class TestErrors:
    @pytest.mark.parametrize("case", BAD)
    def test_say_what_is_wrong_and_leave_the_metric_usable(self, load, case):
        name, config, predictions, references, message = BAD[case]
        on_disk = case in ("hidden labels", "logits")  # where evaluate waits for a second after the first of them
        metric = load(name, config, keep_in_memory=not on_disk)
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=predictions, references=references)
        predictions, references = CASES[name, config if config != "sst2" else "mrpc"](3)
        assert metric.compute(predictions=predictions, references=references)

    @pytest.mark.parametrize(
        ("name", "config", "message"),
        [
            (
                "f1",
                None,
                "there is no metric 'f1'; there are squad, squad_v2, seqeval, glue, accuracy, top_k_accuracy",
            ),
            ("glue", "hans", "config_name of glue must be 'cola' or .* or 'wnli', not 'hans'"),
            ("glue", None, "config_name of glue must be 'cola' or .* or 'wnli', not None"),
            ("squad", "v2", "config_name of squad must be None, not 'v2'"),
        ],
    )
    def test_of_names_say_which_there_are(self, load, name, config, message):
        with pytest.raises(ConfigurationError, match=message):
            load(name, config)

    def test_of_the_package_are_data_errors(self, load):
        with pytest.raises(DataError, match="no prediction"):
            load("squad").compute(predictions=[answer(name="b")], references=[question("bee")])

    def test_of_unknown_options_are_not_silent(self, load):
        with pytest.raises(TypeError, match="normalize"):
            load("accuracy").compute(predictions=[1], references=[1], normalize=False)

    def test_without_evaluate_say_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "evaluate", None)
        monkeypatch.delitem(sys.modules, metrics.__name__)
        with pytest.raises(ConfigurationError, match=r"pip install hf-lossless-lr\[eval\]"):
            importlib.import_module(metrics.__name__)
