"""Layers that a refit has finished, on a shelf: after an interruption they are not fitted again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..formats import FORMATS, Grid
from ..layers import format_of, grids_in, restore_grids
from ..statistics import Shelf


class RefittedLayers:
    """The layers of one refit, which are written as they are finished.

    Args:
        shelf: where they are kept.
        refit: what tells this refit from others: what is fitted, and to which data.
        names: the layers.
    """

    def __init__(self, shelf: Shelf, refit: str, names: Iterable[str]) -> None:
        self._shelf, self._refit = shelf, refit
        self._found = {name for name in names if self._key(name) in shelf}  # now, for all processes alike

    def _key(self, name: str) -> str:
        return f"refit {self._refit} of {name}"

    def __contains__(self, name: str) -> bool:
        """Return whether a layer was finished before this run."""
        return name in self._found

    @torch.no_grad()
    def take(self, name: str, layer: Any) -> None:
        """Put the numbers of a finished layer into a layer."""
        tensors, about = self._shelf.get(self._key(name))
        state = {key.removeprefix("state "): value for key, value in tensors.items() if key.startswith("state ")}
        layer.load_state_dict(state)
        device = next(iter(layer.state_dict().values())).device
        grids = {
            module: Grid(FORMATS[kind], tensors[f"scale {module}"].to(device), tensors[f"zero {module}"].to(device))
            for module, kind in about["grids"].items()
        }
        restore_grids(layer, grids)

    def put(self, name: str, layer: Any) -> None:
        """Write a layer that is finished."""
        grids = grids_in(layer)
        tensors = {f"state {key}": value for key, value in layer.state_dict().items()}
        tensors |= {f"scale {module}": grid.scale for module, grid in grids.items()}
        tensors |= {f"zero {module}": grid.zero for module, grid in grids.items()}
        self._shelf.put(self._key(name), tensors, {"grids": {m: format_of(layer.get_submodule(m)) for m in grids}})
