"""Examples as users pass them: data sets, streams, loaders and ready-made batches."""

import datasets
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler
from transformers import BatchEncoding

BATCH_SIZE = 4


class ListDataset(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class StreamDataset(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def collate(items):
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


def cut(examples):
    return [collate(examples[start : start + BATCH_SIZE]) for start in range(0, len(examples), BATCH_SIZE)]


def as_loader(examples, **options):
    return DataLoader(ListDataset(examples), collate_fn=collate, **options)


# each takes the list of examples and gives the same data in another form
EXAMPLE_KINDS = {
    "datasets.Dataset": datasets.Dataset.from_list,
    "datasets.Dataset of tensors": lambda examples: datasets.Dataset.from_list(examples).with_format("torch"),
    "datasets.IterableDataset": lambda examples: datasets.Dataset.from_list(examples).to_iterable_dataset(),
    "torch Dataset": ListDataset,
    "torch IterableDataset": StreamDataset,
    "list of examples": list,
    "tuple of examples": tuple,
    "list of examples of tensors": lambda examples: list(datasets.Dataset.from_list(examples).with_format("torch")),
}
BATCH_KINDS = {
    "DataLoader": lambda examples: as_loader(examples, batch_size=BATCH_SIZE),
    "DataLoader with a batch sampler": lambda examples: as_loader(
        examples,
        batch_sampler=torch.utils.data.BatchSampler(SequentialSampler(examples), BATCH_SIZE, drop_last=False),
    ),
    "DataLoader of an IterableDataset": lambda examples: DataLoader(
        StreamDataset(examples), batch_size=BATCH_SIZE, collate_fn=collate
    ),
    "DataLoader of ready batches": lambda examples: DataLoader(ListDataset(cut(examples)), batch_size=None),
    "list of batches": cut,
    "generator of batches": lambda examples: (batch for batch in cut(examples)),
    "list of BatchEncoding": lambda examples: [BatchEncoding(batch) for batch in cut(examples)],
}
KINDS = EXAMPLE_KINDS | BATCH_KINDS
