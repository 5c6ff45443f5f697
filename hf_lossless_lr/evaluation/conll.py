"""CoNLL-2003: persons, organizations, locations and other names in news, scored by F1 of whole entities.

An entity is right if its words and its type are. seqeval says which tags form one. `precision`, `recall` and `f1` are
those of its strict mode (IOB2: an entity begins with a B- tag); `conlleval_f1` is that of its default mode, which the
shared task's script and `run_ner.py` of Transformers print. Words that the tokenizer cuts off count as outside.

Source: E. Tjong Kim Sang and F. De Meulder, Introduction to the CoNLL-2003 Shared Task, CoNLL 2003.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, List
from transformers import DataCollatorForTokenClassification, PreTrainedModel
from transformers.utils import logging

from ..data import IGNORE_INDEX
from ..errors import ConfigurationError, DataError, NumericalError
from ..layers import evaluating
from .classification import divided, informative, model_labels
from .pipelines import TASKS
from .scores import Score, Scores
from .sources import choose_columns
from .task import EvaluationTask, ScoringOptions

_TAGGING = TASKS["token-classification"]
_OUTSIDE = "O"
_IOB2 = re.compile(rf"{_OUTSIDE}|[BI]-.+")

_Entities = Callable[[list[str]], set[Any]]  # from the tags of a sentence to its entities


def _entity_readers() -> tuple[_Entities, _Entities]:
    """Return seqeval's two ways to read entities: strictly as IOB2, and as the script of CoNLL does."""
    try:
        from seqeval.metrics.sequence_labeling import get_entities
        from seqeval.scheme import IOB2, Tokens
    except ImportError as error:
        raise ConfigurationError("entities are scored by seqeval: pip install hf-lossless-lr[eval].") from error

    def strict(tags: list[str]) -> set[Any]:
        return {entity.to_tuple() for entity in Tokens(tags, IOB2).entities}

    def default(tags: list[str]) -> set[Any]:
        return set(get_entities(tags))

    return strict, default


def _check_scheme(names: Iterable[str]) -> None:
    wrong = [name for name in names if not _IOB2.fullmatch(name)]
    if wrong:
        raise DataError(f"tags must be {_OUTSIDE}, or B- or I- and a type (IOB2), not {', '.join(wrong)}.")


def entity_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> Scores:
    """Score the tags of sentences by the entities that they form.

    Args:
        predicted: the tags of each sentence, one for each word.
        true: the right ones.

    Returns:
        The scores; the counts are right, predicted and true entities, read as strict IOB2 and as by conlleval.

    Raises:
        DataError: if a tag is not of IOB2, or the two do not have the same words.
        ConfigurationError: if seqeval is missing.
    """
    readers, counts = _entity_readers(), []
    _check_scheme(sorted({str(tag) for rows in (predicted, true) for row in rows for tag in row}))
    for index, (mine, theirs) in enumerate(zip(predicted, true, strict=True)):
        if len(mine) != len(theirs):
            raise DataError(f"sentence {index} has {len(theirs)} tags, but {len(mine)} are predicted.")
        row = []
        for entities in readers:
            found, wanted = entities(list(mine)), entities(list(theirs))
            row += [len(found & wanted), len(found), len(wanted)]
        counts.append(row)
    return Scores(np.array(counts, dtype=np.float64), METRICS)


def _columns(dataset: Dataset, tokenizer: Any) -> tuple[str, str]:
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"CoNLL needs the word of each token, which {type(tokenizer).__name__} does not give. Load a fast "
            "tokenizer."
        )
    words, tags = choose_columns(_TAGGING, dataset.column_names)
    return words, tags


def _tag_rows(dataset: Dataset, words: str, tags: str) -> list[list[Any]]:
    """Return the tags of each example, one for each word."""
    if not len(dataset):
        raise DataError("the data set is empty.")
    rows = list(dataset[tags])
    for index, (row, sentence) in enumerate(zip(rows, dataset[words], strict=True)):
        if row is None or sentence is None or len(row) != len(sentence):
            raise DataError(f"example {index} has {len(sentence or ())} words, but {len(row or ())} tags.")
    return rows


