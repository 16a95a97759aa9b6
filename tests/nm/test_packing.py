"""Flags, eight to a byte; N:M weights as kept values and packed positions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nmgraph.errors import PatternError
from nmgraph.nm import packing
from nmgraph.nm.masks import random_mask
from nmgraph.nm.packing import (
    compress,
    decompress,
    pack_bits,
    pack_positions,
    packed_bytes,
    position_bits,
    unpack_bits,
    unpack_positions,
)
from nmgraph.nm.pattern import Pattern

FLAGS = hnp.arrays("bool", st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)))
PATTERNS = st.integers(2, 32).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: Pattern(n, m)))
DTYPES = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def bits_of(tensor):
    return tensor.contiguous().view(DTYPES[tensor.dtype])


def sparse_weight(shape, pattern, dtype, seed, zeros=0.0):
    """Make a weight of any bits - NaN, infinity and negative zero, too - that keeps to the pattern."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-(2**62), 2**62, shape, generator=generator).view(torch.int16)[..., ::4].clone()
    words = noise.to(DTYPES[dtype]) * (2 ** (8 * dtype.itemsize - 16)) + 1
    kept = random_mask(shape, pattern, generator) & (torch.rand(shape, generator=generator) >= zeros)
    return (words * kept).view(dtype)


def read_positions(packed, count, m):
    """Read a stream of bits as the table says, one bit at a time."""
    bits, stream = position_bits(m), int.from_bytes(packed.numpy().tobytes(), "little")
    return [stream >> k * bits & (1 << bits) - 1 for k in range(count)]


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


@pytest.mark.parametrize(("m", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (17, 5), (32, 5)])
def test_a_position_takes_as_many_bits_as_the_table_says(m, bits):
    assert position_bits(m) == bits
    assert packed_bytes(8, m) == bits
    assert packed_bytes(9, m) == bits + 1


@given(st.integers(2, 32), st.integers(0, 70), st.integers(0, 2**32))
def test_positions_are_a_stream_of_bits_lowest_first(m, count, seed):
    positions = torch.randint(0, m, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_positions(positions, m)
    assert (packed.dtype, packed.shape) == (torch.uint8, (packed_bytes(count, m),))
    assert read_positions(packed, count, m) == positions.tolist()
    assert torch.equal(unpack_positions(packed, count, m), positions)
    if count * position_bits(m) % 8 > 0:
        assert int(packed[-1]) >> count * position_bits(m) % 8 == 0


def test_four_positions_at_2_4_take_a_byte():
    positions = torch.tensor([1, 3, 0, 2, 2, 3], dtype=torch.uint8)
    assert pack_positions(positions, 4).tolist() == [0b10_00_11_01, 0b1110]


@given(
    PATTERNS,
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6)),
    st.sampled_from(list(DTYPES)),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.2, 1.0]),
)
def test_decompressed_weights_are_bit_for_bit_what_was_compressed(pattern, shape, dtype, seed, zeros):
    outputs, kernel, groups = shape
    w_OSC = sparse_weight((outputs, kernel, groups * pattern.m), pattern, dtype, seed, zeros)
    values, packed = compress(w_OSC, pattern)
    assert (values.dtype, values.shape) == (dtype, (outputs, kernel, groups, pattern.n))
    assert packed.shape == (packed_bytes(values.numel(), pattern.m),)
    again = decompress(values, packed, pattern)
    assert again.dtype == dtype
    assert torch.equal(bits_of(again), bits_of(w_OSC))


