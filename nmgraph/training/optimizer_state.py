"""The one thing a method may ask of an optimizer: to forget single weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nmgraph.layers.sharding import local

_NO_MOMENTS = frozenset({"step", "step_size"})  # Rprop's step sizes: a weight with one of 0 would never move again


def clear_moments(optimizers: Sequence[Optimizer], parameter: nn.Parameter, restart: Tensor) -> list[str] | None:
    """Set an optimizer's moments of some weights to what they are before the first step, mostly zero.

    A moment is a floating-point tensor of the parameter's shape in the optimizer's state (momentum buffers, averages
    of gradients and of their squares, maxima of these). What has another shape is shared among weights - Adafactor's
    rows and columns, L-BFGS's history - or encoded, and is left alone.

    Args:
        optimizers: any torch optimizer, and those inside it.
        parameter: whose state.
        restart: bool of the parameter's shape, the weights to forget; of a sharded one this process's part.

    Returns:
        The names of what is kept of this parameter and was left alone; None if a process steps it, and keeps nothing.
    """
    if any(p is parameter for group in optimizers[-1].param_groups for p in group["params"]) and not any(
        parameter in optimizer.state for optimizer in optimizers
    ):
        return None
    left = []
    for optimizer in optimizers:
        group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
        for name, moment in optimizer.state.get(parameter, {}).items():
            if not isinstance(moment, Tensor) or name in _NO_MOMENTS or moment.numel() <= 1:
                continue
            if moment.is_floating_point() and moment.shape == parameter.shape:
                beginning = group.get("initial_accumulator_value", 0.0) if name == "sum" else 0.0  # Adagrad's
                with torch.no_grad():
                    local(moment).masked_fill_(restart, beginning)
            else:
                left.append(name)
    return left
