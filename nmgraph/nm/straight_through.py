"""Multiply with the masked weight, and let the gradient pass as if it had not been masked (STE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Zero what the mask drops; the gradient is masked with it. A dropped NaN or infinity gives 0, too."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


class _PassedOn(torch.autograd.Function):
    """Third input: where the gradient of the first one passes; None is everywhere."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return grad if passes is None else masked(grad, passes), None, None


class _StraightThrough(_PassedOn):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor, passes: Tensor | None) -> Tensor:
        return masked(weight, mask)


class _Replaced(_PassedOn):
    @staticmethod
    def forward(weight: Tensor, value: Tensor, passes: Tensor | None) -> Tensor:
        return value.clone()  # a view could not be changed in place


def replaced(weight: Tensor, value: Tensor) -> Tensor:
    """Multiply by ``value``, of the shape of ``weight``, and give the whole gradient to ``weight``."""
    out: Tensor = _Replaced.apply(weight, value.detach(), None)  # type: ignore[no-untyped-call]
    return out


def straight_through(weight: Tensor, mask: Tensor, passes: Tensor | None = None) -> Tensor:
    """Zero what the mask drops, but pass the gradient on: all of it, or where ``passes`` says.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> out = straight_through(w, torch.tensor([True, False]))
    >>> out.sum().backward(); out.detach(), w.grad
    (tensor([1., 0.]), tensor([1., 1.]))
    """
    out: Tensor = _StraightThrough.apply(weight, mask, passes)  # type: ignore[no-untyped-call]
    return out
