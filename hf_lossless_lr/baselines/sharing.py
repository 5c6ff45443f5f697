r"""Basis sharing: layers of one kind in neighbouring blocks have one `down`, and each its own `up`.

The weights of such layers, one below the other, are one matrix `W (Σ out, in)` of the inputs of all of them. With the
second moments `A` of these it is truncated so that `tr((W − M) A (W − M)ᵀ)` is least, which gives the shared `down`
and the `up` of each layer.

Source: Wang et al. 2024, "Basis sharing: cross-layer parameter sharing for large language model compression", arXiv
2410.03765.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint import LosslessLowRankConfig
from ..errors import ConfigurationError
from ..factors import damped, metric_svd
from ..layers import weight_matrices
from ..statistics import CalibrationStatistics
from .truncation import at_least_one, two_factors

TOGETHER = 2  # blocks that share, as the source has it for most of its results


def shared_bases(
    targets: Mapping[str, nn.Module],
    keep_ratio: float,
    *,
    statistics: CalibrationStatistics,
    together: int = TOGETHER,
) -> dict[str, nn.Module]:
    """Factorize layers, neighbours of one kind by a shared basis, each group to the same share of its parameters.

    Args:
        targets: dense layers by name; unchanged.
        keep_ratio: parameters kept divided by original ones, in (0, 1].
        statistics: second moments of the inputs of the layers.
        together: blocks that share.

    Returns:
        What takes their places, by name. The `down.weight` of a group is one parameter.

    Raises:
        ConfigurationError: if a group is larger than its share even at rank 1.
    """
    found: dict[str, nn.Module] = {}
    for names in sharing_groups(targets, statistics, together):
        layers: list[Any] = [targets[name] for name in names]
        matrix = torch.cat([weight_matrices(layer).double() for layer in layers], dim=-2)
        groups, *sides = matrix.shape
        try:
            rank = min(at_least_one(int(keep_ratio * matrix.numel()) // (groups * sum(sides))), *sides)
        except ConfigurationError as error:
            raise ConfigurationError(f"keep_ratio={keep_ratio} cannot be reached in {names[0]!r}: {error}") from error
        moments = torch.stack([_summed(statistics, name) for name in names]).sum(0)
        factors = metric_svd(matrix, damped(moments, LosslessLowRankConfig.damping), rank=rank)
        ups = factors.left.split([weight_matrices(layer).shape[-2] for layer in layers], dim=-2)
        for name, layer, up in zip(names, layers, ups, strict=True):
            shared = two_factors(layer, factors.right, up)
            shared.down.weight = found.get(names[0], shared).down.weight
            found[name] = shared
    return found


def sharing_groups(
    targets: Mapping[str, nn.Module], statistics: CalibrationStatistics, together: int
) -> list[Sequence[str]]:
    """Return which layers share a basis, in the order of the model.

    Layers are of one kind where types and shapes are the same, and names but for one number in them: that of the
    block, which is the one that most layers differ in. Those that read what others read, too, or that widen, share;
    the source found that others lose too much.

    Args:
        targets: dense layers by name.
        statistics: which of them read the same.
        together: blocks that share.
    """
    siblings = {name for group in statistics.groups if len(group) > 1 for name in group}
    kinds: dict[Any, list[str]] = {}
    like = {name: [(t, type(m), weight_matrices(m).shape) for t in _templates(name)] for name, m in targets.items()}
    alike = Counter(kind for each in like.values() for kind in each)
    for name, layer in targets.items():
        _, out, size = weight_matrices(layer).shape
        alone = name not in siblings and out <= size
        kinds.setdefault(name if alone else max(like[name], key=alike.__getitem__), []).append(name)
    return [names[first : first + together] for names in kinds.values() for first in range(0, len(names), together)]


def _templates(name: str) -> list[str]:
    """Return a name with each of its numbers in turn left open; the name itself, where it has none."""
    numbers = [match.span() for match in re.finditer(r"\d+", name)]
    return [f"{name[:start]}*{name[end:]}" for start, end in numbers] or [name]


def _summed(statistics: CalibrationStatistics, name: str) -> torch.Tensor:
    stats = statistics.layers[name]
    return stats.tokens * stats.input_covariance.double()
