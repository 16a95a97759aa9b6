"""The one thing a method may ask of an optimizer: to forget single weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_NO_MOMENTS = frozenset({"step", "step_size"})  # Rprop's step sizes: a weight with one of 0 would never move again


def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, restart: Tensor) -> None:
    """Set an optimizer's moments of some weights to what they are before the first step, mostly zero.

    A moment is a floating-point tensor of the parameter's shape in the optimizer's state (momentum buffers, averages
    of gradients and of their squares, maxima of these). What has another shape is shared among weights - Adafactor's
    rows and columns, L-BFGS's history - or encoded, and is left alone.

    Args:
        optimizer: any torch optimizer.
        parameter: whose state.
        restart: bool of the parameter's shape, the weights to forget.
    """
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    for name, moment in optimizer.state.get(parameter, {}).items():
        is_moment = isinstance(moment, Tensor) and moment.is_floating_point() and moment.shape == parameter.shape
        if is_moment and name not in _NO_MOMENTS:
            beginning = group.get("initial_accumulator_value", 0.0) if name == "sum" else 0.0  # Adagrad's
            with torch.no_grad():
                moment.masked_fill_(restart, beginning)
