"""Randomness that every rank of a distributed run, and a resumed run, draws alike: from a seed that is model state."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_HEAD = 1024  # weights that a seed is made from


def seed_of(weight: Tensor, seed: int) -> Tensor:
    """Make a seed for one layer out of its weight and a user's ``seed``: int64 scalar on the weight's device.

    Layers with the same weights get the same one.
    """
    head = weight.detach().flatten()[:_HEAD].float().cpu()
    digest = zlib.crc32(repr((seed, tuple(weight.shape), head.tolist())).encode())
    return torch.tensor(digest, dtype=torch.int64, device=weight.device)


def generator(seed: Tensor, step: int = 0) -> torch.Generator:
    """Give the generator of one layer at one step. It lives on the CPU, so that devices do not differ."""
    return torch.Generator().manual_seed(int(seed) * 1_000_003 + step)
