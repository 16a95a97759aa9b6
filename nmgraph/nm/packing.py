"""Flags, eight to a byte; and N:M weights as the values they keep and where these lie.

Flags:

    byte b of a row holds flags 8b .. 8b+7; flag 8b+i is bit i (value 1 << i)

so that ``[True, False, True]`` packs to ``[5]``. Unused high bits are 0.

A compressed weight is ``w_OSC`` cut into blocks of M. Each block gives exactly N values and their N positions, which
ascend; a block with fewer non-zeros is filled up with its first zeros. The positions of all blocks, in memory order
of ``[O, S, G, N]``, are one stream of numbers of ``ceil(log2 M)`` bits, lowest bit first, without gaps:

    M        bits  eight positions p0 .. p7 take   bit i of position k is bit (k * bits + i) of the stream
    2        1     1 byte                          bit t of the stream is bit t % 8 (value 1 << t % 8)
    3-4      2     2 bytes                         of byte t // 8
    5-8      3     3 bytes                         unused high bits of the last byte are 0
    9-16     4     4 bytes
    17-32    5     5 bytes

At 2:4, where a byte holds the four positions of two blocks:

    bit      7   6   5   4   3   2   1   0
    holds    [ p3 ]  [ p2 ]  [ p1 ]  [ p0 ]        p0 < p1 of the first block, p2 < p3 of the second

so that ``[[0, 1, 0, 2], [3, 0, 4, 0]]`` gives the values ``[[1, 2], [3, 4]]``, the positions ``[[1, 3], [0, 2]]`` and
the byte ``0b10_00_11_01``, 141.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nmgraph.errors import PatternError
from nmgraph.nm.fused import top_n
from nmgraph.nm.grouping import blocks
from nmgraph.nm.pattern import Pattern

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_WEIGHTS = 1 << 20  # at once; in between, a kept weight takes eight bytes


def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack bool ``[..., K]`` into uint8 ``[..., ceil(K / 8)]``.

    >>> pack_bits(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8))
    bits = padded.reshape(*padded.shape[:-1], padded.shape[-1] // 8, 8)
    return (bits * _bit_values(flags.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed_B: Tensor, length: int) -> Tensor:
    """Undo :func:`pack_bits`: uint8 ``[..., B]`` to bool ``[..., length]``."""
    bits = (packed_B.unsqueeze(-1) & _bit_values(packed_B.device)) != 0
    return bits.flatten(-2)[..., :length]


def position_bits(m: int) -> int:
    """Give the bits of one position in a block of ``m``: ceil(log2 m)."""
    return (m - 1).bit_length()


def packed_bytes(positions: int, m: int) -> int:
    """Give the bytes that so many positions take."""
    return -(-positions * position_bits(m) // 8)


def pack_positions(positions: Tensor, m: int) -> Tensor:
    """Pack numbers below ``m`` into one stream of bits.

    Args:
        positions: uint8, of any shape, K numbers.
        m: size of a block.

    Returns:
        uint8 ``[packed_bytes(K, m)]``.

    >>> pack_positions(torch.tensor([1, 3, 0, 2], dtype=torch.uint8), 4)
    tensor([141], dtype=torch.uint8)
    """
    bits, count = position_bits(m), positions.numel()
    # Eight of them, a byte each, are read as one number (lowest byte first, as on every machine that torch is built
    # for), whose neighbours are pushed together: pairs, then fours, then all eight.
    words = torch.nn.functional.pad(positions.flatten(), (0, -count % 8)).view(torch.int64)
    for width, held in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
        low = _every(2 * width, held)
        words = words & low | (words & low << width) >> (width - held)
    return words.view(torch.uint8).view(-1, 8)[:, :bits].flatten()[: packed_bytes(count, m)]


def unpack_positions(packed_B: Tensor, count: int, m: int) -> Tensor:
    """Undo :func:`pack_positions`: uint8 ``[B]`` to uint8 ``[count]``."""
    bits = position_bits(m)
    eights = packed_B.new_zeros(-(-count // 8), 8)
    eights[:, :bits] = torch.nn.functional.pad(packed_B, (0, -len(packed_B) % bits)).view(-1, bits)
    words = eights.view(torch.int64).flatten()
    for width, held in ((32, 4 * bits), (16, 2 * bits), (8, bits)):
        low = _every(2 * width, held)
        words = words & low | (words & low << held) << (width - held)
    return words.view(torch.uint8)[:count]


def _every(width: int, held: int) -> int:
    """Give the number of 64 bits whose lowest ``held`` bits of every ``width`` are set."""
    return sum(((1 << held) - 1) << start for start in range(0, 64, width))


def compress(w_OSC: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Keep the N values of every block and their positions.

    What counts as zero is all bits zero: a negative zero is kept as a value, so that nothing at all is lost.

    Args:
        w_OSC: a weight of any dtype that keeps to the pattern; its last axis must be a multiple of M.
        pattern: N:M.

    Returns:
        values ``[O, S, G, N]`` of the weight's dtype, and packed positions, uint8 ``[packed_bytes(O * S * G * N, M)]``.

    Raises:
        PatternError: if a block keeps more than N, or M does not divide the axis.

    >>> values, packed = compress(torch.tensor([[[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 4.0, 0.0]]]), Pattern(2, 4))
    >>> values.flatten(), packed
    (tensor([1., 2., 3., 4.]), tensor([141], dtype=torch.uint8))
    """
    if not pattern.divides(w_OSC.shape[-1]):
        raise PatternError(f"{pattern.misfit(w_OSC.shape[-1])}.")
    words = w_OSC.detach().contiguous().view(_BITS[w_OSC.element_size()]).flatten()
    starts = _block_starts(words, pattern)
    values = words.new_empty(len(words) // pattern.m * pattern.n)
    packed = torch.empty(packed_bytes(len(values), pattern.m), dtype=torch.uint8, device=words.device)
    for dense, kept, bits in _chunks(words, values, packed, pattern):
        at = _kept_places(dense.bool(), pattern)
        torch.index_select(dense, 0, at, out=kept)
        positions = at.sub_(starts[: len(at)])
        if len(at) and not (int(positions.min()) >= 0 and int(positions.max()) < pattern.m):
            raise PatternError(f"a block keeps more than {pattern.n} of {pattern.m} weights.")
        bits.copy_(pack_positions(positions.to(torch.uint8), pattern.m))
    groups = w_OSC.shape[-1] // pattern.m
    return values.view(w_OSC.dtype).view(*w_OSC.shape[:-1], groups, pattern.n), packed


def decompress(values_OSGN: Tensor, packed_B: Tensor, pattern: Pattern) -> Tensor:
    """Undo :func:`compress`, bit by bit.

    Args:
        values_OSGN: the kept values.
        packed_B: uint8, their positions.
        pattern: N:M.

    Returns:
        ``w_OSC`` of the values' dtype.

    Raises:
        PatternError: if there are more or fewer positions than values, or those of a block do not ascend below M.
    """
    outputs, kernel, groups, _ = values_OSGN.shape
    if len(packed_B) != packed_bytes(values_OSGN.numel(), pattern.m):
        raise PatternError(f"{len(packed_B)} bytes of positions do not fit {values_OSGN.numel()} values at {pattern}.")
    words = values_OSGN.contiguous().view(_BITS[values_OSGN.element_size()]).flatten()
    dense = words.new_zeros(outputs * kernel * groups * pattern.m)
    starts = _block_starts(dense, pattern)
    for chunk, kept, bits in _chunks(dense, words, packed_B, pattern):
        positions = unpack_positions(bits, len(kept), pattern.m)
        at = positions + starts[: len(kept)]
        # Blocks follow each other, so that what ascends within each of them ascends throughout.
        if len(kept) and not (int(positions.max()) < pattern.m and bool((at[1:] > at[:-1]).all())):
            raise PatternError(_first_disorder(values_OSGN.shape, packed_B, pattern))
        chunk.scatter_(0, at, kept)
    return dense.view(values_OSGN.dtype).view(outputs, kernel, groups * pattern.m)


def _chunk(m: int) -> int:
    """Give how many weights to take at once: whole blocks, eight or a multiple, whose positions fill whole bytes."""
    return max(1, _CHUNK_WEIGHTS // (8 * m)) * 8 * m


def _chunks(dense: Tensor, kept: Tensor, packed: Tensor, pattern: Pattern) -> Iterator[tuple[Tensor, ...]]:
    """Cut dense weights, kept weights and packed positions, all flat, alongside each other; they are views."""
    weights = _chunk(pattern.m)
    values = weights // pattern.m * pattern.n
    sizes = weights, values, packed_bytes(values, pattern.m)
    return zip(*(torch.split(flat, size) for flat, size in zip((dense, kept, packed), sizes, strict=True)), strict=True)


def _block_starts(w: Tensor, pattern: Pattern) -> Tensor:
    """Give, for each kept weight of one chunk, the place in the chunk where its block starts."""
    starts = torch.arange(0, min(w.numel(), _chunk(pattern.m)), pattern.m, device=w.device)
    return starts.unsqueeze(1).expand(-1, pattern.n).flatten()


def _kept_places(kept: Tensor, pattern: Pattern) -> Tensor:
    """Give the indices of what to store: what is kept, and the first zeros of blocks that keep fewer than N."""
    at = _where(kept)
    if len(at) == len(kept) // pattern.m * pattern.n:
        return at
    return _where(_filled(blocks(kept, pattern.m), pattern).flatten())


def _where(flags: Tensor) -> Tensor:
    """Give the indices of the true ones; on the CPU numpy finds them eight times as fast as torch does."""
    if flags.is_cpu:
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero().flatten()


def _filled(kept_GM: Tensor, pattern: Pattern) -> Tensor:
    """Keep the first zeros, too, of blocks that keep fewer than N."""
    counts_G = kept_GM.sum(-1)
    if int(counts_G.max()) > pattern.n:
        raise PatternError(f"a block keeps {int(counts_G.max())} of {pattern.m} weights; {pattern} allows {pattern.n}.")
    short_G = counts_G < pattern.n
    kept_GM[short_G] = top_n(kept_GM[short_G].to(torch.uint8), pattern.n)
    return kept_GM


def _first_disorder(shape_OSGN: tuple[int, ...], packed_B: Tensor, pattern: Pattern) -> str:
    positions_OSGN = unpack_positions(packed_B, math.prod(shape_OSGN), pattern.m).view(shape_OSGN)
    wrong_OSG = (positions_OSGN >= pattern.m).any(-1) | (positions_OSGN.int().diff(dim=-1) <= 0).any(-1)
    o, s, g = wrong_OSG.nonzero()[0].tolist()
    found = ", ".join(map(str, positions_OSGN[o, s, g].tolist()))
    return (
        f"block {g} of output {o}, position {s} stores the positions {found}; they must ascend and be below {pattern.m}"
    )
