"""Codes of a few bits in bytes: nothing is lost, and nothing wasted."""

import itertools

import numpy as np
import pytest
import torch

from hf_lossless_lr.formats.packing import pack, packed_width, unpack

SHAPES = [(1, 1), (1, 7), (3, 8), (5, 9), (2, 64), (4, 65)]


@pytest.mark.parametrize(("shape", "bits"), list(itertools.product(SHAPES, range(1, 9))), ids=str)
def test_unpacking_undoes_packing_and_the_bytes_are_those_of_a_string_of_bits(shape, bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, size=shape)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], packed_width(shape[1], bits)) == (shape[0], -(-shape[1] * bits // 8))
    assert torch.equal(unpack(packed, shape[1], bits), torch.from_numpy(codes).to(torch.uint8))
    for row, stored in zip(codes, packed, strict=True):
        string = "".join(f"{code:0{bits}b}"[::-1] for code in row)  # low bits first
        expected = [int(string[start : start + 8].ljust(8, "0")[::-1], 2) for start in range(0, len(string), 8)]
        assert stored.tolist() == expected
