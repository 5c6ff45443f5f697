"""Factorizations and loss curves on a shelf: what does not fit into memory, and what need not be computed again."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from ..statistics import Shelved
from .curves import LossCurve, RoundingCost
from .decomposition import MetricFactors
from .factorize import Factorization

ARRAYS = ("first_order", "second_order", "max_noise")  # of a curve


class ShelvedFactorizations(Shelved[Factorization]):
    """Nested factors of layers on a shelf, each with its curve."""

    def has(self, name: str) -> bool:
        """Return whether the factors and the curve of a layer are on the shelf."""
        return f"curve of {name}" in self.shelf

    def put(self, name: str, factorization: Factorization, curve: LossCurve) -> None:
        """Write the factors and the curve of a layer."""
        self.shelf.put(f"factors of {name}", factorization.factors._asdict(), {})
        arrays = {field: getattr(curve, field) for field in ARRAYS}
        costs = {f"rounding {kind}": cost.by_rank for kind, cost in curve.rounding.items() if cost is not None}
        numbers = {field.name: getattr(curve, field.name) for field in fields(curve) if field.name not in ARRAYS}
        numbers["rounding"] = {kind: cost and cost.dense for kind, cost in curve.rounding.items()}
        held = {key: torch.from_numpy(array) for key, array in (arrays | costs).items() if array is not None}
        self.shelf.put(f"curve of {name}", held, numbers)  # the last of the two: with it, the layer is finished

    def take(self, name: str) -> LossCurve:
        """Take in a layer that is on the shelf, and return its curve."""
        tensors, numbers = self.shelf.get(f"curve of {name}")
        held: dict[str, np.ndarray] = {key: tensor.numpy() for key, tensor in tensors.items()}
        rounding: dict[str, Any] = {
            kind: None if dense is None else RoundingCost(held[f"rounding {kind}"], dense)
            for kind, dense in numbers.pop("rounding").items()
        }
        self.add([name])
        return LossCurve(**numbers, **{field: held.get(field) for field in ARRAYS}, rounding=rounding)  # type: ignore

    def __getitem__(self, name: str) -> Factorization:
        """Read the factors of a layer."""
        if name not in self._names:
            raise KeyError(name)
        tensors, _ = self.shelf.get(f"factors of {name}")
        return Factorization(MetricFactors(**{field: tensor.to(self.device) for field, tensor in tensors.items()}))
