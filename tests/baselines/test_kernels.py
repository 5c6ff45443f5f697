"""Decompositions of kernels: the dense layer at full rank, the best of their kind below it, in their share."""

import itertools

import pytest
import torch
from torch import nn

from hf_lossless_lr.baselines.kernels import cp, decomposed, separable, tensor_train, tucker
from hf_lossless_lr.errors import ConfigurationError
from hf_lossless_lr.layers import ConvolutionChain, FactorizedConv1d, FactorizedConv2d, FactorizedLinear

DECOMPOSITIONS = (separable, tucker, cp, tensor_train)
KERNELS = {"1x1": (1, 1), "3x3": (3, 3), "1x7": (1, 7), "5x1": (5, 1), "3x2": (3, 2)}
GEOMETRIES = {
    "plain": {},
    "padded": {"padding": 1, "stride": 2},
    "uneven": {"padding": (0, 3), "stride": (1, 2), "dilation": (2, 1)},
    "same": {"padding": "same", "dilation": 2},
    "reflected, without bias": {"padding": (2, 1), "padding_mode": "reflect", "bias": False},
}


def convolution(kernel, **geometry):
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, kernel, **geometry).double().requires_grad_(False)


def of_two_terms(kernel):
    """A kernel that is the sum of two outer products."""
    torch.manual_seed(1)
    factors = [torch.randn(side, 2).double() for side in (6, 4, *kernel)]
    return torch.einsum("or,ir,hr,wr->oihw", *factors)


def kernel_of(chain, channels, sides):
    """What a chain without bias, strides and padding does to a picture of each number of its kernel."""
    pictures = torch.eye(channels * sides[0] * sides[1]).double().reshape(-1, channels, *sides)
    return chain(pictures).detach().flatten(1).mT.reshape(-1, channels, *sides)


def in_its_share(method, layer, keep):
    """The chain of a layer, and the kernel that it stands for."""
    chain = decomposed({"layer": layer}, keep, method)["layer"]
    return chain, kernel_of(chain, layer.in_channels, layer.kernel_size)


def tail(matrix, rank):
    return torch.linalg.svdvals(matrix)[rank:].square().sum()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", DECOMPOSITIONS)
def test_at_full_rank_it_is_the_dense_layer(method, kernel, geometry):
    layer = convolution(KERNELS[kernel], **GEOMETRIES[geometry])
    most = 10_000
    if method is cp:  # which has no full rank that is found; of this kernel it is 2
        layer.weight.copy_(of_two_terms(KERNELS[kernel]))
        most = 2 * sum(side for side in (*layer.weight.shape[:2], *(s for s in KERNELS[kernel] if s > 1)))
        most += 2 * (kernel == "1x1")
    chain = ConvolutionChain(layer, method(layer.weight, most))
    x = torch.randn(2, 4, 19, 17).double()
    assert torch.allclose(chain(x), layer(x), atol=1e-6 if method is cp else 1e-12)
    assert all(type(step) is nn.Conv2d for step in chain)


@pytest.mark.parametrize("method", DECOMPOSITIONS)
@pytest.mark.parametrize("keep", [0.7, 0.4])
def test_keeps_its_share_and_hardly_less(method, keep):
    torch.manual_seed(0)
    layers = {"even": nn.Conv2d(12, 12, 3), "wide": nn.Conv2d(6, 20, 3), "long": nn.Conv2d(12, 12, (1, 7))}
    for name, chain in decomposed(layers, keep, method).items():
        kept = sum(step.weight.numel() for step in chain) / layers[name].weight.numel()
        assert 0.75 * keep < kept <= keep


def test_separable_filters_are_the_best_of_their_rank():
    layer = convolution((3, 2), bias=False)
    chain, kernel = in_its_share(separable, layer, 0.5)
    matrix = layer.weight.permute(0, 3, 1, 2).reshape(12, 12)
    assert chain[0].out_channels == 3
    assert (kernel - layer.weight).square().sum().item() == pytest.approx(tail(matrix, 3).item(), rel=1e-9)


@pytest.mark.parametrize("method", [tucker, tensor_train])
def test_the_error_is_between_those_of_its_single_cuts_and_their_sum(method):
    layer = convolution((3, 3), bias=False)
    chain, kernel = in_its_share(method, layer, 0.5)
    if method is tucker:
        tails = [tail(layer.weight.flatten(1), chain[2].in_channels)]
        tails.append(tail(layer.weight.transpose(0, 1).flatten(1), chain[1].in_channels))
    else:
        by_axes = layer.weight.movedim(0, -1)
        tails = [tail(by_axes.flatten(0, cut).flatten(1), step.out_channels) for cut, step in enumerate([*chain][:-1])]
    error = (kernel - layer.weight).square().sum()
    assert max(tails) * (1 - 1e-9) <= error <= sum(tails) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("method", "sides"), [(tucker, 2), (tensor_train, 3)])
