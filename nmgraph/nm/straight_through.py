"""Multiply with the masked weight, and let the gradient pass as if it had not been masked (STE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmgraph.compilation import is_plain
from nmgraph.nm.fused import zero_outside
from nmgraph.nm.masks import largest
from nmgraph.nm.pattern import Pattern

_LARGE = 1 << 16  # weights from which on a function of our own is worth its call


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Zero what the mask drops; the gradient is masked with it. A dropped NaN or infinity gives 0, too."""
    if weight.numel() >= _LARGE and weight.device.type == "cpu" and is_plain(weight, mask):
        out: Tensor = _Masked.apply(weight, mask)  # type: ignore[no-untyped-call]
        return out
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


class _Masked(torch.autograd.Function):
    """What ``torch.where`` does, at six times its speed on the CPU: all bits of a weight, or none."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return zero_outside(mask, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return masked(grad, ctx.saved_tensors[0]), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return masked(tangent, ctx.saved_tensors[0])


class _PassedOn(torch.autograd.Function):
    """Third input: where the gradient of the first one passes; None is everywhere."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (passes,) = ctx.saved_tensors
        return grad if passes is None else masked(grad, passes), *(None for _ in ctx.needs_input_grad[1:])


class _StraightThrough(_PassedOn):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor, passes: Tensor | None) -> Tensor:
        return masked(weight, mask)


class _Largest(_PassedOn):
    @staticmethod
    def forward(weight: Tensor, keep: int | Tensor, passes: Tensor | None, pattern: Pattern) -> Tensor:
        return largest(weight, pattern, keep)


class _Replaced(_PassedOn):
    @staticmethod
    def forward(weight: Tensor, value: Tensor, passes: Tensor | None) -> Tensor:
        return value.clone()  # a view could not be changed in place


def replaced(weight: Tensor, value: Tensor) -> Tensor:
    """Multiply by ``value``, of the shape of ``weight``, and give the whole gradient to ``weight``."""
    out: Tensor = _Replaced.apply(weight, value.detach(), None)  # type: ignore[no-untyped-call]
    return out


def largest_straight_through(w_OSC: Tensor, pattern: Pattern, keep: int | Tensor | None = None) -> Tensor:
    """Zero all but the N largest magnitudes of every block, or ``keep`` of them, but pass the whole gradient on."""
    out: Tensor = _Largest.apply(w_OSC, pattern.n if keep is None else keep, None, pattern)  # type: ignore[no-untyped-call]
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
