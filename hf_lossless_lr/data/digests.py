"""Digests of examples, by which a copy is known: of their inputs, whatever their labels, padding and batch."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..errors import DataError
from ..fingerprint import as_array, content_digest
from .label_checks import LabelChecks
from .labels import batch_examples, label_columns
from .loaders import dataset_size, plain_examples, ready_batches

_SHIFTED_LABELS = ("decoder_input_ids", "decoder_attention_mask")  # as a collator adds them

Digests = list[frozenset[str]]


def item_digests(loader: DataLoader, model: PreTrainedModel) -> Digests:
    """Return the digests of the inputs behind a loader, as `examine` does, without checking labels."""
    return _examined(loader, model, None)[0]


def examine(loader: DataLoader, model: PreTrainedModel, name: str) -> tuple[Digests, list[bool]]:
    """Read every item behind a loader: check its labels, and digest its inputs.

    There is a digest for each item, or for each row of a ready-made batch. Labels do not count (the same text with
    another label is the same example), nor do padding, attention masks, and columns that the model does not take, such
    as a running number.

    Args:
        loader: a loader from `make_dataloader`.
        model: the model whose data it is.
        name: what to call the data in errors.

    Returns:
        The digests of each item, and whether it is labelled.

    Raises:
        DataError: if a label is not such as the model takes, or nothing is labelled.
    """
    if not ready_batches(loader):
        first = next(iter(loader))
        if not isinstance(first, Mapping):
            raise DataError(
                f"{name}: its batches are {type(first).__name__}s without names, as of a TensorDataset. Pass a "
                "collator that names forward's arguments, such as collate_fn=lambda rows: dict(zip(('input_ids', "
                "'labels'), map(torch.stack, zip(*rows))))."
            )
    digests, labelled = _examined(loader, model, LabelChecks(model, name))
    if not any(labelled):
        raise DataError(f"{name}: no example has a label: every label is -100.")
    return digests, labelled


def example_digests(batch: Mapping[str, Any], model: PreTrainedModel) -> list[str]:
    """Return the digest of each row of a batch, as `examine` does.

    Args:
        batch: keyword arguments of the model's forward.
        model: the model.

    Returns:
        64 hexadecimal digits for each example.
    """
    taken, labels = _columns(model)
    return [_digest(row, taken, labels) for row in _rows(batch)]


def _columns(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Return the columns that are inputs of a model, and those that are labels."""
    labels = {*label_columns(model), *_SHIFTED_LABELS}
    return {*inspect.signature(model.forward).parameters} - labels, labels


def _examined(loader: DataLoader, model: PreTrainedModel, checks: LabelChecks | None) -> tuple[Digests, list[bool]]:
    check = (lambda example, where: True) if checks is None else checks.check
    labelled: list[bool] = []
    taken, labels = _columns(model)
    dataset: Any = loader.dataset
    digests = []
    for index in range(dataset_size(loader)):
        item = dataset[index]
        if ready_batches(loader):
            rows = _rows(item)
            found = [check(row, f"row {place} of batch {index}") for place, row in enumerate(rows)]
            labelled.append(any(found) or not rows)
            packed = _packed(item, rows, taken)
            digests.append(frozenset(_digest(row, taken, labels) + packed for row in rows))
        else:
            labelled.append(check(item, f"example {index}") if plain_examples(loader) else True)
            digests.append(frozenset([_digest(item, taken, labels)]))
    if checks is not None and not ready_batches(loader) and not plain_examples(loader):
        labelled = _check_joined(loader, checks)
    return digests, labelled


def _check_joined(loader: DataLoader, checks: LabelChecks) -> list[bool]:
    """Check examples as their collator gives them, and return which are labelled: all, where it joins others."""
    found: list[bool] = []
    for batch in loader:
        found += [checks.check(row, f"example {len(found) + place}") for place, row in enumerate(_rows(batch))]
    return found if len(found) == dataset_size(loader) else [True] * dataset_size(loader)


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    count = batch_examples(batch)
    columns = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim and len(v) == count}
    return [{name: value[index] for name, value in columns.items()} for index in range(count)]


def _packed(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], taken: set[str]) -> str:
    """Return a digest of the inputs of all rows in a row, such as the patches of their pictures; or nothing."""
    tensors = {name: value for name, value in batch.items() if name in taken and isinstance(value, torch.Tensor)}
    inputs = {n: v for n, v in tensors.items() if v.ndim and len(v) > len(rows) and v.is_floating_point()}
    return content_digest(inputs) if inputs else ""


def _digest(example: Any, taken: set[str], labels: set[str]) -> str:
    if not isinstance(example, Mapping):
        return content_digest(example)
    inputs = {name: value for name, value in example.items() if name in taken}
    if not inputs:  # its collator makes inputs of what else is there
        inputs = {name: value for name, value in example.items() if name not in labels}
    mask = inputs.pop("attention_mask", None)
    if mask is not None:
        inputs = {name: _without_padding(value, mask) for name, value in inputs.items()}
    return content_digest(inputs or example)


def _without_padding(value: Any, mask: Any) -> Any:
    """Return what the mask keeps, row by row (those of a multiple choice); a value of another shape as it is."""
    array, kept = as_array(value), as_array(mask)
    if kept is not None and kept.ndim == 1:
        return array[kept.astype(bool)] if array is not None and array.shape == kept.shape else value
    rows = value if array is None else array
    has_rows = rows.ndim > 0 if isinstance(rows, np.ndarray) else isinstance(rows, (list, tuple))
    if not has_rows or len(rows) != len(mask):
        return value
    return [_without_padding(row, row_mask) for row, row_mask in zip(rows, mask, strict=True)]


def combined_digest(digests: Iterable[frozenset[str]]) -> str:
    """Return one fingerprint of all examples, whatever their order.

    Args:
        digests: from `item_digests`.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256("".join(sorted(digest for item in digests for digest in item)).encode()).hexdigest()