def test_no_other_ranks_of_its_share_discard_less(method, sides, seed):
    torch.manual_seed(seed)
    kernel, most = torch.randn(6, 3, 4, 2).double(), 70
    kernel *= torch.tensor([8.0, 5.0, 1.0, 0.1, 0.1, 0.1])[:, None, None, None]
    found = [tuple(step.weight.shape[:2]) for step in method(kernel, most)]
    if method is tucker:
        unfoldings = [kernel.transpose(0, 1).flatten(1), kernel.flatten(1)]
        ranks = found[0][0], found[1][0]
        sizes = {(r, s): 3 * r + 8 * r * s + 6 * s for r in range(1, 4) for s in range(1, 7)}
    else:
        unfoldings = [kernel.movedim(0, -1).reshape(side, -1) for side in (3, 12, 24)]
        ranks = tuple(out for out, _ in found[:3])
        every = itertools.product(range(1, 4), range(1, 13), range(1, 7))
        sizes = {(p, q, r): 3 * p + 4 * p * q + 2 * q * r + 6 * r for p, q, r in every}
    discarded = {
        each: sum(tail(matrix, rank).item() for matrix, rank in zip(unfoldings, each, strict=True))
        for each, size in sizes.items()
        if size <= most and (method is tucker or (each[1] <= 4 * each[0] and each[2] <= 2 * each[1]))
    }
    assert len(ranks) == sides
    assert discarded[ranks] == pytest.approx(min(discarded.values()), rel=1e-9)


def test_colours_of_a_picture_are_not_made_one():
    """Three channels are few already: no budget is gained by fewer."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 32, 7)
    for method in (tucker, tensor_train):
        assert decomposed({"stem": stem}, 0.5, method)["stem"][0].out_channels == 3


def test_each_term_of_a_sum_is_at_its_optimum():
    layer = convolution((3, 3), bias=False)
    chain, kernel = in_its_share(cp, layer, 0.5)
    rank = chain[0].out_channels
    terms = [step.weight.detach().reshape(step.weight.shape[0], -1) for step in chain]
    others = torch.einsum("ri,rh,rw->rihw", *terms[:3]).reshape(rank, -1)
    best = layer.weight.flatten(1) @ torch.linalg.pinv(others)  # of the last factor, given the others
    assert torch.allclose(terms[3], best, atol=1e-6)
    assert (kernel - layer.weight).norm() < 0.7 * layer.weight.norm()


def test_what_is_no_kernel_gets_the_svd_of_its_matrix_and_groups_stay_dense():
    torch.manual_seed(0)
    layers = {
        "linear": nn.Linear(12, 8),
        "pointwise": nn.Conv2d(12, 8, 1, stride=2),
        "audio": nn.Conv1d(4, 8, 3),
        "groups": nn.Conv2d(8, 8, 3, groups=2),
        "pointwise groups": nn.Conv2d(8, 8, 1, groups=2),
    }
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    found = decomposed(layers, 0.6, separable)
    kinds = {"linear": FactorizedLinear, "pointwise": FactorizedConv2d, "audio": FactorizedConv1d}
    assert {name: type(layer) for name, layer in found.items()} == kinds
    for name, layer in found.items():
        matrix = layers[name].weight.detach().double().flatten(1)
        assert layer.rank == 0.6 * 8 * 12 // 20
        error = (layer.dense_weight().reshape(matrix.shape) - matrix).square().sum()
        assert error.item() == pytest.approx(tail(matrix, layer.rank).item(), rel=1e-5)
        assert torch.equal(layer.bias, layers[name].bias)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())


def test_a_layer_that_is_too_small_for_its_share_is_named():
    with pytest.raises(ConfigurationError, match=r"keep_ratio=0.01 cannot be reached in 'stem': the lowest ranks"):
        decomposed({"stem": nn.Conv2d(3, 8, 3)}, 0.01, separable)


def test_a_chain_has_what_model_code_reads_of_a_convolution():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1).bfloat16()
    chain = ConvolutionChain(layer, separable(layer.weight.detach().double(), 60))
    for name in ("stride", "padding", "kernel_size", "dilation", "groups", "in_channels", "out_channels"):
        assert getattr(chain, name) == getattr(layer, name)
    assert chain.weight.dtype == torch.bfloat16
    assert torch.equal(chain.bias, layer.bias)
    assert not any(key.startswith("weight") for key in chain.state_dict())


def test_a_convolution_that_pads_by_itself_becomes_a_chain_that_does():
    class Conv2dSame(nn.Conv2d):  # as timm has it
        def forward(self, x):
            height, width = (max((-(-s // 2) - 1) * 2 + 3 - s, 0) for s in x.shape[2:])
            sides = (width // 2, width - width // 2, height // 2, height - height // 2)
            return super().forward(nn.functional.pad(x, sides))

    layer = Conv2dSame(4, 6, 3, stride=2).double().requires_grad_(False)
    chain = ConvolutionChain(layer, separable(layer.weight, 10_000))
    for sides in ((9, 8), (6, 7)):
        x = torch.randn(1, 4, *sides).double()
        assert torch.allclose(chain(x), layer(x), atol=1e-12)