@given(PATTERNS, st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_block_stores_its_non_zeros_and_then_its_first_zeros_in_ascending_order(pattern, seed, zeros):
    w_OSC = sparse_weight((2, 2, 3 * pattern.m), pattern, torch.float32, seed, zeros)
    values, packed = compress(w_OSC, pattern)
    positions = np.array(read_positions(packed, values.numel(), pattern.m)).reshape(-1, pattern.n)
    blocks = bits_of(w_OSC).numpy().reshape(-1, pattern.m)
    for block, places, kept in zip(blocks, positions, bits_of(values).numpy().reshape(-1, pattern.n), strict=True):
        non_zeros = np.flatnonzero(block).tolist()
        filling = np.flatnonzero(block == 0).tolist()[: pattern.n - len(non_zeros)]
        assert places.tolist() == sorted(non_zeros + filling)
        assert kept.tolist() == block[places].tolist()


@pytest.mark.parametrize("pattern", ["2:4", "1:3", "7:31"])
def test_weights_larger_than_what_is_handled_at_once_come_back(pattern, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK_WEIGHTS", 1000)
    pattern = Pattern.parse(pattern)
    w_OSC = sparse_weight((33, 2, 5 * pattern.m), pattern, torch.float32, 0, zeros=0.01)
    whole = compress(w_OSC, pattern)
    assert torch.equal(bits_of(decompress(*whole, pattern)), bits_of(w_OSC))
    monkeypatch.undo()
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(whole, compress(w_OSC, pattern), strict=True)
    )


def test_a_weight_that_is_no_contiguous_tensor_compresses():
    w_OSC = sparse_weight((8, 3, 16), Pattern(2, 4), torch.float32, 0).transpose(0, 1)
    assert torch.equal(bits_of(decompress(*compress(w_OSC, Pattern(2, 4)), Pattern(2, 4))), bits_of(w_OSC))


def test_a_parameter_compresses_to_plain_tensors():
    values, _ = compress(torch.nn.Parameter(torch.eye(4).unsqueeze(0)), Pattern(2, 4))
    assert not values.requires_grad


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[1, 2, 3, 0], [1, 2, 0, 0]], "a block keeps 3 of 4 weights; 2:4 allows 2."),
        ([[1, 2, 3, 0], [1, 0, 0, 0]], "a block keeps more than 2 of 4 weights."),
        ([[1, 0, 0, 0], [1, 2, 3, 0]], "a block keeps more than 2 of 4 weights."),
    ],
)
def test_a_weight_that_keeps_too_many_is_refused(blocks, message):
    with pytest.raises(PatternError) as caught:
        compress(torch.tensor(blocks, dtype=torch.float32).view(1, 1, 8), Pattern(2, 4))
    assert str(caught.value) == message


def test_an_axis_that_does_not_split_into_blocks_is_refused():
    with pytest.raises(PatternError) as caught:
        compress(torch.zeros(2, 1, 6), Pattern(2, 4))
    assert str(caught.value) == "6 input channels are not a multiple of 4."


@pytest.mark.parametrize(
    ("pattern", "positions", "found"),
    [
        ("2:4", [0, 1, 2, 2], "2, 2; they must ascend and be below 4"),
        ("2:4", [0, 1, 3, 2], "3, 2; they must ascend and be below 4"),
        ("2:6", [0, 1, 2, 7], "2, 7; they must ascend and be below 6"),
        ("2:6", [0, 1, 7, 2], "7, 2; they must ascend and be below 6"),
    ],
)
def test_damaged_positions_are_refused_with_the_block(pattern, positions, found):
    pattern = Pattern.parse(pattern)
    packed = pack_positions(torch.tensor(positions, dtype=torch.uint8), 2 ** position_bits(pattern.m))
    with pytest.raises(PatternError) as caught:
        decompress(torch.ones(1, 1, 2, 2), packed, pattern)
    assert str(caught.value) == f"block 1 of output 0, position 0 stores the positions {found}"


def test_too_few_positions_are_refused():
    with pytest.raises(PatternError) as caught:
        decompress(torch.ones(1, 1, 2, 2), torch.zeros(2, dtype=torch.uint8), Pattern(2, 4))
    assert str(caught.value) == "2 bytes of positions do not fit 4 values at 2:4."
