"""Can statistics that were read from a file be used? Nothing is repaired: what is wrong is refused by its name."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError
from .records import CalibrationStatistics
from .rows import precision_of

ASYMMETRY = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest entry: processes may sum in another order


def check_statistics(statistics: CalibrationStatistics, source: str) -> None:
    """Refuse statistics that no calibration gives.

    Args:
        statistics: the statistics.
        source: the file that they come from, for the message.

    Raises:
        CheckpointError: if a number, a matrix or a group is not as it must be.
    """
    counts: dict[str, Any] = {"examples": statistics.examples, "units": statistics.units}
    for name, layer in statistics.layers.items():
        counts |= {f"{name}.tokens": layer.tokens, f"{name}.units": layer.units}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            _refuse(source, name, f"is {count!r}; it must be a whole number of at least 1")
    loss: Any = statistics.loss
    if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not math.isfinite(loss):
        _refuse(source, "loss", f"is {loss!r}; it must be a finite number")
    if not isinstance(statistics.data_fingerprint, str):
        _refuse(source, "data_fingerprint", f"is {statistics.data_fingerprint!r}; it must be a text")
    grouped = [name for group in statistics.groups for name in group]
    for name in grouped:
        if name not in statistics.layers or grouped.count(name) > 1:
            _refuse(source, "groups", f"has {name!r}, which is no layer of the file or is in it twice")
    checked: set[int] = set()
    for name, layer in statistics.layers.items():
        groups, out_features, _ = _shape(layer.grad_covariance, f"{name}.grad_covariance", source)
        in_features = _shape(layer.input_covariance, f"{name}.input_covariance", source)[-1]
        if layer.weight_grad is not None:
            groups, out_features, in_features = _shape(layer.weight_grad, f"{name}.weight_grad", source)
            _check_numbers(layer.weight_grad, f"{name}.weight_grad", source)
        squares = {"input_covariance": in_features, "grad_covariance": out_features}
        for key, size in squares.items():
            matrix, place = getattr(layer, key), f"{name}.{key}"
            if _shape(matrix, place, source) != (groups, size, size):
                _refuse(source, place, f"has the shape {tuple(matrix.shape)}, not {(groups, size, size)}")
            if id(matrix) not in checked:
                _check_numbers(matrix, place, source)
                _check_square(matrix, place, source)
                checked.add(id(matrix))


def _shape(matrix: torch.Tensor, name: str, source: str) -> tuple[int, ...]:
    if matrix.ndim != 3 or not matrix.numel():
        _refuse(source, name, f"has the shape {tuple(matrix.shape)}; it must have three axes, none of them empty")
    return tuple(matrix.shape)


def _check_numbers(matrix: torch.Tensor, name: str, source: str) -> None:
    wanted = torch.float64 if name.endswith(".weight_grad") else precision_of(matrix.shape[-1])
    if matrix.dtype != wanted:
        _refuse(source, name, f"has the dtype {matrix.dtype}, not {wanted}")
    if not bool(torch.isfinite(matrix).all()):
        _refuse(source, name, "has values that are NaN or infinite")


def _check_square(matrix: torch.Tensor, name: str, source: str) -> None:
    if bool((matrix.diagonal(dim1=-2, dim2=-1) < 0).any()):
        _refuse(source, name, "has negative values on its diagonal")
    allowed = ASYMMETRY[matrix.dtype] * float(matrix.abs().max())
    if float((matrix - matrix.mT).abs().max()) > allowed:
        _refuse(source, name, "is not symmetric")


def _refuse(source: str, name: str, what: str) -> NoReturn:
    raise CheckpointError(f"{source}: {name!r} {what}. The file was edited or damaged; calibrate again.")
