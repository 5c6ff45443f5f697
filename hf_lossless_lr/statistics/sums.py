"""What is summed over batches and processes, and the means of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..layers import weight_matrices
from .records import Key, LayerStatistics
from .rows import gram, precision_of


class Sums:
    """Sums of one process over its batches.

    Args:
        targets: layers whose statistics are summed, by name.
        weight_grads: whether gradients of their weights are.

    Attributes:
        output_grads: moments of the gradients of outputs, of each layer.
        weight_grads: gradients of the weight of each layer, if asked for.
    """

    def __init__(self, targets: Mapping[str, nn.Module], weight_grads: bool) -> None:
        self.targets = targets
        self.output_grads: dict[str, torch.Tensor] = {}
        self.weight_grads: dict[str, torch.Tensor] = {}
        self._inputs: dict[Key, torch.Tensor] = {}  # of the layers that share one
        self._rows: dict[Key, int] = {}
        for name, module in targets.items():
            matrices = weight_matrices(module)
            groups, out, _ = matrices.shape
            self.output_grads[name] = matrices.new_zeros((groups, out, out), dtype=precision_of(out))
            if weight_grads:
                self.weight_grads[name] = torch.zeros_like(matrices, dtype=torch.float64)

    def add_inputs(self, key: Key, rows: torch.Tensor) -> None:
        """Add the second moments of an input.

        Args:
            key: the layers that share it.
            rows: its rows.  # shape: (groups, rows, in)
        """
        product = gram(rows)
        if key in self._inputs:
            self._inputs[key] += product
        else:
            self._inputs[key] = product.to(precision_of(product.shape[-1]))
        self._rows[key] = self._rows.get(key, 0) + rows.shape[-2]

    def reduce(self, accelerator: Accelerator, known: Mapping[str, nn.Module]) -> None:
        """Sum over processes; a process that never saw some grouping of inputs contributes zeros.

        Args:
            accelerator: the processes.
            known: all layers that keys may name.
        """
        if accelerator.num_processes == 1:
            return
        for key in sorted(set(gather_object(list(self._inputs)))):
            if key not in self._inputs:
                weight = weight_matrices(known[key[0]])
                groups, _, size = weight.shape
                self._inputs[key] = weight.new_zeros((groups, size, size), dtype=precision_of(size))
            count = torch.tensor(self._rows.get(key, 0), device=accelerator.device)
            self._inputs[key] = accelerator.reduce(self._inputs[key], "sum")
            self._rows[key] = int(accelerator.reduce(count, "sum"))
        for sums in (self.output_grads, self.weight_grads):
            for name in sums:
                sums[name] = accelerator.reduce(sums[name], "sum")

    def layer_statistics(self, units: int) -> dict[str, LayerStatistics]:
        """Return the means of what was summed, for each target that was called; they take the place of the sums."""
        keys = {name: [key for key in self._inputs if name in key] for name in self.targets}
        tokens = {name: sum(map(self._rows.__getitem__, found)) for name, found in keys.items()}
        mixed = {  # of layers with several inputs, before the sums become means in their places
            name: torch.stack([self._inputs[key] for key in found]).sum(0) / tokens[name]
            for name, found in keys.items()
            if len(found) > 1
        }
        for key, total in self._inputs.items():
            total /= self._rows[key]
        result = {}
        for name, found in keys.items():
            if not found:  # a branch that the data do not take
                continue
            covariance = mixed[name] if name in mixed else self._inputs[found[0]]
            gradients = self.weight_grads[name].div_(units) if name in self.weight_grads else None
            moments = self.output_grads[name].div_(units)
            result[name] = LayerStatistics(gradients, covariance, moments, tokens[name], units)
        return result
