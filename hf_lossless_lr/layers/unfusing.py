"""Which modules of a model hold several layers in one tensor, and what may take their places."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import TargetError
from .attention import UnfusedHeads, UnfusedMultiheadAttention
from .experts import UnfusedExperts
from .readers import read_by_others
from .sorted_experts import UnfusedSortedExperts
from .unfused import Unfused, computes_the_same

KINDS: tuple[type[Unfused], ...] = (UnfusedExperts, UnfusedSortedExperts, UnfusedHeads, UnfusedMultiheadAttention)


def unfuse(model: nn.Module) -> dict[str, Unfused]:
    """Return what may take the place of each fused module, by its name; the model is unchanged.

    Args:
        model: the dense model, with its weights.

    Returns:
        The unfused modules, of those only for which they compute the same, and whose weights nothing else reads.
    """
    modules = {name: module for name, module in model.named_modules() if _kind_of(module) is not None}
    readers = read_by_others(model, "in_proj_weight") if modules else {}
    read = {place for place, reader in readers.items() if reader != nn.TransformerEncoderLayer.__name__}  # as it may
    free = {name: module for name, module in modules.items() if id(module) not in read}
    tried = {name: _tried(module) for name, module in free.items()}
    return {name: found for name, found in tried.items() if isinstance(found, Unfused)}


def unfused(module: nn.Module) -> Unfused:
    """Return what takes the place of a fused module.

    Raises:
        TargetError: if it is none.
    """
    kind = _kind_of(module)
    if kind is None:
        raise TargetError(f"{type(module).__name__} has no fused weights")
    return kind(module)


def why_fused(module: nn.Module) -> str | None:
    """Return why a fused module has to stay as it is; None if it need not, or is none.

    Args:
        module: a module of the dense model, with its weights; in evaluation mode for a moment.
    """
    found = None if _kind_of(module) is None else _tried(module)
    return found if isinstance(found, str) else None


def projections(unfused: Mapping[str, Unfused]) -> list[tuple[str, ...]]:
    """Return the names of the layers that stand beside one another in all experts of a module, module by module."""
    return [
        tuple(f"{path}.{layer}" for layer in layers) for path, module in unfused.items() for layers in module.beside()
    ]


def _tried(module: nn.Module) -> Unfused | str:
    """Return what may take the place of a fused module, or why nothing may."""
    try:
        found = unfused(module)
    except TargetError as error:
        return str(error)
    if computes_the_same(module, found):
        return found
    return f"{type(module).__name__} computes something else than its layers one by one"


def _kind_of(module: nn.Module) -> type[Unfused] | None:
    return next((kind for kind in KINDS if kind.is_kind(module)), None)
