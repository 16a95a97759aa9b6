"""Which weights form a block: every kind of weight read as one shape, ``w_OSC``.

Linear ``[O, C]`` and convolutions ``[O, C, *kernel]`` have their reduction axis at 1; transposed layouts
(Hugging Face's ``Conv1D``, ``ConvTranspose``) have it at 0. Read as ``w_OSC`` - output channel, kernel position,
reduction axis last - a block is M neighbours on the last axis and never crosses a row, a filter or a kernel
position. With groups, C counts the input channels of one group, so that no block crosses a group either.
"""

from __future__ import annotations

from torch import Tensor


def canonical(weight: Tensor, reduction_axis: int = 1) -> Tensor:
    """Read a weight as ``w_OSC``, as a view where the memory allows it.

    >>> import torch
    >>> canonical(torch.zeros(8, 4, 3, 3)).shape, canonical(torch.zeros(8, 4)).shape
    (torch.Size([8, 9, 4]), torch.Size([8, 1, 4]))
    """
    moved = weight.movedim(reduction_axis, -1)
    return moved.unsqueeze(1) if moved.dim() == 2 else moved.flatten(1, -2)


def restore(t_OSC: Tensor, shape: tuple[int, ...], reduction_axis: int = 1) -> Tensor:
    """Undo :func:`canonical`: give the values back in the weight's own ``shape``."""
    moved = [size for axis, size in enumerate(shape) if axis != reduction_axis] + [shape[reduction_axis]]
    return t_OSC.reshape(moved).movedim(-1, reduction_axis)


def blocks(t_OSC: Tensor, m: int) -> Tensor:
    """Split the reduction axis into blocks: ``[O, S, C] -> [O, S, G, M]``."""
    return t_OSC.reshape(*t_OSC.shape[:-1], -1, m)
