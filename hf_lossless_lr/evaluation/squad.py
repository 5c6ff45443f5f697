"""SQuAD v1.1 and v2.0: answers cut out of a passage, scored by exact match and F1.

A passage that is too long is read in overlapping windows. Features and the search for the best span are those of
Transformers' `run_qa.py`, exact match and F1 those of the official evaluation scripts. All metrics are fractions in
[0, 1]; multiply by 100 for the field's figures.

Sources: P. Rajpurkar et al., SQuAD, EMNLP 2016; P. Rajpurkar et al., Know What You Don't Know, ACL 2018.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel
from transformers.utils import logging

from ..errors import DataError, NumericalError
from ..layers import evaluating
from .scores import Scores
from .sources import check_texts
from .squad_scores import squad_scores
from .task import EvaluationTask, ScoringOptions

STRIDE = 128  # tokens that two windows of a passage share
CANDIDATES = 20  # best starts and best ends of a window, whose pairs are searched
MAX_ANSWER_TOKENS = 30
NULL_THRESHOLD = 0.0  # v2.0: how much higher "no answer" may score than the best span before it is the answer
NO_SPAN = "empty"  # the scripts' answer where no pair of candidates is a span of the passage
COLUMNS = ("question", "context", "answers")


class _Window(NamedTuple):
    """One input of the model.

    Attributes:
        example: index of its example in the batch of examples.
        inputs: what the tokenizer gave, without padding.
        null: position that stands for "no answer": the `[CLS]` token.
        characters: start and end of each token in the passage; (-1, -1) outside of it.  # shape: (tokens, 2)
    """

    example: int
    inputs: dict[str, list[int]]
    null: int
    characters: np.ndarray


def _check(dataset: Dataset, tokenizer: Any) -> None:
    missing = [column for column in COLUMNS if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"SQuAD needs the columns {', '.join(COLUMNS)}; the data set has no {' and no '.join(missing)}, but "
            f"{', '.join(dataset.column_names)}."
        )
    check_texts(dataset, "question", "context")
    if not len(dataset):
        raise DataError("the data set is empty.")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"SQuAD needs the characters of each token, which {type(tokenizer).__name__} does not give. Load a fast "
            "tokenizer."
        )


def _golds(context: str, answers: Any, index: int, unanswerable: bool) -> list[tuple[str, int]]:
    """Return the text and first character of each correct answer of an example; none if it has no answer."""
    texts, starts = (
        (answers.get("text"), answers.get("answer_start")) if isinstance(answers, Mapping) else (None, None)
    )
    if not isinstance(texts, list) or not isinstance(starts, list):
        raise DataError(
            f"example {index}: answers must be {{'text': [...], 'answer_start': [...]}}, as in SQuAD on the hub, not "
            f"{str(answers)[:80]}."
        )
    if len(texts) != len(starts):
        raise DataError(f"example {index}: {len(texts)} answers have {len(starts)} values of answer_start.")
    for text, start in zip(texts, starts, strict=True):
        if not 0 <= start <= len(context) - len(text):
            raise DataError(
                f"example {index}: the answer {text!r} starts at character {start}, but the context has "
                f"{len(context)} characters."
            )
    if not texts and not unanswerable:
        raise DataError(f"example {index} has no answer, as in SQuAD v2.0: use SQUAD_V2 rather than SQUAD.")
    return list(zip(texts, starts, strict=True))


def _windows(batch: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> list[_Window]:
    """Cut the passages of some examples into windows; the question comes first unless padding does."""
    max_length = min(max_length, tokenizer.model_max_length)
    stride = min(STRIDE, max_length // 2)
    questions = [question.lstrip() for question in batch["question"]]  # some in SQuAD begin with many blanks
    longest = max(len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"])
    if max_length - longest - tokenizer.num_special_tokens_to_add(pair=True) <= stride:
        raise DataError(
            f"a question of {longest} tokens leaves no room for windows of {max_length} tokens that share {stride}; "
            "raise max_length."
        )
    right = tokenizer.padding_side == "right"
    texts = (questions, batch["context"]) if right else (batch["context"], questions)
    encoded = tokenizer(
        *texts,
        truncation="only_second" if right else "only_first",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    examples, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    windows = []
    for index, example in enumerate(examples):
        inputs = {name: column[index] for name, column in encoded.items()}
        inside = np.array([part == int(right) for part in encoded.sequence_ids(index)])
        characters = np.where(inside[:, None], np.array(offsets[index]), -1)
        windows.append(_Window(example, inputs, _null_position(inputs["input_ids"], tokenizer), characters))
    return windows


def _null_position(input_ids: list[int], tokenizer: Any) -> int:
    return next((input_ids.index(i) for i in (tokenizer.cls_token_id, tokenizer.bos_token_id) if i in input_ids), 0)


def _labels(window: _Window, golds: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """Return the first and last token of the first answer, or the null position if the window lacks a part of it."""
    begins, ends = window.characters.T
    inside = np.flatnonzero(begins >= 0)
    if not golds or not inside.size:
        return window.null, window.null
    text, start = golds[0]
    end = start + len(text)
    if begins[inside[0]] > start or ends[inside[-1]] < end:
        return window.null, window.null
    return int(inside[begins[inside] <= start][-1]), int(inside[ends[inside] >= end][0])


def _prepare(dataset: Dataset, tokenizer: Any, max_length: int, unanswerable: bool) -> Dataset:
    """Return one example for each window, with `start_positions` and `end_positions`."""
    _check(dataset, tokenizer)

    def windows_of(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows: list[dict[str, Any]] = []
        parts = zip(batch["context"], batch["answers"], indices, strict=True)
        golds = [_golds(*part, unanswerable) for part in parts]
        for window in _windows(batch, tokenizer, max_length):
            start, end = _labels(window, golds[window.example])
            rows.append({**window.inputs, "start_positions": start, "end_positions": end})
        return {name: [row[name] for row in rows] for name in rows[0]}

    return dataset.map(windows_of, batched=True, with_indices=True, remove_columns=dataset.column_names)


def _span_logits(
    model: PreTrainedModel, windows: Sequence[_Window], tokenizer: Any, batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the start and end logits of each window, without those of padding.  # shape: (tokens, 2)."""
    collate, taken = DataCollatorWithPadding(tokenizer), inspect.signature(model.forward).parameters
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        batch = collate([window.inputs for window in part])
        outputs = model(**{name: value.to(model.device) for name, value in batch.items() if name in taken})
        if not hasattr(outputs, "start_logits") or not hasattr(outputs, "end_logits"):
            raise DataError(f"{type(model).__name__} gives no start_logits and end_logits; use a question answerer.")
        logits = torch.stack([outputs.start_logits, outputs.end_logits], -1).float().cpu().numpy()
        if np.isnan(logits).any():
            raise NumericalError("the logits of a window are not numbers; check the model.")
        for window, row in zip(part, logits, strict=True):
            tokens = len(window.characters)
            yield row[-tokens:] if tokenizer.padding_side == "left" else row[:tokens]


