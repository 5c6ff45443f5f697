"""From what the user passes (a dataset, a loader, batches) to a deterministic `DataLoader`, as `Trainer` does."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset
from transformers import PreTrainedModel

from ..errors import DataError
from ..fingerprint import batch_fingerprint, content_digest
from .collators import default_collator
from .kinds import are_examples, taken_by
from .label_checks import LabelChecks, numbered
from .labels import batch_examples, label_columns

MIN_EXAMPLES = 8
UNJOINED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)  # what collators raise
STREAM_LIMIT = 32768
"""Examples after which a stream is taken to have no end, unless `max_examples` says where to stop."""


def make_dataloader(
    data: Any,
    model: PreTrainedModel,
    *,
    batch_size: int,
    data_collator: Any = None,
    processing_class: Any = None,
    name: str = "calib_dataset",
    max_examples: int | None = None,
) -> DataLoader:
    """Build a loader that yields the same batches in the same order each time, and in each process.

    A collator may draw random numbers, such as the masks of a language model: it gets a seed that its examples
    determine, in the global generators of torch (on the CPU), NumPy and Python, which are then as they were. Numbers
    from elsewhere (a generator of the collator's own, a random transform of the dataset) cannot be repeated; they are
    refused if the first batch shows them.

    Args:
        data: a `datasets.Dataset` or torch `Dataset` of examples, a `DataLoader` (the examples that its sampler draws,
            each once and in the order of its dataset, with its collator and batch size), or a finite iterable of
            batches (mappings of tensors).
        model: the model; columns that its forward does not take are dropped, as `Trainer` does.
        batch_size: examples per batch, where the data has none of its own.
        data_collator: collator for examples; default as in `Trainer`.
        processing_class: tokenizer or processor, for the default collator.
        name: what to call the data in errors.
        max_examples: examples to take from a stream (an `IterableDataset`, a generator); None for all.

    Returns:
        A `DataLoader` without shuffling.

    Raises:
        DataError: if the data is empty, too small, of an unknown kind, different each time, or has no column that the
            model takes.
    """
    if isinstance(data, DataLoader):
        with _seeded(""):  # its sampler draws the same in each process
            loader = _of_loader(data, model, name, max_examples)
    elif isinstance(data, (Mapping, str)) or not isinstance(data, (Dataset, Iterable)):
        raise DataError(
            f"{name}: expected a Dataset, a DataLoader or an iterable of batches, got {type(data).__name__}."
            f"{' Choose a split of it.' if isinstance(data, Mapping) else ''}"
        )
    else:
        collate = data_collator if data_collator is not None else default_collator(processing_class, model)
        data, examples = _told_apart(data, model, collate, name, max_examples)
        if examples:
            loader = _loader(_Columns(data, model, name, _is_plain(collate)), batch_size, _repeatable(collate))
        else:
            loader = _batches_loader(list(cast(Iterable[Any], data)), model, name)
    check_size(loader, name)
    _check_repeats(loader, model, name)
    return loader


def dataset_size(loader: DataLoader) -> int:
    """Return the number of items (examples, or ready-made batches) behind a loader from `make_dataloader`."""
    return len(cast(Sized, loader.dataset))


def ready_batches(loader: DataLoader) -> bool:
    """Return whether the items behind a loader from `make_dataloader` are ready-made batches rather than examples."""
    return loader.collate_fn is _single


def plain_examples(loader: DataLoader) -> bool:
    """Return whether the items behind a loader are examples whose labels the collator takes as they are."""
    return getattr(loader.collate_fn, "plain", False)


def first_examples(loader: DataLoader, count: int) -> DataLoader:
    """Return a loader of the first examples, rounded down to whole ready-made batches (one at least)."""
    if not ready_batches(loader):
        return subset(loader, range(min(count, dataset_size(loader))))
    sizes = np.cumsum([batch_examples(batch) for batch in loader])
    return subset(loader, range(max(1, int((sizes <= count).sum()))))


def subset(loader: DataLoader, indices: Sequence[int]) -> DataLoader:
    """Return a loader of some of the items, in the given order."""
    return _loader(Subset(loader.dataset, indices), loader.batch_size, loader.collate_fn)


def first_batch(loader: DataLoader) -> DataLoader:
    """Return a loader of the first batch alone."""
    return subset(loader, range(dataset_size(loader))[: loader.batch_size or 1])


def _told_apart(data: Any, model: PreTrainedModel, collate: Any, name: str, most: int | None) -> tuple[Any, bool]:
    """Return the data, read where they are a stream, and whether they are examples rather than whole batches."""
    if isinstance(data, IterableDataset):
        return _taken(data, name, most, batches=False), True
    if isinstance(data, Dataset) or hasattr(data, "column_names"):
        return data, True
    if isinstance(data, Sequence):
        return data, _tried(list(islice(data, 2)), model, collate)
    stream = iter(data)
    head = list(islice(stream, 2))
    examples = _tried(head, model, collate)
    return _taken(chain(head, stream), name, most, batches=not examples), examples


def _tried(items: Sequence[Any], model: PreTrainedModel, collate: Any) -> bool:
    return len(items) > 0 and isinstance(items[0], Mapping) and are_examples(items, model, collate)


def _taken(stream: Iterable[Any], name: str, most: int | None, batches: bool) -> list[Any]:
    """Return what a stream gives: all of it, or as many examples as asked for."""
    items: list[Any] = []
    count = 0
    for item in stream:
        count += max(1, batch_examples(item)) if batches and isinstance(item, Mapping) else 1
        if most is not None and count > most and items:
            break
        items.append(item)
        if most is None and count > STREAM_LIMIT:
            raise DataError(
                f"{name}: gives more than {STREAM_LIMIT:,} examples and may have no end. Set max_examples to the "
                "number to take; a few hundred to a few thousand are enough."
            )
    return items


def _of_loader(data: DataLoader, model: PreTrainedModel, name: str, most: int | None) -> DataLoader:
    if isinstance(data.dataset, IterableDataset) or data.batch_size is None:
        return _batches_loader(_taken(data, name, most, batches=True), model, name)
    return _loader(Subset(data.dataset, _drawn(data.sampler)), data.batch_size, _repeatable(data.collate_fn))


def _drawn(sampler: Any) -> Sequence[int]:
    """Return the indices that a sampler draws, in ascending order; of all processes, where it gives each its share."""
    if isinstance(sampler, DistributedSampler):
        return range(len(cast(Sized, sampler.dataset)))
    return sorted(set(sampler))


class _Columns(Dataset):
    """Examples of a dataset, reduced to the columns that the model takes."""

    def __init__(self, data: Any, model: PreTrainedModel, name: str, plain: bool) -> None:
        self.data, self.model, self.name, self.plain = data, model, name, plain
        self.labels = label_columns(model)
        self.used = {*inspect.signature(model.forward).parameters, *self.labels}
        if len(data) and isinstance(data[0], Mapping) and not {*self._used(data[0])}.difference(self.labels):
            raise DataError(
                f"{name}: has the columns {', '.join(map(str, data[0]))}, none of which {type(model).__name__} takes. "
                "Tokenize the text (or process the images) first, for instance with `dataset.map(tokenize)`."
            )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        example = self.data[index]
        if not isinstance(example, Mapping):
            return example
        where = f"example {index}"
        labels = {
            column: numbered(self.model, self.name, column, example[column], where, self.plain)
            for column in example
            if column in self.labels
        }
        return self._used({**example, **labels})

    def _used(self, example: Mapping[str, Any]) -> dict[str, Any]:
        return {column: value for column, value in example.items() if column in self.used and value is not None}


def _is_plain(collate: Any) -> bool:
    """Whether a collator, ours or of Transformers, takes labels as they are; another may make them of anything."""
    module = getattr(collate, "__module__", type(collate).__module__) or ""
    return module.split(".")[0] in ("transformers", __name__.split(".")[0])


def _repeatable(collate: Any) -> Any:
    """Return a collator that draws the same random numbers for the same examples each time."""

    def collate_again(items: Any) -> Any:
        with _seeded("".join(map(content_digest, items))):
            try:
                return collate(items)
            except UNJOINED as error:
                if not again.tried:  # of which data they are will be said
                    raise
                raise DataError(_unjoined(error)) from error

    again: Any = collate_again
    again.plain, again.tried = getattr(collate, "plain", _is_plain(collate)), False
    return again


def _unjoined(error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"the examples cannot be joined into a batch: {type(error).__name__}: {reason}. Give them one length (pass "
        "processing_class=tokenizer, which has to have a pad_token), or a data_collator."
    )


@contextmanager
def _seeded(content: str) -> Iterator[None]:
    """Seed the global generators by some content; they are as they were afterwards."""
    seed = int(content_digest(content)[:8], 16)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _loader(dataset: Any, batch_size: int | None, collate_fn: Any) -> DataLoader:
    generator = torch.Generator()  # else each pass draws from the global one
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, collate_fn=collate_fn, generator=generator)


def _single(items: list[Any]) -> Any:
    return items[0]


def _batches_loader(batches: list[Any], model: PreTrainedModel, name: str) -> DataLoader:
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not any(isinstance(value, torch.Tensor) for value in batch.values()):
            raise DataError(
                f"{name}: batch {index} is a {type(batch).__name__}; each batch must map forward's argument names to "
                "tensors."
            )
    return _loader([taken_by(model, batch) for batch in batches], 1, _single)


def check_size(loader: DataLoader, name: str) -> None:
    """Refuse data of too few examples.

    Args:
        loader: a loader from `make_dataloader`.
        name: what to call the data in errors.

    Raises:
        DataError: if there are too few, or none.
    """
    count = dataset_size(loader)
    if count and ready_batches(loader):
        count = sum(batch_examples(batch) for batch in loader)
    if count == 0:
        raise DataError(f"{name}: is empty.")
    if count < MIN_EXAMPLES:
        raise DataError(f"{name}: has {count} examples; at least {MIN_EXAMPLES} are needed.")


def _check_repeats(loader: DataLoader, model: PreTrainedModel, name: str) -> None:
    if ready_batches(loader):
        return
    try:
        first, again = next(iter(loader)), next(iter(loader))
    except UNJOINED as error:
        example = loader.dataset[0] if hasattr(loader.dataset, "__getitem__") else None
        if isinstance(example, (tuple, list)):
            raise DataError(
                f"{name}: its examples are {type(example).__name__}s without names. Pass a data_collator that names "
                "forward's arguments, such as lambda rows: dict(zip(('input_ids', 'labels'), map(torch.stack, "
                "zip(*rows))))."
            ) from error
        if plain_examples(loader):  # a label may be the reason
            checks, count = LabelChecks(model, name), min(dataset_size(loader), loader.batch_size or 1)
            for index in range(count):
                checks.check(loader.dataset[index], f"example {index}")
        raise DataError(f"{name}: {_unjoined(error)}") from error
    vars(loader.collate_fn)["tried"] = True
    if isinstance(first, Mapping) and batch_fingerprint(first) != batch_fingerprint(again):
        raise DataError(
            f"{name}: its first batch is another one each time, so that no two models can be compared on it. Random "
            "numbers come from a generator of the collator's own (leave out its seed) or from a transform of the "
            "dataset (use the one for evaluation), or pass ready-made batches."
        )
