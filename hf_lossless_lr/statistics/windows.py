"""Statistics of more layers than memory holds: windows of layers, with a pass over the data for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .collect import check_called, collect_statistics
from .records import CalibrationStatistics, Key
from .shelf import Shelf, ShelvedStatistics


def collect_in_windows(
    model: PreTrainedModel,
    targets: Mapping[str, nn.Module],
    loader: DataLoader,
    accelerator: Accelerator,
    windows: Sequence[Key],
    shelf: Shelf,
    recompute: bool = False,
) -> CalibrationStatistics:
    """Collect `A` and `B`, window by window, and keep them on a shelf; a window that is there is not repeated.

    Args:
        model: the dense model, on `accelerator.device`.
        targets: layers to observe, by name.
        loader: batches with labels.
        accelerator: made with `even_batches=False`; its main process writes, into a folder that all of them see.
        windows: names of the layers of each pass.
        shelf: where statistics are kept.
        recompute: as in `collect_statistics`.

    Returns:
        The statistics; those of a layer are read when asked for.

    Raises:
        DataError: if a batch has no labels, the model no loss, or no batch a labelled unit.
        NumericalError: if a loss or a gradient is not finite.
        TargetError: if no target takes part in the forward pass.
    """
    layers = ShelvedStatistics(shelf, accelerator.device)
    parts = []
    for names in windows:
        key = f"pass for {' '.join(names)}"  # other limits of memory have other windows
        if not _is_complete(shelf, key):
            window = {name: targets[name] for name in names}
            beside = {name: layer for name, layer in targets.items() if name not in window}
            found = collect_statistics(
                model, window, loader, accelerator, any_called=False, recompute=recompute, beside=beside
            )
            owners = layers.put(found, accelerator.is_main_process)
            if accelerator.is_main_process:
                shelf.put(key, {}, {**_about(found), "layers": owners})
            del found
            accelerator.wait_for_everyone()
        about = shelf.get(key)[1]
        layers.add(about.pop("layers"))
        parts.append(about)
    whole = CalibrationStatistics(
        layers,
        **{name: parts[0][name] for name in ("loss", "examples", "units", "data_fingerprint")},
        groups=tuple(map(tuple, parts[0]["groups"])),  # each pass notes all of them
        uncalled=tuple(name for part in parts for name in part["uncalled"]),
    )
    check_called(whole)
    return whole


def _is_complete(shelf: Shelf, key: str) -> bool:
    """Return whether a pass is on a shelf, with all that it found: a damaged file may have been removed."""
    if key not in shelf:
        return False
    owners = shelf.get(key)[1]["layers"]
    return all(name in shelf and f"inputs of {owner}" in shelf for name, owner in owners.items())


def _about(statistics: CalibrationStatistics) -> dict[str, Any]:
    """Return all but the layers, for JSON."""
    return {name: value for name, value in vars(statistics).items() if name != "layers"}
