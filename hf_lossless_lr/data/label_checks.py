"""Are the labels of an example such as the model's head takes, and is it short enough? Asked before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from ..errors import DataError
from ..fingerprint import as_array
from .labels import ALIASES, IGNORE_INDEX, label_columns

_ONE_EACH = ("SequenceClassification", "ImageClassification", "AudioClassification", "VideoClassification")
_TABLES = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|position_embed)$")
_SHOWN = 8  # names of labels in a message


def numbered(model: Any, data: str, name: str, value: Any, where: str, must: bool = True) -> Any:
    """Return a label, with the numbers of `config.label2id` in place of names.

    Args:
        model: the model.
        data: what to call the data in errors.
        name: name of the column, one of `label_columns`.
        value: its value in an example.
        where: what to call the example.
        must: whether a name that is not in `config.label2id` is an error, rather than left to the collator.

    Returns:
        The value, or the numbers.

    Raises:
        DataError: if the label is null, or a name that the model does not know.
    """
    if value is None and must:
        raise DataError(f"{data}: {where} has no label ({name} is null). Leave it out, or label it.")
    if isinstance(value, str):
        config = model.config
        names = config.label2id or {label: number for number, label in (config.id2label or {}).items()}
        known = {str(label): number for label, number in names.items()}
        if value in known:
            return int(known[value])
        if must:
            shown = ", ".join(list(known)[:_SHOWN]) + (", …" if len(known) > _SHOWN else "")
            raise DataError(
                f"{data}: {where} has the label {value!r}, which model.config.label2id does not have (it has "
                f"{shown or 'none'}). Set it to the names of the data, or give whole numbers."
            )
    if isinstance(value, (list, tuple)) and any(entry is None or isinstance(entry, str) for entry in value):
        return [numbered(model, data, name, entry, where, must) for entry in value]
    return value


class LabelChecks:
    """What one model asks of each example.

    Args:
        model: the model.
        name: what to call the data in errors.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.config, self.name = model, model.config, name
        self.names = [*dict.fromkeys(label_columns(model))]
        self.head = _head_of(model)
        self.classes = getattr(model.config, "num_labels", None)
        output = model.get_output_embeddings()
        self.vocabulary = None if output is None or self.head else getattr(output, "weight", None)
        self.positions = position_limit(model)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.seen: set[str] = set()  # names of labels that examples had

    def check(self, example: Any, where: str) -> bool:
        """Check an example, and return whether anything of it is labelled.

        Args:
            example: the example; anything but a mapping is passed over.
            where: what to call it, such as `example 7`.

        Returns:
            False if all its labels are -100, else True.

        Raises:
            DataError: if a label is missing or not of the head's kind, range or length, or the input too long.
        """
        if not isinstance(example, Mapping):
            return True
        ids = as_array(example["input_ids"]) if example.get("input_ids") is not None else None
        if self.positions is not None and ids is not None and ids.shape and ids.shape[-1] > self.positions:
            raise DataError(
                f"{self.name}: {where} has {ids.shape[-1]} tokens, but the model has positions for {self.positions}. "
                "Tokenize with truncation=True and that max_length, or leave the example out."
            )
        labelled = []
        for name in self.names:
            if name not in example:
                if name in self.seen:
                    raise DataError(f"{self.name}: {where} has no label ({name}), and others have. Label it, too.")
                continue
            self.seen.add(name)
            array = self._numbers(name, example[name], where)
            if array is None:
                continue
            if name in ("labels", *ALIASES):
                self._check_values(array, example, ids, where)
            labelled.append(bool(array.size == 0 or array.dtype.kind == "f" or (array != IGNORE_INDEX).any()))
        return any(labelled) or not labelled

    def _numbers(self, name: str, value: Any, where: str) -> np.ndarray | None:
        """Return labels as numbers, or None where they are of another kind (dictionaries of boxes, masks)."""
        value = numbered(self.model, self.name, name, value, where)
        return None if isinstance(value, Mapping) else as_array(value)

    def _check_values(self, labels: np.ndarray, example: Mapping[str, Any], ids: Any, where: str) -> None:
        lead = f"{self.name}: {where} has"
        if self.head in _ONE_EACH and self.classes and self.classes > 1:
            self._check_class(labels, lead)
        elif self.head == "TokenClassification":
            self._check_length(labels, ids, lead)
            self._check_range(labels, self.classes, lead)
        elif self.vocabulary is not None and labels.ndim == 0 and ids is not None:
            raise DataError(
                f"{lead} the label {labels}, one for all of it, but {type(self.model).__name__} answers for each "
                "token. Leave the column out, or (a language model) give labels=input_ids."
            )
        elif self.vocabulary is not None and labels.ndim == 1 and labels.dtype.kind != "f":
            alone = not self.encoder_decoder and not any("pixel" in name or "feature" in name for name in example)
            if alone and ids is not None and ids.ndim == 1:
                self._check_length(labels, ids, lead)
            self._check_range(labels, len(self.vocabulary), lead)

    def _check_class(self, labels: np.ndarray, lead: str) -> None:
        problem = getattr(self.config, "problem_type", None)
        if labels.size > 1 or problem in ("multi_label_classification", "regression"):
            if labels.shape[-1:] != (self.classes,):
                raise DataError(
                    f"{lead} {labels.size} labels, but the model has {self.classes} classes: give one whole number, "
                    "or (multi-label) one float for each class."
                )
            if labels.dtype.kind != "f":
                raise DataError(f"{lead} whole numbers as labels of several classes; give floats (multi-label).")
        elif labels.dtype.kind == "f":
            raise DataError(
                f"{lead} the label {labels.flat[0]}, a float, but the model chooses among {self.classes} classes. "
                "Cast labels to int; for regression take a model with num_labels=1."
            )
        else:
            self._check_range(labels, self.classes, lead)

    def _check_range(self, labels: np.ndarray, classes: int | None, lead: str) -> None:
        if labels.dtype.kind == "f":
            raise DataError(
                f"{lead} the label {labels.flat[0]}, a float, but the model chooses classes. Cast it to int."
            )
        wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= (classes or np.inf)))]
        if wrong.size:
            raise DataError(
                f"{lead} the label {wrong.flat[0]}, but the model's are 0 to {(classes or 0) - 1} (and {IGNORE_INDEX} "
                "for none). Give a model of this task, or number the labels as it does."
            )

    def _check_length(self, labels: np.ndarray, ids: Any, lead: str) -> None:
        if ids is not None and labels.shape != ids.shape:
            raise DataError(
                f"{lead} {labels.size} labels for {ids.size} tokens. Give a label to each token, {IGNORE_INDEX} to "
                "those that do not count (special tokens, further pieces of a word)."
            )


def _head_of(model: PreTrainedModel) -> str | None:
    """Return the kind of head of a Transformers class, or of one that the user's own derives from."""
    kinds = re.compile(
        rf"For({'|'.join([*_ONE_EACH, 'TokenClassification', 'QuestionAnswering', 'MultipleChoice'])})$"
    )
    found = (kinds.search(base.__name__) for base in type(model).__mro__)
    return next((match[1] for match in found if match is not None), None)


def position_limit(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model has positions for: rows of its table; None where positions are computed.

    Or where a longer text finds a place in the table: TAPAS counts anew in each cell, FSMT's grows.

    Args:
        model: the model; of an encoder-decoder, the encoder counts.

    Returns:
        The limit.
    """
    if getattr(model.config, "reset_position_index_per_cell", False):
        return None
    inner = model.get_encoder() if model.config.is_encoder_decoder else model
    limits = []
    for name, module in inner.named_modules():
        table = isinstance(module, nn.Embedding) and _TABLES.search(name) and "vision" not in name
        if table and not hasattr(module, "make_weight"):
            offset = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            limits.append(module.num_embeddings - int(offset))
    return min(limits, default=None)
