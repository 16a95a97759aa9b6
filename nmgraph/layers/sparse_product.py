"""``Y = X Wᵀ`` and its gradients, with either product on sparse tensor cores where the weight is 2:4.

The kernels are NVIDIA's cuSPARSELt, through torch: ``_cslt_compress`` makes a 2:4 matrix into values and positions, and
``_cslt_sparse_mm`` multiplies it by a dense one. Both take the sparse matrix on the left with its reduction axis last, so

    y_RO  = (W_OC x_CR)ᵀ           W is 2:4 along C
    dx_RC = (W[P]ᵀ_CO dy[:, P]_OR)ᵀ   W is 2:4 along its rows, once these are in the order P

where the last transpose costs nothing, as the result is written so. What goes with P is the sum, so dx needs no
permutation back. ``dW = dYᵀ X`` is dense: neither of its factors is 2:4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DENSE = -1  # in place of an algorithm's number
_ROWS = 8  # a dense operand of half precision has a multiple of so many


class Operands(NamedTuple):
    """What the products of one layer multiply by, in half precision.

    Attributes:
        forward: ``[O, C]``, or what :func:`compress` made of it.
        forward_algorithm: cuSPARSELt's number, or ``DENSE``.
        backward: ``[O, C]`` where dense, else ``W[P]ᵀ``, ``[C, O]`` or what :func:`compress` made of it; None where no
            gradient of the input is wanted.
        backward_algorithm: likewise.
        order: P, int64 ``[O]``; None is the rows' own.
    """

    forward: Tensor
    forward_algorithm: int
    backward: Tensor | None
    backward_algorithm: int
    order: Tensor | None


def compress(w_OC: Tensor) -> Tensor:
    """Give the values and positions of a 2:4 matrix, as the kernel wants them; what is not 2:4 in it is lost.

    Args:
        w_OC: float16 or bfloat16, contiguous, 2:4 along its last axis; both sides multiples of 16.
    """
    packed: Tensor = torch._cslt_compress(w_OC)
    return packed


@torch.library.custom_op("nmgraph::multiply_24", mutates_args=())
def multiply_24(weight: Tensor, x_RC: Tensor, bias_O: Tensor | None, outputs: int, algorithm: int) -> Tensor:
    """Compute ``x Wᵀ + b`` by a 2:4 weight; ``[R, O]``.

    Args:
        weight: ``[O, C]``, or what :func:`compress` made of it.
        x_RC: contiguous, of the weight's dtype.
        bias_O: of the same dtype.
        outputs: O.
        algorithm: cuSPARSELt's number.
    """
    packed = compress(weight) if weight.numel() == outputs * x_RC.shape[1] else weight
    rows = x_RC.shape[0]
    if rows % _ROWS:
        x_RC = F.pad(x_RC, (0, 0, 0, -rows % _ROWS))
    y_RO: Tensor = torch._cslt_sparse_mm(packed, x_RC.t(), bias_O, transpose_result=True, alg_id=algorithm)
    # No view, which an activation in place could not change.
    return y_RO[:rows].clone() if rows % _ROWS else y_RO


@multiply_24.register_fake
def _(weight: Tensor, x_RC: Tensor, bias_O: Tensor | None, outputs: int, algorithm: int) -> Tensor:
    return x_RC.new_empty(x_RC.shape[0], outputs)


def _no_second_gradient(ctx: Any, dy: Tensor) -> Any:
    raise RuntimeError(
        "a gradient of a gradient was asked for, which products on sparse tensor cores do not have. Convert with "
        'hardware="off".'
    )


multiply_24.register_autograd(_no_second_gradient)


class _Multiply(torch.autograd.Function):
    """``weight`` is only there to receive the gradient: what multiplies are the operands made from it."""

    @staticmethod
    def forward(
        ctx: Any, x_RC: Tensor, weight_OC: Tensor, bias_O: Tensor | None, forward: Tensor, forward_algorithm: int,
        backward: Tensor | None, backward_algorithm: int, order: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x_RC, backward, order)
        ctx.algorithm, ctx.dtype = backward_algorithm, weight_OC.dtype
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        bias_O = None if bias_O is None else bias_O.to(x_RC.dtype)
        if forward_algorithm == DENSE:
            return F.linear(x_RC, forward, bias_O)
        y_RO: Tensor = multiply_24(forward, x_RC, bias_O, weight_OC.shape[0], forward_algorithm)
        return y_RO

    @staticmethod
    def backward(ctx: Any, dy_RO: Tensor) -> tuple[Tensor | None, ...]:
        x_RC, weight, order = ctx.saved_tensors
        dx_RC = dw_OC = db_O = None
        if ctx.needs_input_grad[0]:
            if ctx.algorithm == DENSE:
                dx_RC = dy_RO @ weight
            else:
                dyp_RO = dy_RO.contiguous() if order is None else dy_RO.index_select(1, order)
                dx_RC = multiply_24(weight, dyp_RO, None, x_RC.shape[1], ctx.algorithm)
        if ctx.needs_input_grad[1]:
            dw_OC = (dy_RO.t() @ x_RC).to(ctx.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db_O = dy_RO.sum(0).to(ctx.bias_dtype)
        return dx_RC, dw_OC, db_O, None, None, None, None, None


def multiply(x_RC: Tensor, weight_OC: Tensor, bias_O: Tensor | None, operands: Operands) -> Tensor:
    """Compute ``[R, O]`` by operands that were made from a weight; its gradient goes to the weight.

    Args:
        x_RC: contiguous, of the operands' dtype.
        weight_OC: masked, of any dtype and strides; its values are not looked at.
        bias_O: of any dtype.
        operands: of the weight.
    """
    y_RO: Tensor = _Multiply.apply(x_RC, weight_OC, bias_O, *operands)  # type: ignore[no-untyped-call]
    return y_RO
