"""What a forward pass holds while it waits: the memory of a refit, whose batches all wait at the same layer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..data import DataSplits, first_batch, run_watching
from ..layers import evaluating

STREAMS = 2  # of a batch: through the dense and through the compressed model


class Results(TorchDispatchMode):
    """Watches the results of all operations, and knows which of them are still held."""

    supports_higher_order_operators = True  # as flex attention

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.others = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self.seen: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result

    def held(self) -> int:
        """Return the bytes of the results that are held now, without views of the weights."""
        self.seen = [reference for reference in self.seen if reference() is not None]
        storages = [tensor.untyped_storage() for reference in self.seen if (tensor := reference()) is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in self.others)


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
