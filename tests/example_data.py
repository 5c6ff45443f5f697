"""Examples as users pass them: a torch `Dataset`, a stream, and a collator."""

import torch
from torch.utils.data import Dataset, IterableDataset


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