def align_tags(dataset: Dataset, model: PreTrainedModel) -> Dataset:
    """Number the tags of a data set as the model does, by their names.

    Checkpoints number the tags of CoNLL differently, so do this before `CONLL2003.prepare`, whose labels keep the
    numbers of the data set. `CONLL2003.score` does it by itself.

    Args:
        dataset: words with tags: numbers whose feature has names, names, or mere numbers (taken to be the model's).
        model: a tagger. Where its names say nothing (`LABEL_0`), its tags are taken to be those of the data set.

    Returns:
        The data set with tags of the type `datasets.ClassLabel`.

    Raises:
        DataError: if the tags are not the model's, neither side names them, or they do not fit the words.
    """
    words, tags = choose_columns(_TAGGING, dataset.column_names)
    feature, theirs = getattr(dataset.features[tags], "feature", None), model_labels(model)
    own = list(feature.names) if isinstance(feature, ClassLabel) else []
    names = theirs if informative(theirs) else own
    model_has = f"the model has {len(theirs)}: {', '.join(theirs)}"
    if not names:
        raise DataError(f"neither the data set nor the model names its tags; {model_has}.")
    if own and (len(own) != len(theirs) or not set(own) <= set(names)):
        raise DataError(f"the data set has {len(own)} tags: {', '.join(own)}; but {model_has}.")
    numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
    if getattr(feature, "dtype", None) != "string":
        numbers = {tag: numbers[name] for tag, name in enumerate(own or names)}
    rows = _tag_rows(dataset, words, tags)
    for index, row in enumerate(rows):
        for tag in row:
            if tag not in numbers:
                raise DataError(f"example {index} has the tag {tag!r}, but {model_has}.")
    column = [[numbers[tag] for tag in row] for row in rows]
    return dataset.remove_columns(tags).add_column(tags, column, feature=List(ClassLabel(names=names)))


def _prepare(dataset: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Return sentences whose labels are the tags of the first piece of each word, numbered as in the data set."""
    words, tags = _columns(dataset, tokenizer)
    for index, row in enumerate(_tag_rows(dataset, words, tags)):
        for tag in row:
            if not isinstance(tag, int) or tag < 0:
                raise DataError(
                    f"example {index} has the tag {tag!r}, not a whole number from 0. For names use "
                    "align_tags(dataset, model) first."
                )
    return _TAGGING.prepare(dataset, tokenizer, min(max_length, tokenizer.model_max_length), [words, tags])


def _predicted_tags(
    model: PreTrainedModel, sentences: list[list[str]], tokenizer: Any, options: ScoringOptions
) -> list[list[int | None]]:
    """Return the tag of each word's first piece, None where the tokenizer left it out."""
    numbers = [list(range(len(sentence))) for sentence in sentences]  # labels say which word is where
    numbered = Dataset.from_dict({"tokens": sentences, "ner_tags": numbers})
    examples = _prepare(numbered, tokenizer, options.max_length)
    collate, taken = DataCollatorForTokenClassification(tokenizer), inspect.signature(model.forward).parameters
    predicted: list[list[int | None]] = [[None] * len(sentence) for sentence in sentences]
    with evaluating(model), torch.no_grad():
        for first in logging.tqdm(range(0, len(examples), options.batch_size), desc="Tagging"):
            rows = examples.select(range(first, min(first + options.batch_size, len(examples))))
            batch = collate(list(rows))
            places = batch.pop("labels")
            outputs = model(**{name: value.to(model.device) for name, value in batch.items() if name in taken})
            if outputs.logits.isnan().any():
                raise NumericalError("the logits of a sentence are not numbers; check the model.")
            chosen = outputs.logits.argmax(-1).cpu()
            for index, token in (places != IGNORE_INDEX).nonzero().tolist():
                predicted[first + index][places[index, token]] = int(chosen[index, token])
    return predicted


def _score(model: PreTrainedModel, dataset: Dataset, tokenizer: Any, options: ScoringOptions) -> Scores:
    words, tags = _columns(dataset, tokenizer)
    _entity_readers()  # before the model is run
    aligned = align_tags(dataset, model)
    names = aligned.features[tags].feature.names
    _check_scheme(names)
    predictions = _predicted_tags(model, list(aligned[words]), tokenizer, options)
    predicted = [[_OUTSIDE if tag is None else names[tag] for tag in row] for row in predictions]
    return entity_scores(predicted, [[names[tag] for tag in row] for row in aligned[tags]])


METRICS = (
    Score("f1", lambda sums: divided(2 * sums[..., 0], sums[..., 1] + sums[..., 2])),
    Score("precision", lambda sums: divided(sums[..., 0], sums[..., 1])),
    Score("recall", lambda sums: divided(sums[..., 0], sums[..., 2])),
    Score("conlleval_f1", lambda sums: divided(2 * sums[..., 3], sums[..., 4] + sums[..., 5])),
)
"""Metrics of summed counts, fractions in [0, 1]; 0 where there is nothing to divide by."""

CONLL2003 = EvaluationTask(
    auto_model=_TAGGING.auto_model,
    processor=_TAGGING.processor,
    dataset=("lhoestq/conll2003", None, "train", "test"),  # the same as eriktks/conll2003, without its loading script
    max_length=512,
    prepare=_prepare,
    collator=DataCollatorForTokenClassification,
    score=_score,
    align=align_tags,
)
"""CoNLL-2003 (English); figures are published on its test split."""
