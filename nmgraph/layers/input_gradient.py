"""Send a layer's input gradient through a weight of its own (``Operand.backward``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as conv_grad

InputGradient = Callable[[Tensor, Tensor], Tensor]

_CONV_INPUT_GRADIENTS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: conv_grad.conv1d_input,
    nn.Conv2d: conv_grad.conv2d_input,
    nn.Conv3d: conv_grad.conv3d_input,
}


class _Route(torch.autograd.Function):
    """Give ``y`` through unchanged; add to the gradient of ``x`` what ``y``'s gradient makes of ``weight``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor, weight: Tensor, input_gradient: InputGradient) -> Tensor:
        return y.clone()  # a view could not be changed in place by the activation that follows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, InputGradient], output: Tensor) -> None:
        _, x, weight, ctx.input_gradient = inputs
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return dy, None, None, None
        return dy, ctx.input_gradient(dy, weight.to(dy.dtype)).to(ctx.dtype), None, None


def split_forward(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, forward: Tensor, backward: Tensor
) -> Tensor:
    """Compute ``Y = X forwardᵀ`` with ``dX = dY backward``; the weight's gradient is that of ``forward``.

    Args:
        layer: gives bias, stride, padding, dilation and groups; its own weight is not used.
        x: the layer's input.
        forward: weight of the product, in the layer's shape.
        backward: weight of the input gradient, in the layer's shape.
    """
    if isinstance(layer, nn.Linear):
        y = F.linear(x.detach(), forward, layer.bias)
        return _routed(y, x, backward, lambda dy, weight: dy @ weight)
    if x.dim() < backward.dim():
        return split_forward(layer, x.unsqueeze(0), forward, backward).squeeze(0)
    conv_input = next(f for kind, f in _CONV_INPUT_GRADIENTS.items() if isinstance(layer, kind))
    padding: tuple[int, ...] | int
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = 0
    else:
        padding = layer.padding
    convolve = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
    conv = next(f for kind, f in convolve.items() if isinstance(layer, kind))
    y = conv(x.detach(), forward, layer.bias, layer.stride, padding, layer.dilation, layer.groups)

    def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
        return conv_input(x.shape, weight, dy, layer.stride, padding, layer.dilation, layer.groups)

    return _routed(y, x, backward, input_gradient)


def _routed(y: Tensor, x: Tensor, weight: Tensor, input_gradient: InputGradient) -> Tensor:
    out: Tensor = _Route.apply(y, x, weight.detach(), input_gradient)  # type: ignore[no-untyped-call]
    return out
