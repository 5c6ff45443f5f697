"""What of a model is no target: every other weight, with its size and the reason."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .targets import Targets
from .unfused import Unfused
from .unfusing import why_fused


def other_weights(model: nn.Module, targets: Targets) -> dict[str, tuple[str, int]]:
    """Return each matrix-like parameter that is no target, with the reason and its number of elements.

    Matrix-like is what has at least two dimensions that are not 1: matrices, kernels, tables of embeddings, weights of
    all experts in one. A parameter that is called `weight` has the name of its module. One that is used in several
    places counts once; its other names have 0 elements.

    Args:
        model: the dense model.
        targets: its targets.

    Returns:
        Name to reason and size, in the model's order; with it all layers that the choice of targets skipped.
    """
    chosen = {id(module.weight) for module in targets.chosen.values()}
    seen: set[int] = set()
    others: dict[str, tuple[str, int]] = {}
    for name, module, parameter in _parameters(model):
        if id(parameter) in chosen:
            continue
        is_layer = name in targets.skipped
        if is_layer or sum(size > 1 for size in parameter.shape) > 1:
            size = 0 if id(parameter) in seen else parameter.numel()
            others[name] = (targets.skipped[name] if is_layer else _reason(name, module, parameter, size), size)
            seen.add(id(parameter))
    return others


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield path if name == "weight" and path else f"{path}.{name}".strip("."), module, parameter


def _reason(name: str, module: nn.Module, parameter: nn.Parameter, size: int) -> str:
    if not size:
        return "tied"
    if isinstance(module, nn.Embedding) or "embed" in name.rpartition(".")[2]:  # a table of positions, for one
        return "embeddings"
    if isinstance(module, ParametrizationList) or _is_original(name.rpartition(".")[2], module):
        return "a weight is computed from it"
    kind = type(module.template if isinstance(module, Unfused) else module).__name__
    return f"not supported: {why_fused(module) or f'{parameter.ndim}-D weight of {kind}'}"


def _is_original(name: str, module: nn.Module) -> bool:
    """Return whether a hook computes the weight of a layer from a parameter, as older weight and spectral norms do."""
    return name in ("weight_g", "weight_v", "weight_orig") and "weight" not in module._parameters
