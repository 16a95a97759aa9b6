"""Flags, eight to a byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmgraph.nm.packing import pack_bits, unpack_bits

FLAGS = hnp.arrays("bool", st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)))


@settings(deadline=None)
@given(FLAGS)
def test_unpacking_gives_back_what_was_packed(flags):
    flags = torch.from_numpy(flags)
    assert torch.equal(unpack_bits(pack_bits(flags), flags.shape[-1]), flags)


@settings(deadline=None)
@given(FLAGS)
def test_eight_flags_take_a_byte_and_unused_bits_are_zero(flags):
    packed = pack_bits(torch.from_numpy(flags))
    length = flags.shape[-1]
    assert packed.dtype == torch.uint8
    assert packed.shape == (*flags.shape[:-1], -(-length // 8))
    assert not unpack_bits(packed, 8 * packed.shape[-1])[..., length:].any()


@pytest.mark.parametrize(
    ("flags", "packed"),
    [
        ([True, False, True], [5]),
        ([True] * 8, [255]),
        ([False] * 7 + [True], [128]),
        ([False] * 8 + [True], [0, 1]),
    ],
)
def test_flag_8b_plus_i_is_bit_i_of_byte_b(flags, packed):
    assert pack_bits(torch.tensor(flags)).tolist() == packed
