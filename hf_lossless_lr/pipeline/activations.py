"""What a forward pass holds while it waits: the memory of a refit, whose batches all wait at the same layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..data import DataSplits, first_batch, run_watching
from ..layers import evaluating

STREAMS = 2  # of a batch: through the dense and through the compressed model


class Results(TorchDispatchMode):
    """Watches the results of all operations, and knows which of them are still held, by whomever.

    Attributes:
        most: bytes of the results that were held at most, without views of the weights.
    """

    supports_higher_order_operators = True  # as flex attention

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.others = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}  # by where a storage lies
        self.most = self.bound = 0  # a bound of what is held, which is cheaper than to count it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                place = storage.data_ptr()
                known = self.seen.get(place)
                if place not in self.others and (known is None or known[0].expired()):
                    self.seen[place] = StorageWeakRef(storage), storage.nbytes()
                    self.bound += storage.nbytes()
        if self.bound > self.most:
            self.most = max(self.most, self.held())
        return result

    def held(self) -> int:
        """Return the bytes of the results that are held now, without views of the weights."""
        self.seen = {place: found for place, found in self.seen.items() if not found[0].expired()}
        self.bound = sum(size for _, size in self.seen.values())
        return self.bound


@torch.no_grad()
def bytes_waiting(model: PreTrainedModel, targets: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """Return the bytes that a forward pass holds at most where it reaches one of the layers.

    Args:
        model: the dense model.
        targets: the layers.
        batch: keyword arguments of its forward, on its device.

    Returns:
        The bytes, with those of the layer's input and without those of the weights and of the batch.
    """
    results, most = Results(model), 0

    def note(name: str, layer: nn.Module, x: torch.Tensor) -> None:
        nonlocal most
        most = max(most, results.held())

    with evaluating(model), results:
        run_watching(model, targets, batch, note)
    return most


def refit_memory(
    model: PreTrainedModel, targets: Mapping[str, nn.Module], parts: DataSplits, accelerator: Accelerator
) -> tuple[int, int]:
    """Return what a refit holds of the data.

    Args:
        model: the dense model, on the accelerator's device.
        targets: the layers.
        parts: the data.
        accelerator: the processes and the device.

    Returns:
        The bytes of a batch, taken as those of the first one, and the number of batches of a process.
    """
    loaders = [loader for loader in (parts.calibration, parts.refit) if loader is not None]
    held = 0
    for batch in accelerator.prepare(first_batch(parts.calibration)):
        own = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
        held = own + STREAMS * bytes_waiting(model, targets, batch)
    return held, -(-sum(map(len, loaders)) // accelerator.num_processes)
