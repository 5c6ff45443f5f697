"""Grids: what they declare is what is stored, what is stored comes back, and the search is worth its name."""

import itertools
import math

import pytest
import torch

from hf_lossless_lr.formats import FORMATS, Grid, decode, encode, search_grid, stored_grid

pytestmark = pytest.mark.numerical

SHAPES = [(1, 1), (3, 5), (2, 64), (5, 65), (4, 130), (7, 200)]
cases = pytest.mark.parametrize(
    ("name", "shape", "seed"), list(itertools.product(FORMATS, SHAPES, range(3))), ids=lambda value: str(value)
)


def matrix_of(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.logspace(-3, 2, shape[0])[:, None]
    return (matrix + 0.3 * matrix.abs().max()).to(dtype), torch.rand(shape[1], generator=generator).double()


@cases
def test_what_is_stored_is_what_the_format_declares(name, shape, seed):
    kind, (matrix, importance) = FORMATS[name], matrix_of(shape, seed)
    tensors = encode(matrix, search_grid(matrix, importance, kind))
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == kind.tensors(*shape)
    assert kind.stored_bytes(*shape) == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@cases
def test_numbers_on_a_grid_come_back_and_are_stored_as_the_same_bytes(name, shape, seed, dtype):
    kind, (matrix, importance) = FORMATS[name], matrix_of(shape, seed)
    grid = search_grid(matrix, importance, kind)
    tensors = encode(matrix, grid)
    values = decode(tensors, shape[1], kind)
    assert torch.equal(values, grid.columns(shape[1]).values(grid.columns(shape[1]).codes(matrix)))
    again = encode(values.to(dtype), stored_grid(tensors, kind))
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@cases
def test_no_number_is_off_by_more_than_half_a_step_where_nothing_is_cut_off(name, shape, seed):
    kind, (matrix, _) = FORMATS[name], matrix_of(shape, seed)
    high, low = matrix.amax(-1, keepdim=True).clamp_min(0), matrix.amin(-1, keepdim=True).clamp_max(0)
    span = torch.maximum(high, -low) / kind.highest if kind.symmetric else (high - low) / kind.highest
    scale = (span * 1.01).bfloat16().float().expand(shape[0], kind.groups(shape[1])).contiguous()
    zero = torch.zeros_like(scale) if kind.symmetric else (-low / scale).round().clamp(0, kind.highest)
    values = decode(encode(matrix, Grid(kind, scale, zero)), shape[1], kind)
    assert ((values - matrix).abs() <= (0.5 if kind.symmetric else 1.0) * scale[:, :1] * (1 + 1e-5)).all()


@cases
def test_the_search_is_no_worse_than_the_whole_range_in_any_group(name, shape, seed):
    kind, (matrix, importance) = FORMATS[name], matrix_of(shape, seed)
    grid = search_grid(matrix, importance, kind)
    codes = range(kind.lowest, kind.highest + 1)
    for row, start in itertools.product(range(shape[0]), range(0, shape[1], kind.width(shape[1]))):
        columns = slice(start, start + kind.width(shape[1]))
        group, h = matrix[row, columns].double(), importance[columns]
        low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
        step = max(-low, high) / kind.highest if kind.symmetric else (high - low) / kind.highest
        step = float(torch.tensor(step).bfloat16()) or 1.0
        zero = 0 if kind.symmetric else min(max(round(-low / step), 0), kind.highest)
        whole = torch.tensor([step * (code - zero) for code in codes], dtype=torch.float64)
        index = start // kind.width(shape[1])
        chosen = float(grid.scale[row, index])
        points = torch.tensor([chosen * (code - float(grid.zero[row, index])) for code in codes], dtype=torch.float64)
        error, naive = (
            float((h * (group[:, None] - p).abs().amin(-1).square()).sum()) for p in (points, whole)
        )  # to the nearest point, found among all
        assert error <= naive * (1 + 1e-4) + 1e-12 * float(group.square().sum())


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_of_zeros_stays_one(name):
    zeros = torch.zeros(3, 70)
    assert not decode(encode(zeros, search_grid(zeros, torch.ones(70), FORMATS[name])), 70, FORMATS[name]).any()


def test_a_number_that_counts_for_nothing_does_not_widen_the_grid():
    matrix = torch.linspace(-1, 1, 64)[None].clone()
    matrix[0, 3] = 2.0
    plain, blind = (
        search_grid(matrix, torch.ones(64) if counts else (torch.arange(64) != 3).double(), FORMATS["int8"])
        for counts in (True, False)
    )
    assert float(blind.scale[0, 0]) < float(plain.scale[0, 0])


def test_fewer_bits_take_fewer_bytes():
    sizes = {name: kind.stored_bytes(384, 384) for name, kind in FORMATS.items()}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for name, kind in FORMATS.items():
        assert math.isclose(sizes[name] * 8 / 384**2, kind.bits, rel_tol=0.11)
