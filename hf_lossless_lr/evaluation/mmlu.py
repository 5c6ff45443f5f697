"""MMLU: multiple-choice questions of 57 subjects, answered with a letter after five solved examples.

Source: D. Hendrycks et al., Measuring Massive Multitask Language Understanding, ICLR 2021, and the prompts of
EleutherAI's lm-evaluation-harness (one blank before the subject where Hendrycks' code has two).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..data import IGNORE_INDEX
from ..errors import DataError
from .language_modeling import Passage, log_likelihoods
from .scores import Score, Scores
from .sources import load_split
from .task import EvaluationTask, ScoringOptions

LETTERS = "ABCD"
SHOTS = 5
HUB, HUB_CONFIG = "cais/mmlu", "all"
_COLUMNS = ("question", "subject", "choices", "answer")
_LOSS, _TOKENS, _BY_SUBJECT = 0, 1, 2  # counts: loss, tokens, then right answers and questions of each subject

Row = Mapping[str, Any]


class Encoded(NamedTuple):
    """A prompt in tokens.

    Attributes:
        context: the prompt.
        letters: the tokens that follow it for each letter; most tokenizers have one for `" A"`.
    """

    context: list[int]
    letters: list[list[int]]


def mmlu_prompt(row: Row, shots: Sequence[Row]) -> str:
    """Return the text that the letter of the answer follows, after a blank.

    Args:
        row: a question, as in the data set.
        shots: solved questions of the same subject.

    Returns:
        The prompt, which ends with `Answer:`.
    """
    subject = row["subject"].replace("_", " ")
    text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    for shot in shots:
        text += f"{_asked(shot)} {LETTERS[shot['answer']]}\n\n"
    return text + _asked(row)


def _asked(row: Row) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def _rows(dataset: Dataset, what: str) -> list[Row]:
    """Return the rows of a data set, if they are questions of MMLU."""
    missing = [column for column in _COLUMNS if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"{what}: has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}. "
            f"The columns of {HUB} are {', '.join(_COLUMNS)}."
        )
    rows: list[Row] = dataset.select_columns(list(_COLUMNS)).to_list()
    if not rows:
        raise DataError(f"{what}: is empty.")
    for index, row in enumerate(rows):
        if not isinstance(row["question"], str) or not isinstance(row["subject"], str):
            raise DataError(f"{what}: row {index} has no question or no subject.")
        if not isinstance(row["choices"], list) or len(row["choices"]) != len(LETTERS):
            raise DataError(f"{what}: row {index} has the choices {row['choices']!r}; there must be {len(LETTERS)}.")
        if not all(isinstance(choice, str) for choice in row["choices"]):
            raise DataError(f"{what}: row {index} has the choices {row['choices']!r}; they must be texts.")
        if not isinstance(row["answer"], int) or not 0 <= row["answer"] < len(LETTERS):
            raise DataError(f"{what}: row {index} has the answer {row['answer']!r}; it must be 0, 1, 2 or 3.")
    return rows


def _encode(row: Row, shots: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    """Return the prompt with as many shots, from the first on, as leave it and any letter within `max_length` tokens.

    A question that is too long even without shots loses its beginning.

    Raises:
        DataError: if there is no room for a question, or the letters have no tokens of their own.
    """
    for count in range(len(shots), -1, -1):
        text = mmlu_prompt(row, shots[:count])
        context, *wholes = _tokens(tokenizer, [text, *(f"{text} {letter}" for letter in LETTERS)])
        letters = [whole[len(context) :] for whole in wholes]
        room = max_length - max(map(len, letters))
        if len(context) <= room:
            break
    if room < 1:
        raise DataError(f"max_length is {max_length}, which leaves no room for a question before its answer.")
    if not all(letters) or len(set(map(tuple, letters))) < len(LETTERS):
        raise DataError(f"{type(tokenizer).__name__} does not tell the letters {', '.join(LETTERS)} apart.")
    return Encoded(context[-room:], letters)


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokenize texts that go on: with the special tokens that begin a text, but not those that end one."""
    encoded = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    result = []
    for tokens, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        end = len(tokens)
        while end and special[end - 1]:
            end -= 1
        result.append(tokens[:end])
    return result


def _encode_all(rows: Sequence[Row], dev: Sequence[Row], tokenizer: Any, max_length: int) -> list[Encoded]:
    by_subject: dict[str, list[Row]] = {}
    for shot in dev:
        by_subject.setdefault(shot["subject"], []).append(shot)
    unknown = sorted({row["subject"] for row in rows} - set(by_subject))
    if unknown:
        raise DataError(f"there are no dev examples of the subject {', '.join(map(repr, unknown))}.")
    result = []
    for row in rows:
        shots = [
            s for s in by_subject[row["subject"]] if (s["question"], s["choices"]) != (row["question"], row["choices"])
        ]
        result.append(_encode(row, shots[:SHOTS], tokenizer, max_length))
    return result


