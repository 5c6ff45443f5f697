"""Factorizations and loss curves on a shelf: what does not fit into memory, and what need not be computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from ..layers import CHANNEL, FORMS
from ..statistics import Shelved
from .curves import LossCurve, RoundingCost
from .decomposition import MetricFactors
from .factorize import Factorization
from .spatial import SpatialFactorization

Forms = Mapping[str, Factorization | SpatialFactorization]
"""The factorizations of a layer, by form."""

ARRAYS = ("first_order", "second_order", "max_noise")  # of a curve


class ShelvedFactorizations(Shelved[Forms]):
    """Nested factors of layers on a shelf, each with its curve."""

    def has(self, name: str) -> bool:
        """Return whether the factors and the curve of a layer are on the shelf."""
        curve = f"curve of {name}"
        if curve not in self.shelf:
            return False
        forms = (form for form in self.shelf.get(curve)[1] if form in FORMS)  # of others there are curves alone
        return all(f"{form} factors of {name}" in self.shelf for form in forms)

    def put(self, name: str, forms: Forms, curve: LossCurve) -> None:
        """Write the factors and the curve of a layer."""
        for form, factorization in forms.items():
            tensors, numbers = factorization.factors._asdict(), dict[str, Any]()
            if isinstance(factorization, SpatialFactorization):
                tensors |= {"lower": factorization.lower, "solved": factorization.solved}
                numbers["width"] = factorization.width
            self.shelf.put(f"{form} factors of {name}", tensors, numbers)
        curves = {curve.form: curve, **curve.others, **curve.paired}
        packed = {form: _packed(each) for form, each in curves.items()}
        tensors = {f"{form} {key}": array for form, (arrays, _) in packed.items() for key, array in arrays.items()}
        # The last of all: with it, the layer is finished.
        self.shelf.put(f"curve of {name}", tensors, {form: numbers for form, (_, numbers) in packed.items()})

    def take(self, name: str) -> LossCurve:
        """Take in a layer that is on the shelf, and return its curve."""
        tensors, by_form = self.shelf.get(f"curve of {name}")
        self.add([name])
        curves = {}
        for form, numbers in by_form.items():
            prefix = f"{form} "
            held = {key.removeprefix(prefix): t.numpy() for key, t in tensors.items() if key.startswith(prefix)}
            curves[form] = _unpacked(held, numbers)
        others = {form: curves.pop(form) for form in FORMS if form in curves and form != CHANNEL}
        return replace(curves.pop(CHANNEL), others=others, paired=curves)

    def __getitem__(self, name: str) -> Forms:
        """Read the factors of a layer."""
        if name not in self._names:
            raise KeyError(name)
        return {form: self._read(name, form) for form in FORMS if f"{form} factors of {name}" in self.shelf}

    def _read(self, name: str, form: str) -> Factorization | SpatialFactorization:
        tensors, numbers = self.shelf.get(f"{form} factors of {name}")
        on_device: dict[str, Any] = {field: tensor.to(self.device) for field, tensor in tensors.items()}
        factors = MetricFactors(**{field: on_device.pop(field) for field in MetricFactors._fields})
        return SpatialFactorization(factors, **on_device, **numbers) if on_device else Factorization(factors)


def _packed(curve: LossCurve) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the arrays and the numbers of a curve, without those of other forms."""
    arrays = {field: getattr(curve, field) for field in ARRAYS}
    costs = {f"rounding {kind}": cost.by_rank for kind, cost in curve.rounding.items() if cost is not None}
    apart = {*ARRAYS, "rounding", "others", "paired"}
    numbers = {field.name: getattr(curve, field.name) for field in fields(curve) if field.name not in apart}
    numbers["rounding"] = {kind: cost and cost.dense for kind, cost in curve.rounding.items()}
    return {key: torch.from_numpy(array) for key, array in (arrays | costs).items() if array is not None}, numbers


def _unpacked(arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> LossCurve:
    rounding: dict[str, Any] = {
        kind: None if dense is None else RoundingCost(arrays[f"rounding {kind}"], dense)
        for kind, dense in numbers["rounding"].items()
    }
    others: dict[str, Any] = {field: arrays.get(field) for field in ARRAYS}
    return LossCurve(**{**numbers, **others, "rounding": rounding, "pair": tuple(numbers["pair"])})
