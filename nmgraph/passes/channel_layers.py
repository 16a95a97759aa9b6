"""Layers: what each does to the channels that come in, and which axes of its parameters lie in their order.

A rule takes the layer's input - Features, or OPAQUE - and gives its output; None where it is not certain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from torch import nn

from nmgraph.passes.channel_claims import Claims, Features, Value, flattened, is_one
from nmgraph.passes.channel_runs import Run, size

Rule: TypeAlias = "Callable[[Claims, Any, Features | str, str], Value | None]"
MODULES: dict[type[nn.Module], Rule] = {}


def _layer(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    def note(rule: Rule) -> Rule:
        MODULES.update(dict.fromkeys(kinds, rule))
        return rule

    return note


def _entering(x: Features | str, axis: int, channels: int) -> tuple[Run, ...] | None:
    """Give the runs that a layer reads; of an unknown tensor, runs that stay; None if the axes don't agree."""
    if not isinstance(x, Features):
        return (Run(channels, "its input could not be followed to a layer"),)
    return x.runs if x.axis == axis and size(x.runs) == channels else None


@_layer(nn.Linear)
def _linear(claims: Claims, layer: nn.Linear, x: Features | str, name: str) -> Value | None:
    runs = _entering(x, -1, layer.in_features)
    if runs is None:
        return None
    out = (Run(layer.out_features),)
    claims.claim(f"{name}.weight", layer.weight, 1, runs, "reads", "linear")
    claims.claim(f"{name}.weight", layer.weight, 0, out, "writes", "linear")
    claims.claim(f"{name}.bias", layer.bias, 0, out, "carries", "bias")
    known = isinstance(x, Features)
    return Features(out, -1, x.rank if known else None, known and x.single)  # type: ignore[union-attr]


@_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv(claims: Claims, layer: Any, x: Features | str, name: str) -> Value | None:
    spatial = len(layer.kernel_size)
    runs = _entering(x, -spatial - 1, layer.in_channels)
    if runs is None or (isinstance(x, Features) and x.rank not in (None, spatial + 2)):
        return None
    single = isinstance(x, Features) and x.single and _keeps_single(layer)
    kind = "transposed" if layer.transposed else "conv"
    out: tuple[Run, ...]
    if layer.groups == 1:
        out = (Run(layer.out_channels),)
        claims.claim(f"{name}.weight", layer.weight, int(not layer.transposed), runs, "reads", kind)
        claims.claim(f"{name}.weight", layer.weight, int(layer.transposed), out, "writes", kind)
    elif layer.groups == layer.in_channels == layer.out_channels:
        out = runs
        claims.claim(f"{name}.weight", layer.weight, 0, out, "carries", f"depthwise {kind}")
    else:
        return None  # channels may move within their group only
    claims.claim(f"{name}.bias", layer.bias, 0, out, "carries", "bias")
    return Features(out, -spatial - 1, spatial + 2, single)


def _keeps_single(layer: Any) -> bool:
    unpadded = layer.padding in ("same", "valid") or not any(layer.padding)
    return not layer.transposed and unpadded and all(k == 1 for k in layer.kernel_size)


@_layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
        nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # fmt: skip
def _batch_norm(claims: Claims, layer: Any, x: Features | str, name: str) -> Value | None:
    if not isinstance(x, Features) or x.rank is None or x.axis != 1 - x.rank or size(x.runs) != layer.num_features:
        return None
    for key in ("weight", "bias", "running_mean", "running_var"):
        claims.claim(f"{name}.{key}", getattr(layer, key), 0, x.runs, "carries", "norm")
    return x


@_layer(nn.GroupNorm)
def _group_norm(claims: Claims, layer: nn.GroupNorm, x: Features | str, name: str) -> Value | None:
    one_each = layer.num_groups in (1, layer.num_channels)  # any other group has its own mean
    known = isinstance(x, Features) and x.rank is not None and x.axis == 1 - x.rank
    if not (known and one_each and isinstance(x, Features) and size(x.runs) == layer.num_channels):
        return None
    for key in ("weight", "bias"):
        claims.claim(f"{name}.{key}", getattr(layer, key), 0, x.runs, "carries", "norm")
    return x


@_layer(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(claims: Claims, layer: Any, x: Features | str, name: str) -> Value | None:
    if not isinstance(x, Features) or x.axis != -1 or tuple(layer.normalized_shape) != (size(x.runs),):
        return None
    for key in ("weight", "bias"):
        claims.claim(f"{name}.{key}", getattr(layer, key, None), 0, x.runs, "carries", "norm")
    return x


@_layer(nn.PReLU)
def _prelu(claims: Claims, layer: nn.PReLU, x: Features | str, name: str) -> Value | None:
    if not isinstance(x, Features):
        return None
    if layer.num_parameters > 1:
        if x.rank is None or x.axis != 1 - x.rank or size(x.runs) != layer.num_parameters:
            return None
        claims.claim(f"{name}.weight", layer.weight, 0, x.runs, "carries", "prelu")
    return x


@_layer(nn.Identity, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid,
        nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Softsign, nn.LogSigmoid,
        nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold,
        nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)  # fmt: skip
def _same(claims: Claims, layer: nn.Module, x: Features | str, name: str) -> Value | None:
    return x


def _pooling(spatial: int) -> Rule:
    def pool(claims: Claims, layer: Any, x: Features | str, name: str) -> Value | None:
        if not isinstance(x, Features) or x.axis != -spatial - 1 or getattr(layer, "return_indices", False):
            return None
        return replace(x, single=is_one(getattr(layer, "output_size", 0)))

    return pool


for _spatial, _d in ((1, "1d"), (2, "2d"), (3, "3d")):
    for _pool in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
        MODULES[getattr(nn, _pool + _d)] = _pooling(_spatial)
    for _pad in ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
        MODULES[getattr(nn, _pad + _d)] = _pooling(_spatial)


@_layer(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def _upsample(claims: Claims, layer: nn.Module, x: Features | str, name: str) -> Value | None:
    certain = isinstance(x, Features) and x.rank is not None and x.axis == 1 - x.rank
    return replace(x, single=False) if certain and isinstance(x, Features) else None


@_layer(nn.Flatten)
def _flatten_layer(claims: Claims, layer: nn.Flatten, x: Features | str, name: str) -> Value | None:
    return flattened(x, layer.start_dim, layer.end_dim) if isinstance(x, Features) else None
