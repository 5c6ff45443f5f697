"""Disjoint parts of the data, by content: an example in one part is in no other, however often it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import DataError
from .digests import Digests, combined_digest, examine, item_digests
from .loaders import check_size, dataset_size, first_examples, make_dataloader, subset

logger = logging.get_logger(__name__)


HOLDOUT_FRACTION = 0.2


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
        check_size(calibration, "calib_dataset, with max_examples")
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
        more = make_dataloader(refit_dataset, model, name="refit_dataset", max_examples=max_examples, **options)
        refit, found = _apart(more, model, parts)
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
