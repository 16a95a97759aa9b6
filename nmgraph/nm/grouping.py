"""Which weights form a block: every kind of weight read as one shape, ``w_OSC``.

Linear ``[O, C]`` and convolutions ``[O, C, *kernel]`` have their reduction axis at 1; transposed layouts
(Hugging Face's ``Conv1D``, ``ConvTranspose``) have it at 0. Read as ``w_OSC`` - output channel, kernel position,
reduction axis last - a block is M neighbours on the last axis and never crosses a row, a filter or a kernel
position. With groups, C counts the input channels of one group, so that no block crosses a group either. A stack
of matrices, such as the experts of a mixture ``[E, O, C]``, has its reduction axis at -1, or at -2 where it is stored
transposed; the place in the stack then stands where a convolution has its kernel position.

:data:`FLAT` is another reading of a convolution, ``[O, 1, C * kernel]`` in memory order: blocks run along the kernel
window and then spill over input channels. Published results of SR-STE and Bi-Mask were made with it; no sparse
tensor core can use it where the kernel is larger than 1.
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

Axis: TypeAlias = "int | Literal['flat']"
FLAT: Final = "flat"


def is_axis(value: object) -> bool:
    """Tell whether a value read from a file is an :data:`Axis` of a weight; ``True`` is not 1 here.

    >>> is_axis(0), is_axis(-1), is_axis("flat"), is_axis(True), is_axis(2)
    (True, True, True, False, False)
    """
    return value == FLAT or (type(value) is int and value in (0, 1, -1, -2))


def canonical(weight: Tensor, axis: Axis = 1) -> Tensor:
    """Read a weight as ``w_OSC``, as a view where the memory allows it.

    >>> import torch
    >>> canonical(torch.zeros(8, 4, 3, 3)).shape, canonical(torch.zeros(8, 4)).shape
    (torch.Size([8, 9, 4]), torch.Size([8, 1, 4]))
    >>> canonical(torch.zeros(8, 4, 3, 3), FLAT).shape
    torch.Size([8, 1, 36])
    >>> canonical(torch.zeros(3, 8, 4), -1).shape, canonical(torch.zeros(3, 4, 8), -2).shape
    (torch.Size([8, 3, 4]), torch.Size([8, 3, 4]))
    """
    if axis == FLAT:
        return weight.flatten(1).unsqueeze(1)
    if axis < 0:
        return (weight if axis == -1 else weight.mT).flatten(0, -3).movedim(-2, 0)
    moved = weight.movedim(axis, -1)
    return moved.unsqueeze(1) if moved.dim() == 2 else moved.flatten(1, -2)


def canonical_shape(shape: tuple[int, ...], axis: Axis = 1) -> tuple[int, int, int]:
    """Give the shape of :func:`canonical` of a weight of such a ``shape``.

    >>> canonical_shape((8, 4, 3, 3)), canonical_shape((8, 4, 3, 3), FLAT)
    ((8, 9, 4), (8, 1, 36))
    """
    if axis == FLAT:
        return shape[0], 1, math.prod(shape[1:])
    if axis < 0:
        return shape[-3 - axis], math.prod(shape[:-2]), shape[axis]
    outputs, *kernel = (size for place, size in enumerate(shape) if place != axis)
    return outputs, math.prod(kernel), shape[axis]


def restore(t_OSC: Tensor, shape: tuple[int, ...], axis: Axis = 1) -> Tensor:
    """Undo :func:`canonical`: give the values back in the weight's own ``shape``."""
    if axis == FLAT:
        return t_OSC.reshape(shape)
    if axis < 0:
        stacked = t_OSC.movedim(0, -2)
        return (stacked if axis == -1 else stacked.mT).reshape(shape)
    moved = [size for place, size in enumerate(shape) if place != axis] + [shape[axis]]
    return t_OSC.reshape(moved).movedim(-1, axis)


def restore_like(weight: Tensor, t_OSC: Tensor, axis: Axis = 1) -> Tensor:
    """Undo :func:`canonical` of ``weight``: give the values in its shape and its memory format."""
    out = restore(t_OSC, tuple(weight.shape), axis)
    # A mask is sorted along C; without this, a convolution would be handed a channels_last weight, choose other
    # kernels for it, and answer with another memory format than the layer had before. For 1x1 kernels, too,
    # where is_contiguous() is true of both.
    if _has_plain_strides(weight):
        return out.reshape(-1).view(weight.shape)
    if weight.dim() == 4:
        return out.contiguous(memory_format=torch.channels_last)
    return out


def _has_plain_strides(t: Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


def memory_order(t: Tensor) -> list[int]:
    """List the axes of a tensor as they lie in memory, the one with the largest steps first.

    >>> import torch
    >>> memory_order(canonical(torch.zeros(8, 4, 3, 3))), memory_order(canonical(torch.zeros(8, 4)))
    ([0, 2, 1], [0, 1, 2])
    """
    return sorted(range(t.dim()), key=lambda axis: -t.stride()[axis])


def in_memory_order(t: Tensor, order: list[int]) -> Tensor:
    """Arrange a tensor by :func:`memory_order`, its own or another's: contiguous, a view if it can be."""
    return t.permute(order).contiguous()


def out_of_memory_order(laid: Tensor, order: list[int]) -> Tensor:
    """Undo :func:`in_memory_order`, as a view.

    >>> import torch
    >>> w_OSC = canonical(torch.randn(8, 4, 3, 3))
    >>> order = memory_order(w_OSC)
    >>> back = out_of_memory_order(in_memory_order(w_OSC, order), order)
    >>> torch.equal(back, w_OSC), back.stride() == w_OSC.stride()
    (True, True)
    """
    return laid.permute([order.index(axis) for axis in range(laid.dim())])


def blocks(t_OSC: Tensor, m: int) -> Tensor:
    """Split the reduction axis into blocks: ``[O, S, C] -> [O, S, G, M]``."""
    return t_OSC.reshape(*t_OSC.shape[:-1], t_OSC.shape[-1] // m, m)
