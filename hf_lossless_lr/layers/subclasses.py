"""Does a subclass of a known layer type compute what its base does? It is tried, with the layer's own weight."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .layout import LAYOUTS, layout_of
from .model_state import random_state_kept
from .offloaded import copied

ROWS = 8  # of a random input
SCALES = (1.0, 1e-3, 1e3)  # of its numbers: a layer may saturate, or round


def has_more_than_its_base(module: Any) -> bool:
    """Return whether a subclass takes arguments, or has methods, that what takes its place would not have.

    Args:
        module: a layer that has a layout.
    """
    base = next(kind for kind in type(module).__mro__ if kind in LAYOUTS)
    arguments = inspect.signature(type(module).forward).parameters
    return len(arguments) != len(inspect.signature(base.forward).parameters) or any(
        not name.startswith("_") for name in set(dir(type(module))) - set(dir(base))
    )


@torch.no_grad()
def answers_as_its_base(module: Any) -> bool:
    """Return whether a layer answers random inputs as the layout of its base type says.

    A layer may keep the type of its base and compute something else: with a weight that it first normalizes, or with
    an input that it rounds. One with parameters of its own, which may be neutral for now, does not answer as its base.

    Args:
        module: a layer that has a layout, with its weights.

    Returns:
        Whether it does; a layer of a known type itself is not tried.
    """
    if type(module) in LAYOUTS:
        return True
    if not {*module._parameters, *module._buffers} <= {"weight", "bias"}:
        return False
    own = copied(module).eval()
    with random_state_kept(own.weight.device):
        x = layout_of(own).random_input(own, ROWS)
    inputs = [scale * x for scale in SCALES]
    if x.ndim > 2:  # a picture of a size that the stride may not divide
        inputs.append(x[..., 1:])
    return all(_answers(own, each) for each in inputs)


def _answers(module: Any, x: torch.Tensor) -> bool:
    layout = layout_of(module)
    try:
        found = type(module).forward(module, x)
        rows, matrices = layout.input_rows(module, x), layout.matrices(module, module.weight)
        expected = torch.einsum("...gi,goi->...go", rows, matrices)
        if module.bias is not None:
            expected = expected + module.bias.reshape(len(matrices), -1)
        answers, positions = layout.output_rows(module, found), layout.positions(module, x)
        answers = answers if positions is None else answers[:, positions]
    except Exception:  # noqa: BLE001 # whatever a layer of another kind may say to such an input
        return False
    if not torch.isfinite(expected).all():  # too large for float16, which tells nothing
        return True
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    return answers.shape == expected.shape and bool((answers - expected).abs().max() <= tolerance)
