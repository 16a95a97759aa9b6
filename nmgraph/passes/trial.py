"""Try a layer with a forward of its own on a sparse weight: foreign code is run, not guessed at."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nmgraph.layers.kinds import has_own_forward, layer_axis
from nmgraph.passes.structure import copy_structure

_MULTIPLY = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip


def failed_trial(layer: nn.Module) -> str:
    """Say why zeros in a layer's weight would not be zeros in its product; empty if they are."""
    if not has_own_forward(type(layer)):
        return ""
    name = type(layer).__name__
    try:
        given, seen, changed = _weights_seen(layer)
    except Exception as error:
        # The layer's code is foreign; whatever it raises, the layer stays as it is.
        return f"{name} could not be tried on a sparse weight ({shorten(str(error), 160)})"
    if not seen:
        return f"{name} does not multiply by its weight in F.linear or F.conv"
    if changed:
        return f"{name} changes its weight in its forward"
    if any(used.shape != given.shape or bool((used[given == 0] != 0).any()) for used in seen):
        return f"{name} computes with a function of its weight that fills the zeros"
    return ""


class _WeightSpy(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MULTIPLY:
            self.seen.append((args[1] if len(args) > 1 else kwargs["weight"]).detach())
        return func(*args, **kwargs)


def _weights_seen(layer: nn.Module) -> tuple[Tensor, list[Tensor], bool]:
    """Run a stand-in of the layer on the CPU with a sparse weight; give that weight, those multiplied by, and whether it changed."""
    stand_in = copy_structure(
        layer, lambda t: nn.Parameter(torch.ones(t.shape)) if isinstance(t, nn.Parameter) else torch.ones(t.shape)
    )
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(stand_in, hooks).clear()
    weight = stand_in._parameters["weight"]
    assert weight is not None
    spread = torch.linspace(0.5, 1.5, weight.numel()).reshape(weight.shape)
    axis = layer_axis(layer)
    shape = [-1 if place == axis else 1 for place in range(weight.dim())]
    given = spread * (torch.arange(weight.shape[axis]) % 2 == 0).reshape(shape)
    with torch.no_grad():
        weight.copy_(given)
    if isinstance(layer, nn.Linear):
        x = torch.ones(2, layer.in_features)
    else:
        conv: Any = layer
        sizes = [d * (k - 1) + 4 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        x = torch.ones(1, conv.in_channels, *sizes)
    with torch.no_grad(), _WeightSpy() as spy:
        stand_in(x)
    after = stand_in._parameters["weight"]
    return given, spy.seen, after is None or not torch.equal(after, given)
