"""Does a subclass of a known layer type compute what its base does? It is tried, with the layer's own weight."""

from __future__ import annotations

from typing import Any

import torch

from .layout import LAYOUTS, layout_of
from .model_state import random_state_kept
from .offloaded import copied

ROWS = 8  # of the random input


@torch.no_grad()
def answers_as_its_base(module: Any) -> bool:
    """Return whether a layer answers a random input as the layout of its base type says.

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
    layout, own = layout_of(module), copied(module).eval()
    with random_state_kept(own.weight.device):
        x = layout.random_input(own, ROWS)
    try:
        found = type(own).forward(own, x)
        rows, matrices = layout.input_rows(own, x), layout.matrices(own, own.weight)
        expected = torch.einsum("...gi,goi->...go", rows, matrices)
        if own.bias is not None:
            expected = expected + own.bias.reshape(len(matrices), -1)
        answers, positions = layout.output_rows(own, found), layout.positions(own, x)
        answers = answers if positions is None else answers[:, positions]
    except Exception:  # noqa: BLE001 # whatever a layer of another kind may say to such an input
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    return answers.shape == expected.shape and bool((answers - expected).abs().max() <= tolerance)
