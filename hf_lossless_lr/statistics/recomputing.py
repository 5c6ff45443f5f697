"""Activations that are computed twice rather than kept: gradient checkpointing, in the blocks that have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data import quick_products
from ..layers import finish, own_forward

WITHOUT_CACHE = {"use_cache": False, "past_key_values": None, "past_key_value": None, "layer_past": None}
"""What a block is called with instead: states would be added to a cache once more when it runs again."""


def can_recompute(model: nn.Module) -> bool:
    """Return whether a model has blocks that can run twice.

    Args:
        model: the model.
    """
    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


@contextmanager
def recomputing(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let blocks keep their inputs alone for the backward pass, which runs them again.

    Transformers' own switch needs training mode, in which models drop out.

    Args:
        model: the model; blocks are called as before afterwards.
        wanted: whether to do so at all.
    """
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
    undo = [own_forward(block) for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = partial(_run, block, block.forward)
        yield
    finally:
        finish(undo)


def _run(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs |= {name: value for name, value in WITHOUT_CACHE.items() if name in kwargs}
    options: Any = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": partial(_contexts, block)}
    return checkpoint(forward, *args, **options, **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return in what a block runs first, and again: a mode of the caller is not there while PyTorch goes backward."""
    return nullcontext(), quick_products(block)
