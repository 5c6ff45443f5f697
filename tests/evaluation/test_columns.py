"""Columns of a data set: how many, what is in them, and which class a number stands for."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from support.tiny_models import bert_sequence_classification, vit
from support.word_tokenizer import word_tokenizer
from transformers import ViTImageProcessor

from hf_lossless_lr.errors import DataError
from hf_lossless_lr.evaluation import EVALUATION_TASKS, TASKS, choose_columns

TEXTS = {"a": ["good"], "b": ["bad"], "c": ["so so"], "label": [0]}


@pytest.mark.parametrize(
    ("task", "columns", "takes"),
    [
        ("text-classification", ["a", "b", "c", "label"], "2 to 3"),
        ("text-classification", ["a"], "2 to 3"),
        ("token-classification", ["a"], "2"),
        ("text-generation", ["a", "b"], "1"),
    ],
)
def test_too_few_or_too_many_are_refused(task, columns, takes):
    with pytest.raises(DataError, match=f"columns: the task takes {takes}, the label last"):
        choose_columns(TASKS[task], list(TEXTS), columns)


@pytest.mark.parametrize("columns", [["a", "label"], ["a", "b", "label"]])
def test_as_many_as_a_task_takes_are_used(columns):
    assert choose_columns(TASKS["text-classification"], list(TEXTS), columns) == columns


@pytest.mark.parametrize("task", [TASKS["image-classification"], EVALUATION_TASKS["imagenet"]])
def test_paths_are_no_pictures(task):
    dataset = Dataset.from_dict({"image": ["one.png"], "label": [0]})
    with pytest.raises(DataError, match=r"'image' holds no pictures.*'one.png'.*cast_column"):
        task.prepare(dataset, ViTImageProcessor(), 0)


SWAG = {"sent1": "he", "sent2": "he", **{f"ending{n}": "runs" for n in range(4)}, "label": 0}
SQUAD = {"id": "1", "question": "who", "context": "he", "answers": {"text": ["he"], "answer_start": [0]}}
MMLU = {"question": "who", "subject": "he", "choices": list("abcd"), "answer": 0}


@pytest.mark.parametrize(
    ("task", "row", "column", "value"),
    [
        ("swag", SWAG, "sent2", None),
        ("swag", SWAG, "ending3", None),
        ("squad", SQUAD, "question", None),
        ("squad", SQUAD, "context", None),
        ("mmlu", MMLU, "choices", ["a", None, "c", "d"]),
    ],
)
def test_what_is_no_text_is_refused(task, row, column, value):
    dataset = Dataset.from_list([row, {**row, column: value}])
    with pytest.raises(DataError, match=r"row 1 .*(no string|must be texts)"):
        EVALUATION_TASKS[task].prepare(dataset, word_tokenizer(eos=True), 32)


@pytest.mark.parametrize("columns", [None, ["a", "label"]])
def test_classes_that_are_named_are_numbered_as_the_model_does(columns):
    model, _ = bert_sequence_classification()
    model.config.id2label = {0: "bad", 1: "good", 2: "so so"}
    names = ["good", "so so", "bad"]
    features = Features({"a" if columns else "text": Value("string"), "label": ClassLabel(names=names)})
    dataset = Dataset.from_dict({next(iter(features)): names, "label": [0, 1, 2]}, features=features)
    aligned = TASKS["text-classification"].align(dataset, model, *([columns] if columns else []))
    assert aligned["label"] == [1, 2, 0]
    model.config.id2label = {number: f"LABEL_{number}" for number in range(3)}
    assert TASKS["text-classification"].align(dataset, model, *([columns] if columns else [])) is dataset


def test_classes_of_pictures_are_numbered_as_the_model_does():
    model, _ = vit()
    model.config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    features = Features({"image": Value("string"), "label": ClassLabel(names=["bird", "cat", "dog"])})
    dataset = Dataset.from_dict({"image": list("bcd"), "label": [0, 1, 2]}, features=features)
    assert TASKS["image-classification"].align(dataset, model)["label"] == [2, 0, 1]