def _best_span(logits: np.ndarray, characters: np.ndarray, unanswerable: bool) -> tuple[float, int, int]:
    """Return the score of the best span of a window (-inf if there is none), and its characters.

    A span is a pair of one of the best starts and one of the best ends, in the passage, in order and not too long.
    """
    firsts, lasts = np.argsort(-logits, axis=0, kind="stable")[:CANDIDATES].T
    begins, ends = characters[firsts, 0][:, None], characters[lasts, 1][None, :]
    tokens = lasts[None, :] - firsts[:, None] + 1
    valid = (begins >= 0) & (ends >= 0) & (tokens >= 1) & (tokens <= MAX_ANSWER_TOKENS)
    if unanswerable:  # an empty text would mean "no answer"
        valid &= begins < ends
    scores = np.where(valid, logits[firsts, 0][:, None] + logits[lasts, 1][None, :], -np.inf)
    best = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[best]), int(begins[best[0], 0]), int(ends[0, best[1]])


def predicted_answer(context: str, windows: Sequence[tuple[np.ndarray, np.ndarray, int]], unanswerable: bool) -> str:
    """Return the answer to a question: the text of the best span of all windows, or nothing.

    Args:
        context: the passage.
        windows: of each window the start and end logits (tokens, 2), the start and end character of each token (-1
            outside of the passage; tokens, 2), and the position whose logits stand for "no answer".
        unanswerable: whether there may be no answer; it is given where the lowest null score of the windows is above
            that of the best span.

    Returns:
        The text, empty for no answer.
    """
    spans = [_best_span(logits, characters, unanswerable) for logits, characters, _ in windows]
    score, begin, end = max(spans, key=lambda span: span[0])
    score, text = (score, context[begin:end]) if np.isfinite(score) else (0.0, NO_SPAN)
    null_score = min(float(logits[null].sum()) for logits, _, null in windows)
    return "" if unanswerable and null_score - score > NULL_THRESHOLD else text


def _score(
    model: PreTrainedModel, dataset: Dataset, tokenizer: Any, options: ScoringOptions, unanswerable: bool
) -> Scores:
    _check(dataset, tokenizer)
    answers, size = [], options.batch_size
    questions = zip(dataset["context"], dataset["answers"], strict=True)  # what is wrong with one shows now
    golds = [[text for text, _ in _golds(*each, index, unanswerable)] for index, each in enumerate(questions)]
    with evaluating(model), torch.no_grad():
        for first in logging.tqdm(range(0, len(dataset), size), desc="Answering"):
            batch = dataset[first : first + size]
            windows = _windows(batch, tokenizer, options.max_length)
            logits = list(_span_logits(model, windows, tokenizer, size))
            for index, context in enumerate(batch["context"]):
                mine = [
                    (row, window.characters, window.null)
                    for row, window in zip(logits, windows, strict=True)
                    if window.example == index
                ]
                answers.append(predicted_answer(context, mine, unanswerable))
    return squad_scores(answers, golds, unanswerable)


def _task(hub_id: str, unanswerable: bool) -> EvaluationTask:
    return EvaluationTask(
        auto_model="AutoModelForQuestionAnswering",
        processor="AutoTokenizer",
        dataset=(hub_id, None, "train", "validation"),
        max_length=384,
        prepare=partial(_prepare, unanswerable=unanswerable),
        collator=DataCollatorWithPadding,
        score=partial(_score, unanswerable=unanswerable),
    )


SQUAD = _task("rajpurkar/squad", unanswerable=False)
"""SQuAD v1.1; metrics `f1` and `exact_match`."""

SQUAD_V2 = _task("rajpurkar/squad_v2", unanswerable=True)
"""SQuAD v2.0; the metrics of v1.1, and the same of the questions with (`HasAns_`) and without (`NoAns_`) an answer."""
