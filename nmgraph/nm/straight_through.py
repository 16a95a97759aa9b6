"""Multiply with the masked weight, and let the gradient pass as if it had not been masked (STE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Zero what the mask drops; the gradient is masked with it. A dropped NaN or infinity gives 0, too."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return masked(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """Zero what the mask drops, but pass the whole gradient on.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> out = straight_through(w, torch.tensor([True, False]))
    >>> out.sum().backward(); out.detach(), w.grad
    (tensor([1., 0.]), tensor([1., 1.]))
    """
    out: Tensor = _StraightThrough.apply(weight, mask)  # type: ignore[no-untyped-call]
    return out
