r"""Statistics of experts that the data hardly reach: filled up with those of the layers beside them in other experts.

With `n` rows of its own, `m` features, and per row the moments `A` of its own and `P` of all experts together, a layer
gets

$$A' = \frac{n A + (m - n) P}{m} \quad\text{where } n < m,$$

as if it had got the missing rows from the others; likewise for the gradients of its outputs. What counts for the loss
is how many rows there are: an expert that got none is taken to get one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from .records import CalibrationStatistics, Key, LayerStatistics


class _Pool(NamedTuple):
    """Moments of all experts together, per row.

    Attributes:
        inputs: of inputs.
        grads: of gradients of outputs, per labelled unit.
        some: statistics of one of them, for shapes.
    """

    inputs: torch.Tensor
    grads: torch.Tensor
    some: LayerStatistics


POOLS = 2  # that are kept: the layers of experts are asked for in turns, those of the next module afterwards


class PooledStatistics(Mapping[str, LayerStatistics]):
    """Statistics by layer, those with few rows filled up when they are asked for.

    Args:
        layers: the statistics of all layers that were called.
        groups: names of layers that stand beside one another.
    """

    def __init__(self, layers: Mapping[str, LayerStatistics], groups: Sequence[Key]) -> None:
        self._layers = layers
        self._groups = [group for group in groups if any(name in layers for name in group)]
        self._group_of = {name: number for number, group in enumerate(self._groups) for name in group}
        self._pools: dict[int, _Pool] = {}  # of the last groups that were asked for

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the layers."""
        yield from self._layers
        yield from (name for name in self._group_of if name not in self._layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        """Return whether something is known of a layer."""
        return name in self._layers or name in self._group_of

    def __getitem__(self, name: str) -> LayerStatistics:
        """Return the statistics of a layer."""
        group = self._group_of.get(name)
        if group is None:
            return self._layers[name]
        own = self._layers.get(name)
        if own is not None and _has_enough(own):
            return own
        if group not in self._pools:
            while len(self._pools) >= POOLS:
                del self._pools[next(iter(self._pools))]  # the earliest
            self._pools[group] = self._pooled(self._groups[group])
        return _filled(own, self._pools[group])

    def _pooled(self, group: Key) -> _Pool:
        first, *rest = (name for name in group if name in self._layers)  # groups without any are left out
        some = self._layers[first]
        inputs, grads, rows = some.tokens * some.input_covariance, some.grad_covariance, some.tokens
        for name in rest:
            layer = self._layers[name]
            inputs = inputs + layer.tokens * layer.input_covariance
            grads = grads + layer.grad_covariance
            rows += layer.tokens
        return _Pool(inputs / rows, grads / rows, some)


def _has_enough(layer: LayerStatistics) -> bool:
    return layer.tokens >= max(layer.input_covariance.shape[-1], layer.grad_covariance.shape[-1])


def _filled(own: LayerStatistics | None, pool: _Pool) -> LayerStatistics:
    if own is None:
        gradient = None if pool.some.weight_grad is None else torch.zeros_like(pool.some.weight_grad)
        return LayerStatistics(gradient, pool.inputs, pool.grads, 1, pool.some.units)
    return replace(
        own,
        input_covariance=_mixed(own.input_covariance, pool.inputs, own.tokens),
        grad_covariance=own.tokens * _mixed(own.grad_covariance / own.tokens, pool.grads, own.tokens),
    )


def _mixed(own: torch.Tensor, others: torch.Tensor, rows: int) -> torch.Tensor:
    """Return moments per row, of own rows and of as many others as are missing to one for each feature."""
    wanted = max(rows, own.shape[-1])
    return own * (rows / wanted) + others * (1 - rows / wanted)


def with_pooled(statistics: CalibrationStatistics, groups: Sequence[Key]) -> CalibrationStatistics:
    """Fill up the statistics of layers with few rows from those beside them.

    Args:
        statistics: what was collected.
        groups: names of layers that stand beside one another, in the experts of a module.

    Returns:
        The statistics, also of layers that no forward pass called, if one beside them was.
    """
    if not groups:
        return statistics
    layers = PooledStatistics(statistics.layers, groups)
    return replace(
        statistics, layers=layers, uncalled=tuple(name for name in statistics.uncalled if name not in layers)
    )