def _letter_likelihoods(model: PreTrainedModel, encoded: Sequence[Encoded], batch_size: int) -> np.ndarray:
    """Return the log-probability of each letter after each prompt.  # shape: (questions, letters)."""
    passages: list[Passage] = []
    places: list[tuple[int, list[int]]] = []  # question and letters of each passage
    for index, (context, letters) in enumerate(encoded):
        same_inputs: dict[tuple[int, ...], list[int]] = {}  # letters that differ in their last token share a pass
        for number, letter in enumerate(letters):
            same_inputs.setdefault(tuple(letter[:-1]), []).append(number)
        for beginning, numbers in same_inputs.items():
            passages.append(Passage([*context, *beginning], [letters[number] for number in numbers]))
            places.append((index, numbers))
    result = np.empty((len(encoded), len(LETTERS)))
    for (index, numbers), values in zip(places, log_likelihoods(model, passages, batch_size), strict=True):
        result[index, numbers] = values
    return result


def _answers(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the right answers and the questions of each subject."""
    subjects = (sums.shape[-1] - _BY_SUBJECT) // 2
    return sums[..., _BY_SUBJECT : _BY_SUBJECT + subjects], sums[..., _BY_SUBJECT + subjects :]


def _accuracy(sums: np.ndarray) -> np.ndarray:
    right, asked = _answers(sums)
    with np.errstate(invalid="ignore"):  # no questions: not a number, as below
        return right.sum(-1) / asked.sum(-1)


def _accuracy_by_subject(sums: np.ndarray) -> np.ndarray:
    right, asked = _answers(sums)
    shares = right / np.maximum(asked, 1)  # 0 for a subject without questions, which does not count in the mean
    with np.errstate(invalid="ignore"):
        return shares.sum(-1) / (asked > 0).sum(-1)


def _loss(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., _LOSS] / sums[..., _TOKENS]


METRICS = (
    Score("accuracy", _accuracy, right=lambda counts: _answers(counts)[0].sum(-1)),
    Score("accuracy_by_subject", _accuracy_by_subject),
    Score("loss", _loss, higher_is_better=False),
)


def _collator(tokenizer: Any) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
    """Make a collator that pads on the right, whatever the tokenizer's side, and labels with -100."""
    fill = {"input_ids": tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": IGNORE_INDEX}

    def collate(examples: list[Row]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        return {
            name: torch.tensor([[*e[name], *[value] * (longest - len(e[name]))] for e in examples])
            for name, value in fill.items()
        }

    return collate


@cache
def _hub_dev() -> Dataset:
    return load_split(HUB, HUB_CONFIG, None, "dev", None)


def mmlu(dev: Dataset | None = None) -> EvaluationTask:
    """Make the task of answering MMLU's questions, or others in its format, after five solved ones of their subject.

    `score` compares the log-probabilities of `" A"` to `" D"` after `mmlu_prompt`. Its metrics are `accuracy`, over
    all questions; `accuracy_by_subject`, the mean over subjects; and `loss`, of the right letter among all tokens.
    `prepare` labels the right letter alone, so that the loss of the model on its examples is that `loss`: calibration
    and certificate see the prompts that are scored. (The certificate's accuracy is the share of letters that are the
    likeliest of *all* tokens, which is stricter.)

    Where a prompt and its answer exceed `max_length` tokens, solved examples are dropped, the last first. A question
    is never shown as its own solved example: a question of `dev` has one example less.

    Args:
        dev: the solved examples, in their order: columns `question`, `subject`, `choices` and `answer`. Default: the
            split `dev` of `cais/mmlu`, loaded from the hub when it is first needed.

    Returns:
        The task.
    """

    def encode(dataset: Dataset, tokenizer: Any, max_length: int) -> tuple[list[Row], list[Encoded]]:
        rows = _rows(dataset, "the data set")
        shots = _rows(_hub_dev() if dev is None else dev, "the dev examples")
        return rows, _encode_all(rows, shots, tokenizer, max_length)

    def prepare(dataset: Dataset, tokenizer: Any, max_length: int) -> Dataset:
        examples: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row, (context, letters) in zip(*encode(dataset, tokenizer, max_length), strict=True):
            answer = letters[row["answer"]]
            examples["input_ids"].append(context + answer)
            examples["attention_mask"].append([1] * len(context + answer))
            examples["labels"].append([IGNORE_INDEX] * len(context) + answer)
        return Dataset.from_dict(examples)

    def score(model: PreTrainedModel, dataset: Dataset, tokenizer: Any, options: ScoringOptions) -> Scores:
        rows, encoded = encode(dataset, tokenizer, options.max_length)
        likelihoods = _letter_likelihoods(model, encoded, options.batch_size)
        subjects = sorted({row["subject"] for row in rows})
        counts = np.zeros((len(rows), _BY_SUBJECT + 2 * len(subjects)))
        for index, row in enumerate(rows):
            answer, column = row["answer"], _BY_SUBJECT + subjects.index(row["subject"])
            counts[index, _LOSS] = -likelihoods[index, answer]
            counts[index, _TOKENS] = len(encoded[index].letters[answer])
            counts[index, column] = likelihoods[index].argmax() == answer
            counts[index, column + len(subjects)] = 1
        return Scores(counts, METRICS)

    return EvaluationTask(
        auto_model="AutoModelForCausalLM",
        processor="AutoTokenizer",
        dataset=(HUB, HUB_CONFIG, "dev", "test"),
        max_length=2048,
        prepare=prepare,
        collator=_collator,
        score=score,
    )


MMLU = mmlu()
"""MMLU with the solved examples of the hub; for local ones, call `mmlu` with them."""
