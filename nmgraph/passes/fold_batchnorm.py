"""Fold batch norms into the convolutions before them, for inference: a scale of each output channel moves no zero."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nmgraph.layers.kinds import is_transposed_convolution
from nmgraph.passes.structure import owner_of
from nmgraph.passes.trace import trace

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold_batchnorms(model: nn.Module) -> tuple[str, ...]:
    """Fold every batch norm that directly follows a convolution, in place; it becomes an identity.

    A pair is folded where a graph shows that nothing else sees what is between the two, and that both are called once. Where
    the model has no graph, those of its parts are read.

    Args:
        model: of ordinary layers, in eval mode.

    Returns:
        The names of the folded norms.
    """
    traced = trace(model)
    if traced.graph is None:
        parts = ((name, fold_batchnorms(child)) for name, child in model.named_children())
        return tuple(f"{name}.{inner}" for name, folded in parts for inner in folded)
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    pairs = [
        pair for node in traced.graph.nodes if (pair := _pair(model, node)) and calls[pair[0]] == calls[pair[1]] == 1
    ]
    for convolution, norm in pairs:
        _fold(model.get_submodule(convolution), model.get_submodule(norm))
        owner, key = owner_of(model, norm.rpartition(".")[0])[0], norm.rpartition(".")[2]
        owner._modules[key] = nn.Identity()
    return tuple(norm for _, norm in pairs)


def _pair(model: nn.Module, node: fx.Node) -> tuple[str, str] | None:
    """Name the convolution and the norm of a node, if it calls a norm right behind a convolution."""
    source = node.args[0] if node.op == "call_module" and node.args else None
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
        return None
    layer, norm = model.get_submodule(str(source.target)), model.get_submodule(str(node.target))
    foldable = type(layer) in _CONVOLUTIONS and not (is_transposed_convolution(layer) and layer.groups != 1)
    watched = any((m._forward_hooks or m._forward_pre_hooks) for m in (layer, norm))
    if not foldable or watched or type(norm) not in _NORMS or norm.running_mean is None or norm.training:
        return None
    return str(source.target), str(node.target)


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    weight, bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
        transpose=is_transposed_convolution(layer),
    )  # fmt: skip
    layer.weight.copy_(weight + 0.0)  # a negative scale makes zeros negative ones
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
