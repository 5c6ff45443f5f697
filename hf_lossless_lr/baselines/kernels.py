"""Decompositions of kernels, which are no rows of the one factorization: `(out, in, kh, kw)` is more than a matrix.

Each makes a few plain convolutions of one, at most as large as a share of it, and knows nothing but its kernel. What
is no such kernel (a linear layer, a pointwise or a one-dimensional convolution) gets the SVD of its matrix, which is
the best decomposition of a matrix in each of these formats. Convolutions in groups stay dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ConfigurationError
from ..layers import ConvolutionChain, Step, layout_of
from .truncation import at_least_one, rank_of_share, truncated, truncated_svd

Decomposition = Callable[[torch.Tensor, int], list[Step]]
"""From a kernel, in float64, and the most parameters to the convolutions in its place."""

SWEEPS = 50  # of alternating solutions
RIDGE = 1e-10  # relative; terms may come to be nearly the same but for their signs
SMALLEST_NORM = 1e-100


class _Place(NamedTuple):
    """Where in a kernel a convolution along one side lies: the axes of which it has the geometry, and its shape."""

    axes: tuple[int, ...]
    shape: tuple[int, int]


def decomposed(layers: Mapping[str, nn.Module], keep_ratio: float, kernels: Decomposition) -> dict[str, nn.Module]:
    """Decompose layers, each to the same share of its parameters.

    Args:
        layers: dense layers by name; unchanged.
        keep_ratio: parameters kept divided by original ones, in (0, 1].
        kernels: the decomposition of a kernel.

    Returns:
        What takes their places, by name, without those that stay dense.

    Raises:
        ConfigurationError: if a layer is larger than its share even at the lowest ranks.
    """
    found: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        module: Any = layer
        most = int(keep_ratio * module.weight.numel())
        size = layout_of(module).kernel_size(module)
        try:
            if size and module.groups > 1:
                continue
            if len(size) == 2 and max(size) > 1:
                found[name] = ConvolutionChain(module, kernels(module.weight.detach().double(), most))
            else:
                found[name] = truncated(module, rank_of_share(module, most))
        except ConfigurationError as error:
            raise ConfigurationError(f"keep_ratio={keep_ratio} cannot be reached in {name!r}: {error}") from error
    return found


def separable(kernel: torch.Tensor, most: int) -> list[Step]:
    """Two convolutions, `(kh, 1)` to `k` channels and `(1, kw)` from them: the best ones of that rank, by an SVD.

    Args:
        kernel: the kernel.  # shape: (out, in, kh, kw)
        most: the most parameters, of `k (in · kh + kw · out)`.

    Returns:
        The convolutions.

    Source: Tai et al. 2016, "Convolutional neural networks with low-rank regularization", arXiv 1511.06067.
    """
    out, channels, height, width = kernel.shape
    matrix = kernel.permute(0, 3, 1, 2).reshape(out * width, channels * height)
    down, up = truncated_svd(matrix, at_least_one(most // sum(matrix.shape)))
    return [
        Step(down.reshape(-1, channels, height, 1), (0,)),
        Step(up.reshape(out, width, -1).mT[:, :, None], (1,)),
    ]


def tucker(kernel: torch.Tensor, most: int) -> list[Step]:
    """Three convolutions: to `r` channels, the core from them to `s`, and from these to all; iterated SVDs (HOOI).

    The ranks are those that discard the least in the two unfoldings of the kernel.

    Args:
        kernel: the kernel.  # shape: (out, in, kh, kw)
        most: the most parameters, of `in · r + kh · kw · r · s + s · out`.

    Returns:
        The convolutions.

    Source: Kim et al. 2016, "Compression of deep convolutional neural networks for fast and low power mobile
    applications", arXiv 1511.06530.
    """
    out, channels, *area = kernel.shape

    def size(r: Any, s: Any) -> Any:
        return channels * r + math.prod(area) * r * s + s * out

    r, s = _best_ranks([kernel.transpose(0, 1).flatten(1), kernel.flatten(1)], size, most)
    right = _unit_vectors(kernel.transpose(0, 1).flatten(1), r)
    for _ in range(SWEEPS):
        core = torch.einsum("oihw,ir->rohw", kernel, right)
        left = _unit_vectors(core.transpose(0, 1).flatten(1), s)
        right = _unit_vectors(torch.einsum("oihw,os->ishw", kernel, left).flatten(1), r)
    core = torch.einsum("oihw,os,ir->srhw", kernel, left, right)
    return [_pointwise(right.mT), Step(core, (0, 1)), _pointwise(left)]


def cp(kernel: torch.Tensor, most: int) -> list[Step]:
    """Four convolutions: to `k` channels, `(kh, 1)` and `(1, kw)` of each alone, and from these to all.

    By alternating least squares from a random start, which is the same in each run.

    Args:
        kernel: the kernel.  # shape: (out, in, kh, kw)
        most: the most parameters, of `k (in + kh + kw + out)`; a side of 1 has none.

    Returns:
        The convolutions.

    Source: Lebedev et al. 2015, "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", arXiv
    1412.6553.
    """
    tensor, places = _by_axes(kernel)
    first, *between, last = _least_squares(tensor, at_least_one(most // sum(tensor.shape)))
    filters = _filters((factor.mT[:, None] for factor in between), places)
    return [_pointwise(first.mT), *filters, _pointwise(last)]


def tensor_train(kernel: torch.Tensor, most: int) -> list[Step]:
    """Four convolutions: to `p` channels, `(kh, 1)` from them to `q`, `(1, kw)` to `r`, and from these to all; SVDs.

    The ranks are those that discard the least in the cuts of the kernel.

    Args:
        kernel: the kernel.  # shape: (out, in, kh, kw)
        most: the most parameters, of `in · p + p · kh · q + q · kw · r + r · out`; a side of 1 has none.

    Returns:
        The convolutions.

    Source: Oseledets 2011, "Tensor-train decomposition", SIAM J. Sci. Comput. 33.
    """
    tensor, places = _by_axes(kernel)
    sides = tensor.shape
    cuts = [tensor.reshape(math.prod(sides[:cut]), -1) for cut in range(1, len(sides))]

    def size(*ranks: Any) -> Any:
        return sum(
            before * side * behind for before, side, behind in zip((1, *ranks), sides, (*ranks, 1), strict=True)
        )

    cores, before, rest = list[torch.Tensor](), 1, tensor
    for side, rank in zip(sides, _best_ranks(cuts, size, most, sides[1:-1]), strict=False):
        rest = rest.reshape(before * side, -1)
        left = _unit_vectors(rest, rank)
        cores.append(left.reshape(before, side, -1))
        before, rest = left.shape[1], left.mT @ rest
    first, *between = cores
    filters = _filters((core.permute(2, 0, 1) for core in between), places)
    return [_pointwise(first[0].mT), *filters, _pointwise(rest.mT)]


def _least_squares(tensor: torch.Tensor, rank: int) -> list[torch.Tensor]:
    """Return the factors `(side, rank)` of a sum of outer products, each solved for in turns."""
    start = torch.Generator(tensor.device).manual_seed(0)
    factors = [
        torch.randn(side, rank, generator=start, dtype=tensor.dtype, device=tensor.device) for side in tensor.shape
    ]
    for _ in range(SWEEPS):
        for side in range(tensor.ndim):
            factors = [factor / factor.norm(dim=0).clamp_min(SMALLEST_NORM) for factor in factors]
            others = sorted((k for k in range(tensor.ndim) if k != side), key=lambda k: len(factors[k]))
            seen = tensor.permute(side, *others) @ factors[others[-1]]  # the widest side first
            for k in reversed(others[:-1]):
                seen = (seen * factors[k]).sum(-2)
            gram = torch.stack([factors[k].mT @ factors[k] for k in others]).prod(0)
            gram.diagonal().add_(RIDGE)  # whose diagonal is 1
            factors[side] = torch.linalg.solve(gram, seen.mT).mT
    size = factors[-1].norm(dim=0).clamp_min(SMALLEST_NORM)  # of a term; others are unit vectors
    return [factor * size ** (1 / tensor.ndim) for factor in (*factors[:-1], factors[-1] / size)]


def _unit_vectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the left singular vectors of the largest singular values.  # shape: (rows, rank)."""
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]


