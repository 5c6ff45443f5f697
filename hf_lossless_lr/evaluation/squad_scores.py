"""Scores of SQuAD answers: exact match and F1, as its scripts count them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from .scores import Score, Scores


def normalize_answer(text: str) -> str:
    """Return an answer in lower case, without ASCII punctuation, articles and surplus blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(prediction: str, golds: Sequence[str], unanswerable: bool) -> tuple[float, float]:
    """Return exact match and F1 of the words (with multiplicity), each against the best of the correct answers.

    Args:
        prediction: the predicted text.
        golds: texts of the correct answers.
        unanswerable: whether to score as in v2.0: no correct answer means that nothing should be predicted, and two
            texts without words have an F1 of 1 (in v1.1 of 0).

    Returns:
        Two values in [0, 1].
    """
    texts = [normalize_answer(gold) for gold in golds]
    if unanswerable:
        texts = [text for text in texts if text] or [""]
    answer = normalize_answer(prediction)
    return float(answer in texts), max(_word_f1(answer.split(), text.split(), unanswerable) for text in texts)


def _word_f1(words: list[str], others: list[str], unanswerable: bool) -> float:
    if not words and not others:
        return float(unanswerable)
    return 2 * (Counter(words) & Counter(others)).total() / (len(words) + len(others))


def squad_scores(predictions: Sequence[str], golds: Sequence[Sequence[str]], unanswerable: bool) -> Scores:
    """Score answers to questions.

    Args:
        predictions: the answer to each question.
        golds: texts of the correct answers to each question; none, in v2.0, where there is no answer.
        unanswerable: whether to score as in v2.0.

    Returns:
        The scores; the counts are exact match, F1 and 1, in v2.0 for questions with and without an answer.
    """
    counts = np.zeros((len(golds), 2, 3))
    for row, prediction, texts in zip(counts, predictions, golds, strict=True):
        row[int(not texts)] = (*answer_scores(prediction, texts, unanswerable), 1)
    if not unanswerable:
        return Scores(counts[:, 0], squad_metrics("", (0,)))
    parts = squad_metrics("", (0, 1)) + squad_metrics("HasAns_", (0,)) + squad_metrics("NoAns_", (1,))
    return Scores(counts.reshape(len(counts), 6), parts)


def squad_metrics(prefix: str, kinds: Sequence[int]) -> tuple[Score, Score]:
    """Return exact match and F1 over the questions of some kinds."""
    right = None if prefix else lambda counts: sum(counts[..., 3 * kind] for kind in kinds)  # of all questions only
    return Score(f"{prefix}f1", _mean(1, kinds)), Score(f"{prefix}exact_match", _mean(0, kinds), right=right)


def _mean(column: int, kinds: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a mean over the questions of some kinds (0: with an answer, 1: without), 0 if there are none."""

    def of_sums(sums: np.ndarray) -> np.ndarray:
        total = sum(sums[..., 3 * kind + column] for kind in kinds)
        return total / np.maximum(sum(sums[..., 3 * kind + 2] for kind in kinds), 1)

    return of_sums
