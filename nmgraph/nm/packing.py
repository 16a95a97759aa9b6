"""Flags, eight to a byte.

    byte b of a row holds flags 8b .. 8b+7; flag 8b+i is bit i (value 1 << i)

so that ``[True, False, True]`` packs to ``[5]``. Unused high bits are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack bool ``[..., K]`` into uint8 ``[..., ceil(K / 8)]``.

    >>> pack_bits(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8))
    bits = padded.reshape(*padded.shape[:-1], -1, 8)
    return (bits * _bit_values(flags.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed_B: Tensor, length: int) -> Tensor:
    """Undo :func:`pack_bits`: uint8 ``[..., B]`` to bool ``[..., length]``."""
    bits = (packed_B.unsqueeze(-1) & _bit_values(packed_B.device)) != 0
    return bits.flatten(-2)[..., :length]