def _best_ranks(
    matrices: Sequence[torch.Tensor], size: Callable[..., Any], most: int, growth: Sequence[int] = ()
) -> list[int]:
    """Return ranks of matrices that together discard the least of their energy, with at most so many parameters.

    The size grows with each rank, and is linear in the last one, which gets what the others leave. With `growth`, a
    rank is at most so many times the one before.
    """
    energies = [torch.linalg.svdvals(matrix).square() for matrix in matrices]
    tails = [torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]) for energy in energies]
    *others, last = tails
    ranks = torch.meshgrid(*(torch.arange(1, len(tail), device=tail.device) for tail in others), indexing="ij")
    least = size(*ranks, 1)
    rest = (1 + (most - least) // (size(*ranks, 2) - least)).clamp(0, len(last) - 1)
    possible = rest > 0
    at_least_one(int(possible.any()))
    for before, rank, times in zip(ranks, ranks[1:], growth, strict=False):
        possible &= rank <= before * times
    if growth:
        rest = torch.minimum(rest, ranks[-1] * growth[-1])
    discarded = sum((tail[rank] for tail, rank in zip(others, ranks, strict=True)), last[rest])
    best = torch.where(possible, discarded, torch.inf).argmin()
    return [int(rank.flatten()[best]) for rank in (*ranks, rest)]


def _by_axes(kernel: torch.Tensor) -> tuple[torch.Tensor, list[_Place]]:
    """Return a kernel as `(in, kh, kw, out)`, and the places of the convolutions along its sides.

    Where a side is 1 there is one of them, and the kernel is `(in, k, out)`.
    """
    out, channels, height, width = kernel.shape
    if min(height, width) == 1:
        return kernel.movedim(0, -1).reshape(channels, -1, out), [_Place((0, 1), (height, width))]
    return kernel.movedim(0, -1), [_Place((0,), (height, 1)), _Place((1,), (1, width))]


def _filters(weights: Iterable[torch.Tensor], places: Sequence[_Place]) -> list[Step]:
    """Return the convolutions along the sides of a kernel.  # shape of each: (out, in / groups, side)."""
    return [Step(weight.unflatten(-1, place.shape), place.axes) for weight, place in zip(weights, places, strict=True)]


def _pointwise(weight: torch.Tensor) -> Step:
    """Return a convolution without a kernel.  # shape: (out, in)."""
    return Step(weight[..., None, None])
