"""Send a layer's input gradient through a weight of its own (``Operand.backward``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as conv_grad

from nmgraph.compilation import is_plain
from nmgraph.layers.kinds import is_transposed_convolution, layer_base

InputGradient = Callable[[Tensor, Tensor], Tensor]

# The product, and what gives its input gradient: of a transposed convolution that is a convolution.
_CONVOLUTIONS: dict[type[nn.Module] | None, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Conv1d: (F.conv1d, conv_grad.conv1d_input),
    nn.Conv2d: (F.conv2d, conv_grad.conv2d_input),
    nn.Conv3d: (F.conv3d, conv_grad.conv3d_input),
    nn.ConvTranspose1d: (F.conv_transpose1d, F.conv1d),
    nn.ConvTranspose2d: (F.conv_transpose2d, F.conv2d),
    nn.ConvTranspose3d: (F.conv_transpose3d, F.conv3d),
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


class _RouteInPlace(_Route):
    """:class:`_Route` without a copy of ``y``, for what autograd alone looks at."""

    @staticmethod
    def forward(y: Tensor, x: Tensor, weight: Tensor, input_gradient: InputGradient) -> Tensor:
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, InputGradient], output: Tensor) -> None:
        _Route.setup_context(ctx, inputs, output)
        ctx.mark_dirty(inputs[0])


def split_forward(
    layer: Any, x: Tensor, forward: Tensor, backward: Tensor, output_size: Sequence[int] | None = None
) -> Tensor:
    """Compute ``Y = X forwardᵀ`` with ``dX = dY backward``; the weight's gradient is that of ``forward``.

    Args:
        layer: of a known kind; gives bias, stride, padding, dilation and groups; its own weight is not used.
        x: the layer's input.
        forward: weight of the product, in the layer's shape.
        backward: weight of the input gradient, in the layer's shape.
        output_size: of a transposed convolution.
    """
    if isinstance(layer, nn.Linear):
        y = F.linear(x.detach(), forward, layer.bias)
        return _routed(y, x, backward, lambda dy, weight: dy @ weight)
    base = layer_base(layer)
    if base not in _CONVOLUTIONS:  # Hugging Face's Conv1D
        y = F.linear(x.detach(), forward.t(), layer.bias)
        return _routed(y, x, backward, lambda dy, weight: dy @ weight.t())
    if x.dim() < backward.dim():
        return split_forward(layer, x.unsqueeze(0), forward, backward, output_size).squeeze(0)
    convolve, conv_input = _CONVOLUTIONS[base]
    if is_transposed_convolution(layer):
        spatial = x.dim() - 2
        extra = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
        )
        y = convolve(x.detach(), forward, layer.bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)

        def gathered(dy: Tensor, weight: Tensor) -> Tensor:
            # The output may have been padded beyond what the convolution of it needs.
            dx = conv_input(dy, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            for axis, size in enumerate(x.shape[2:], start=2):
                dx = dx.narrow(axis, 0, size)
            return dx

        return _routed(y, x, backward, gathered)
    padding: tuple[int, ...] | int
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = 0
    else:
        padding = layer.padding
    y = convolve(x.detach(), forward, layer.bias, layer.stride, padding, layer.dilation, layer.groups)

    def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
        return conv_input(x.shape, weight, dy, layer.stride, padding, layer.dilation, layer.groups)

    return _routed(y, x, backward, input_gradient)


def _routed(y: Tensor, x: Tensor, weight: Tensor, input_gradient: InputGradient) -> Tensor:
    route = _RouteInPlace if is_plain(y, x) else _Route
    out: Tensor = route.apply(y, x, weight.detach(), input_gradient)  # type: ignore[no-untyped-call]
    return out
