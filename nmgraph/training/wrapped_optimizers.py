"""Optimizers in optimizers: Accelerate's, SAM, Lookahead, ``ZeroRedundancyOptimizer``."""

from __future__ import annotations

from torch.optim import Optimizer


def chain_of(optimizer: Optimizer) -> list[Optimizer]:
    """List an optimizer, the one it holds, and so on; the last one is what takes every step.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    >>> chain_of(sgd) == [sgd]
    True
    """
    found = [optimizer]
    while True:
        held = [value for value in vars(found[-1]).values() if isinstance(value, Optimizer) and value not in found]
        if len(held) != 1:
            return found
        found.append(held[0])
