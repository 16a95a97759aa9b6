"""A masked weight as both products of a layer want it on sparse tensor cores: for ``Y = X Wᵀ``, and for ``dX = dY W``.

The first multiplies by ``W``, the second by ``Wᵀ``, whose N:M has to run along the outputs then. Half precision, another row
order, another mask and the transposed layout are each a pass over memory; on a GPU one kernel does them all in one.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from nmgraph.compilation import is_plain
from nmgraph.nm.pattern import Pattern
from nmgraph.nm.permutation import column_sparse

_READ = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST = 16  # rows of a block that a thread's registers hold


def both_ways(
    w_OC: Tensor,
    dtype: torch.dtype,
    order_O: Tensor | None,
    pattern: Pattern | None,
    *,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Give a masked weight for the forward product, and transposed for the input gradient's.

    Args:
        w_OC: zero where the forward mask is; of any strides.
        dtype: of the result, bfloat16 or float16; casts round to nearest even.
        order_O: int64, row ``i`` of the permuted weight is row ``order_O[i]`` of the weight; None for its own order.
        pattern: what :func:`~nmgraph.nm.permutation.column_sparse` leaves of the columns of the permuted weight; None
            where they hold it already, as a transposable mask's do.
        fused: whether one kernel writes both, which needs Triton, a weight of float32 or half precision, and M of 2, 4, 8
            or 16; by default where all that is so, on a GPU.

    Returns:
        ``[O, C]`` in the weight's own row order, and ``[C, O]`` in the permuted one; new, contiguous, without a gradient.

    >>> w = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
    >>> forward, backward = both_ways(w, torch.float16, torch.tensor([0, 2, 1, 3]), Pattern(1, 2))
    >>> backward
    tensor([[1., 0., 2., 0.],
            [0., 3., 0., 4.]], dtype=torch.float16)
    """
    w_OC = w_OC.detach()
    forward_OC, backward_CO = (w_OC.new_empty(shape, dtype=dtype) for shape in (w_OC.shape, w_OC.shape[::-1]))
    if can_fuse(w_OC, pattern) if fused is None else fused:
        from nmgraph.nm.both_ways_triton import write_both_ways

        n, m = (pattern.n, pattern.m) if pattern else (1, 1)
        write_both_ways(forward_OC, backward_CO, w_OC, order_O, n, m)
    else:
        forward_OC.copy_(w_OC)
        backward_CO.copy_(_in_order(w_OC, order_O, pattern).t())
    return forward_OC, backward_CO


def can_fuse(w_OC: Tensor, pattern: Pattern | None) -> bool:
    """Tell whether one kernel can write both."""
    m = pattern.m if pattern else 1
    known = w_OC.dtype in _READ and m <= _LONGEST and m.bit_count() == 1
    return w_OC.is_cuda and known and is_plain(w_OC) and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _in_order(w_OC: Tensor, order_O: Tensor | None, pattern: Pattern | None) -> Tensor:
    """Permute the rows, and keep N of every M of them; ``[O, C]``."""
    if pattern is not None:
        own_O = torch.arange(len(w_OC), device=w_OC.device)
        w_OC = column_sparse(w_OC.unsqueeze(1), own_O if order_O is None else order_O, pattern).squeeze(1)
    return w_OC if order_O is None else w_OC.index_select(0, order_O)
