"""Disjoint parts of the data, by content: an example in one part is in no other, however often it is there."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import DataError
from ..fingerprint import as_array, content_digest
from .label_checks import LabelChecks
from .labels import batch_examples, label_columns
from .loaders import dataset_size, first_examples, make_dataloader, plain_examples, ready_batches, subset

logger = logging.get_logger(__name__)


HOLDOUT_FRACTION = 0.2
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


def _examined(loader: DataLoader, model: PreTrainedModel, checks: LabelChecks | None) -> tuple[Digests, list[bool]]:
    check = (lambda example, where: True) if checks is None else checks.check
    labelled: list[bool] = []
    labels = {*label_columns(model), *_SHIFTED_LABELS}
    taken = {*inspect.signature(model.forward).parameters} - labels
    dataset: Any = loader.dataset
    digests = []
    for index in range(dataset_size(loader)):
        item = dataset[index]
        if ready_batches(loader):
            rows = _rows(item)
            found = [check(row, f"row {place} of batch {index}") for place, row in enumerate(rows)]
            labelled.append(any(found) or not rows)
            digests.append(frozenset(_digest(row, taken, labels) for row in rows))
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


def split_holdout(
    loader: DataLoader,
    digests: Digests,
    seed: int,
    fraction: float = HOLDOUT_FRACTION,
    shortage: str = "verification; pass eval_dataset, or more data",
    labelled: Sequence[bool] = (),
) -> tuple[list[int], list[int]]:
    """Choose a share of the items to hold out, deterministically; what is in both parts is taken out of the first.

    Args:
        loader: a loader from `make_dataloader`.
        digests: its `item_digests`.
        seed: seed of the random choice.
        fraction: share to hold out, rounded down, but one item at least.
        shortage: what the held-out part is for, and what to do where there is too little; for the error.
        labelled: whether each item is labelled; the same share of those is held out, and one at least. Default: all.

    Returns:
        Indices of the items that stay, and of those held out.

    Raises:
        DataError: if there is too little to split.
    """
    count = dataset_size(loader)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = max(int(count * fraction), 1)
    if labelled and not all(labelled):
        marked = [index for index in order if labelled[index]]
        drawn = marked[: max(int(len(marked) * fraction), 1)]
        drawn += [index for index in order if not labelled[index]][: max(wanted - len(drawn), 0)]
        order, wanted = [*drawn, *(index for index in order if index not in set(drawn))], len(drawn)
    held_out = sorted(order[:wanted])
    seen = frozenset[str]().union(*(digests[index] for index in held_out))
    rest = [index for index in sorted(order[wanted:]) if not digests[index] & seen]
    if not rest:
        raise DataError(
            f"calib_dataset: {count} items (examples, or ready-made batches) are too few to hold some out for "
            f"{shortage}."
        )
    return rest, held_out


def without(loader: DataLoader, digests: Digests, others: Digests) -> tuple[DataLoader, Digests]:
    """Take items out of the calibration data that the held-out data has, too.

    Args:
        loader: the calibration data.
        digests: its `item_digests`.
        others: those of the held-out data.

    Returns:
        The loader of what is left, and its digests.

    Raises:
        DataError: if half of the items or more are in both.
    """
    seen = frozenset[str]().union(*others)
    kept = [index for index, item in enumerate(digests) if not item & seen]
    common = len(digests) - len(kept)
    if 2 * common >= len(digests):
        raise DataError(
            f"calib_dataset and eval_dataset overlap: {common} of {len(digests)} calibration items are in both. A "
            "model must be judged on examples that had no part in making it; pass other data, or no eval_dataset."
        )
    if common:
        logger.warning("%d calibration items are in eval_dataset, too; they are left out of the calibration.", common)
        return subset(loader, kept), [digests[index] for index in kept]
    return loader, digests


@dataclass(frozen=True)
class DataSplits:
    """Disjoint parts of the data.

    Attributes:
        calibration: for the statistics and the refit.
        selection: for choosing by measurement (is the refit kept, which point of the path); None where nothing is.
        held_out: for the certificate; read once a compressed model, and for nothing else.
        fingerprints: SHA-256 of the examples of each part, and of the whole `calib_dataset`, whatever their order.
        refit: more data for the refit, which need no labels; None for none.
    """

    calibration: DataLoader
    selection: DataLoader | None
    held_out: DataLoader
    fingerprints: dict[str, str]
    refit: DataLoader | None = None


def split_data(
    model: PreTrainedModel,
    calib_dataset: Any,
    eval_dataset: Any,
    *,
    refit_dataset: Any = None,
    batch_size: int,
    seed: int,
    selection_fraction: float,
    selection_needed: bool = False,
    fewest_selected: int = 1,
    max_examples: int | None = None,
    data_collator: Any = None,
    processing_class: Any = None,
) -> DataSplits:
    """Make disjoint loaders: a fifth is held out where no `eval_dataset` is given, then the selection split if used.

    Args:
        model: the model.
        calib_dataset: what the user passed.
        eval_dataset: what the user passed, or None.
        refit_dataset: what the user passed, or None; what the other parts have is left out.
        batch_size: examples per batch, where the data has none of its own.
        seed: seed of the splits.
        selection_fraction: share of the calibration examples kept apart for choosing by measurement; 0 for none.
        selection_needed: whether the choice cannot do without them.
        fewest_selected: examples that a selection split is worth having with; unless it is needed, one that would have
            fewer is not made, and all examples calibrate.
        max_examples: examples to take from `calib_dataset`, and from an `eval_dataset` that is a stream; None for all.
        data_collator: collator for examples.
        processing_class: tokenizer or processor.

    Returns:
        The loaders.
    """
    options = {"batch_size": batch_size, "processing_class": processing_class, "data_collator": data_collator}
    calibration = make_dataloader(calib_dataset, model, max_examples=max_examples, **options)
    if max_examples is not None:
        calibration = first_examples(calibration, max_examples)
    digests, labelled = examine(calibration, model, "calib_dataset")
    fingerprints = {"calib_dataset": combined_digest(digests)}  # by which `verify` knows it again
    if eval_dataset is None:
        kept, apart = split_holdout(calibration, digests, seed, labelled=labelled)
        held_out, held_out_digests = subset(calibration, apart), [digests[index] for index in apart]
        calibration = subset(calibration, kept)
        digests, labelled = [digests[index] for index in kept], [labelled[index] for index in kept]
    else:
        held_out = make_dataloader(eval_dataset, model, name="eval_dataset", max_examples=max_examples, **options)
        held_out_digests, _ = examine(held_out, model, "eval_dataset")
        seen = frozenset[str]().union(*held_out_digests)
        labelled = [flag for flag, item in zip(labelled, digests, strict=True) if not item & seen]
        calibration, digests = without(calibration, digests, held_out_digests)
    fingerprints["held_out"] = combined_digest(held_out_digests)
    parts = [held_out_digests]
    selection, most = None, selection_fraction * sum(map(len, digests))
    if selection_fraction and (selection_needed or most >= fewest_selected):
        shortage = "choosing by measurement; pass more (and smaller) items"
        if not selection_needed:
            shortage += ", or selection_fraction=0"
        kept, chosen = split_holdout(calibration, digests, seed + 1, selection_fraction, shortage, labelled)
        fingerprints["selection"] = combined_digest(digests[index] for index in chosen)
        selection = subset(calibration, chosen)
        parts.append([digests[index] for index in chosen])
        calibration, digests = subset(calibration, kept), [digests[index] for index in kept]
    fingerprints["calibration"] = combined_digest(digests)
    parts.append(digests)
    refit = None
    if refit_dataset is not None:
        refit, found = _apart(make_dataloader(refit_dataset, model, name="refit_dataset", **options), model, parts)
        fingerprints["refit"] = combined_digest(found)
    return DataSplits(calibration, selection, held_out, fingerprints, refit)


def _apart(loader: DataLoader, model: PreTrainedModel, parts: Sequence[Digests]) -> tuple[DataLoader, Digests]:
    """Return a loader of the items that no other part has, and their digests."""
    digests, seen = item_digests(loader, model), frozenset[str]().union(*(item for part in parts for item in part))
    kept = [index for index, item in enumerate(digests) if not item & seen]
    if not kept:
        raise DataError("refit_dataset: all of its items are in calib_dataset or eval_dataset, too; pass others.")
    if len(kept) < len(digests):
        logger.warning(
            "%d of %d items of refit_dataset are in calib_dataset or eval_dataset, too; they are left out of it.",
            len(digests) - len(kept),
            len(digests),
        )
    return subset(loader, kept), [digests[index] for index in kept]
