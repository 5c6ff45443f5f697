"""Statistics and factors that do not fit into memory: a folder with a file for each key, read again when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..files import replacing
from ..fingerprint import tensors_fingerprint
from .records import CalibrationStatistics, LayerStatistics

Value = TypeVar("Value")

SLABS = 8  # of the rows of a symmetric matrix: 9/16 of it are stored


class Shelf:
    """A folder of safetensors files, each written atomically and checked when this process reads it first.

    Args:
        folder: the folder; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._checked: set[str] = set()

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Return whether a key has a file; it is complete, then."""
        return self.path(key).exists()

    def put(self, key: str, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        """Write the file of a key.

        Args:
            key: the key.
            tensors: tensors by name.
            about: what JSON can hold.

        Raises:
            OSError: if the disk has no room for it, or the folder cannot be written.
        """
        text = json.dumps({"key": key, **about})
        with replacing(self.path(key)) as temporary:
            held = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            try:
                save_file(held, temporary, metadata={"about": text, "checksum": _checksum(text, held)})
            except SafetensorError as error:
                raise OSError(f"{self.folder} cannot be written: {error}") from error
        self._checked.add(key)

    def get(self, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Read the file of a key.

        Args:
            key: the key.

        Returns:
            The tensors, on the CPU, and what was written about them.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        path = self.path(key)
        if not path.exists():
            raise CheckpointError(f"{path}, with {key}, is missing. Remove {self.folder}, and run again.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            about = json.loads(metadata["about"])
            whole = key in self._checked or metadata["checksum"] == _checksum(metadata["about"], tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Remove it, and run again.") from error
        if not whole or about.pop("key", None) != key:
            raise CheckpointError(f"{path} is damaged: it does not fit its checksum. Remove it, and run again.")
        self._checked.add(key)
        return tensors, about


class Shelved(Mapping[str, Value]):
    """What layers have on a shelf, by their names; read when asked for.

    Args:
        shelf: the shelf.
        device: where the tensors are wanted.
    """

    def __init__(self, shelf: Shelf, device: torch.device) -> None:
        self.shelf, self.device = shelf, device
        self._names: dict[str, None] = {}

    def add(self, names: Iterable[str]) -> None:
        """Take in layers that are on the shelf."""
        self._names.update(dict.fromkeys(names))

    def __contains__(self, name: object) -> bool:
        """Return whether a layer is there, without reading it."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the layers."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._names)


class ShelvedStatistics(Shelved[LayerStatistics]):
    """Statistics of layers on a shelf; symmetric matrices are stored once, and not both of their halves.

    Args:
        shelf: the shelf.
        device: where the tensors are wanted.
    """

    def __init__(self, shelf: Shelf, device: torch.device) -> None:
        super().__init__(shelf, device)
        self._last: tuple[str, torch.Tensor] | None = None  # inputs that the next layer may share

    def put(self, statistics: CalibrationStatistics, writes: bool) -> dict[str, str]:
        """Write the layers of a pass.

        Args:
            statistics: what the pass collected.
            writes: whether this process writes.

        Returns:
            Name of each layer to the one with whose name its inputs are written.
        """
        owner, owners = dict[int, str](), dict[str, str]()
        for name, layer in statistics.layers.items():
            shared = owners[name] = owner.setdefault(id(layer.input_covariance), name)
            about = {"tokens": layer.tokens, "units": layer.units, "inputs": shared}
            if writes:
                if shared == name:
                    self.shelf.put(f"inputs of {name}", pack(layer.input_covariance), {})
                self.shelf.put(name, pack(layer.grad_covariance), about)
        return owners

    def __getitem__(self, name: str) -> LayerStatistics:
        """Read the statistics of a layer."""
        if name not in self._names:
            raise KeyError(name)
        outputs, about = self.shelf.get(name)
        owner = about["inputs"]
        if self._last is None or self._last[0] != owner:
            self._last = owner, unpack(self.shelf.get(f"inputs of {owner}")[0]).to(self.device)
        grad_covariance = unpack(outputs).to(self.device)
        return LayerStatistics(None, self._last[1], grad_covariance, about["tokens"], about["units"])


def pack(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a symmetric matrix is stored as: slabs of its rows, each from the diagonal on.

    Args:
        matrix: symmetric.  # shape: (..., d, d)

    Returns:
        The slabs, by their first rows.
    """
    size = matrix.shape[-1]
    width = -(-size // SLABS)
    return {str(start): matrix[..., start : start + width, start:] for start in range(0, size, width)}


def unpack(slabs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the symmetric matrix that `pack` got."""
    first = slabs["0"]
    size = first.shape[-1]
    matrix = first.new_empty((*first.shape[:-2], size, size))
    for name, slab in slabs.items():
        start, end = int(name), int(name) + slab.shape[-2]
        matrix[..., start:, start:end] = slab.mT
        matrix[..., start:end, start:] = slab
    return matrix


def _checksum(about: str, tensors: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(f"{about} {tensors_fingerprint(tensors)}".encode()).hexdigest()
