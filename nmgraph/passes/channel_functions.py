"""Functions and methods: what each does to the channels of its arguments.

A rule reads a node, and gives what it makes; None where that is not certain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from torch import fx

from nmgraph.passes.channel_claims import NUMBER, Features, Held, Reading, Value, flattened, is_one, operation
from nmgraph.passes.channel_runs import Run, cut, join, size

Function: TypeAlias = "Callable[[Reading, fx.Node], Value | None]"
FUNCTIONS: dict[str, Function] = {}

ASKED = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "itemsize"}
ASKING = {"size", "dim", "ndimension", "numel", "get_device", "is_floating_point"}
ARITHMETIC = {
    "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge", "getitem",
    "iadd", "isub", "imul", "ifloordiv", "not_", "and_", "or_", "abs",
}  # fmt: skip


def _function(*names: str) -> Callable[[Function], Function]:
    def note(rule: Function) -> Function:
        FUNCTIONS.update(dict.fromkeys(names, rule))
        return rule

    return note


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Give the arguments behind the first one by name; None if there are others."""
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    return given if len(node.args) - 1 <= len(names) and set(given) <= set(names) else None


@_function(
    "relu", "relu_", "relu6", "gelu", "silu", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish", "hardsigmoid",
    "hardtanh", "hardtanh_", "elu", "elu_", "selu", "selu_", "celu", "celu_", "leaky_relu", "leaky_relu_", "mish",
    "softplus", "softsign", "logsigmoid", "abs", "neg", "exp", "sqrt", "rsqrt", "square", "erf", "clamp", "clamp_",
    "clip", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "contiguous",
    "clone", "detach", "float", "half", "bfloat16", "double", "to", "pow",
)  # fmt: skip
def _elementwise(flow: Reading, node: fx.Node) -> Value | None:
    return flow.first(node)


@_function("stochastic_depth")
def _stochastic_depth(flow: Reading, node: fx.Node) -> Value | None:
    return flow.first(node)  # draws per sample or once, never per channel


_IN_PLACE = {"add_", "sub_", "mul_", "div_", "iadd", "isub", "imul", "itruediv"}


@_function(
    "add", "sub", "mul", "div", "truediv", "true_divide", "subtract", "multiply", "divide", "maximum", "minimum",
    *_IN_PLACE,
)  # fmt: skip
def _binary(flow: Reading, node: fx.Node) -> Value | None:
    if len(node.args) != 2 or not set(node.kwargs) <= {"alpha"} or not flow.plain(node, *_nodes(node.args)):
        return None
    one, other = flow.of(node.args[0]), flow.of(node.args[1])
    if isinstance(one, Held):
        if operation(node) in _IN_PLACE:
            return None
        one, other = other, one
    if one is NUMBER:
        one, other = other, one
    if not isinstance(one, Features):
        return None
    if other is NUMBER:
        return one
    if isinstance(other, Held):
        return _with_held(flow, one, other)
    return _met(one, other) if isinstance(other, Features) else None


def _nodes(arguments: Any) -> tuple[fx.Node, ...]:
    return tuple(a for a in arguments if isinstance(a, fx.Node))


def _with_held(flow: Reading, x: Features, held: Held) -> Features | None:
    t, channels = held.tensor, size(x.runs)
    place = t.dim() + x.axis
    if place >= 0 and t.shape[place] not in (1, channels):
        return None
    for dim, length in enumerate(t.shape):
        if length > 1:
            runs = x.runs if dim == place else (Run(length, f"{held.name} has an order of its own"),)
            flow.claims.claim(held.name, t, dim, runs, "carries", f"held {t.dim()}")
    flat = all(length == 1 for dim, length in enumerate(t.shape) if dim != place)
    rank = None if x.rank is None else max(x.rank, t.dim())
    return Features(x.runs, x.axis, rank, x.single and flat and rank == x.rank)


def _met(one: Features, other: Features) -> Features | None:
    """Let two tensors broadcast against each other."""
    if one.axis != other.axis:
        return None
    if size(one.runs) == 1 or size(other.runs) == 1:  # a map over positions: it has no order
        wide = max(one, other, key=lambda x: size(x.runs))
    elif size(one.runs) == size(other.runs):
        join(one.runs, other.runs)
        wide = one
    else:
        return None
    rank = None if one.rank is None or other.rank is None else max(one.rank, other.rank)
    return Features(wide.runs, wide.axis, rank, one.single and other.single and one.rank == other.rank)


@_function("cat", "concat", "concatenate")
def _cat(flow: Reading, node: fx.Node) -> Value | None:
    given = _arguments(node, ("dim",))
    tensors = node.args[0] if node.args else None
    if given is None or not isinstance(tensors, (list, tuple)) or not isinstance(given.get("dim", 0), int):
        return None
    parts = [flow.of(t) for t in tensors]
    known = [p for p in parts if isinstance(p, Features)]
    if len(known) < len(parts) or not known or len({(p.axis, p.rank) for p in known}) > 1:
        return None
    place = _from_right(given.get("dim", 0), known[0].rank)
    if place is None:
        return None
    if place == known[0].axis:
        return replace(known[0], runs=tuple(r for p in known for r in p.runs), single=all(p.single for p in known))
    if len({size(p.runs) for p in known}) > 1:
        return None
    for part in known[1:]:
        join(known[0].runs, part.runs)
    return replace(known[0], single=False)


def _from_right(dim: Any, rank: int | None) -> int | None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        return None
    return dim if dim < 0 else None if rank is None else dim - rank


@_function("chunk")
def _chunk(flow: Reading, node: fx.Node) -> Value | None:
    x, given = flow.first(node), _arguments(node, ("chunks", "dim"))
    if x is None or given is None or not isinstance(given.get("chunks"), int):
        return None
    place, count = _from_right(given.get("dim", 0), x.rank), given["chunks"]
    if place != x.axis:
        return None if place is None else (replace(x, single=False),) * count
    channels = size(x.runs)
    return _cut(x, [channels // count] * count) if channels % count == 0 else None


@_function("split")
def _split(flow: Reading, node: fx.Node) -> Value | None:
    x, given = flow.first(node), _arguments(node, ("split_size_or_sections", "dim"))
    given = _arguments(node, ("split_size", "dim")) if given is None else given
    if x is None or given is None or _from_right(given.get("dim", 0), x.rank) != x.axis:
        return None
    wanted, channels = given.get("split_size_or_sections", given.get("split_size")), size(x.runs)
    if isinstance(wanted, int) and wanted > 0 and channels % wanted == 0:
        return _cut(x, [wanted] * (channels // wanted))
    if isinstance(wanted, (list, tuple)) and all(isinstance(w, int) for w in wanted) and sum(wanted) == channels:
        return _cut(x, list(wanted))
    return None


def _cut(x: Features, sizes: list[int]) -> tuple[Features, ...]:
    parts, rest = [], x.runs
    for length in sizes:
        part, rest = cut(rest, length)
        parts.append(replace(x, runs=part))
    return tuple(parts)


@_function("getitem")
def _getitem(flow: Reading, node: fx.Node) -> Value | None:
    given, index = node.args
    value = flow.of(given)
    if isinstance(value, tuple):
        return value[index] if isinstance(index, int) and -len(value) <= index < len(value) else None
    if not isinstance(value, Features) or value.rank is None or not isinstance(index, tuple):
        return None
    slices = all(isinstance(i, slice) for i in index) and flow.plain(node, *_nodes((given,)))
    place = value.rank + value.axis
    whole_channels = len(index) <= place or index[place] == slice(None)
    return replace(value, single=False) if slices and whole_channels else None


@_function("flatten")
def _flatten(flow: Reading, node: fx.Node) -> Value | None:
    x, given = flow.first(node), _arguments(node, ("start_dim", "end_dim"))
    return None if x is None or given is None else flattened(x, given.get("start_dim", 0), given.get("end_dim", -1))


@_function("permute")
def _permute(flow: Reading, node: fx.Node) -> Value | None:
    x, order = flow.first(node), node.kwargs.get("dims", node.args[1:])
    while isinstance(order, (list, tuple)) and len(order) == 1 and isinstance(order[0], (list, tuple)):
        order = order[0]
    if x is None or not isinstance(order, (list, tuple)) or not all(isinstance(d, int) for d in order):
        return None
    rank = len(order)
    if x.rank not in (None, rank):
        return None
    places = [int(d) % rank for d in order]
    return Features(x.runs, places.index(rank + x.axis) - rank, rank, x.single and places[0] == 0)


@_function("transpose", "swapaxes")
def _transpose(flow: Reading, node: fx.Node) -> Value | None:
    x = flow.first(node)
    if x is None or len(node.args) != 3 or node.kwargs:
        return None
    a, b = (_from_right(d, x.rank) for d in node.args[1:])
    if a is None or b is None:
        return None
    keeps_batch = x.rank is not None and -x.rank not in (a, b)
    return replace(x, axis={a: b, b: a}.get(x.axis, x.axis), single=x.single and keeps_batch)


@_function("mean", "sum", "amax", "amin")
def _reduced(flow: Reading, node: fx.Node) -> Value | None:
    x, given = flow.first(node), _arguments(node, ("dim", "keepdim"))
    if x is None or given is None or x.rank is None or "dim" not in given:
        return None
    dims = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    places = {_from_right(d, x.rank) for d in dims}
    if None in places or x.axis in places or given.get("keepdim", False) not in (True, False):
        return None
    others = set(range(1 - x.rank, 0)) - {x.axis}
    if given.get("keepdim", False):
        return replace(x, single=others <= places)
    behind = sum(1 for p in places if p is not None and p > x.axis)
    return Features(x.runs, x.axis + behind, x.rank - len(places), others <= places)


def _function_pooling(spatial: int, adaptive: bool) -> Function:
    def pool(flow: Reading, node: fx.Node) -> Value | None:
        x = flow.first(node)
        if x is None or x.axis != -spatial - 1 or node.kwargs.get("return_indices", False) or len(node.args) > 6:
            return None
        output = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else 0)
        return replace(x, single=adaptive and is_one(output))

    return pool


for _spatial, _d in ((1, "1d"), (2, "2d"), (3, "3d")):
    FUNCTIONS[f"avg_pool{_d}"] = _function_pooling(_spatial, adaptive=False)
    FUNCTIONS[f"adaptive_avg_pool{_d}"] = _function_pooling(_spatial, adaptive=True)
    # torch's max_pool functions with a choice of return_indices trace as boolean_dispatch; see _operation.
    FUNCTIONS[f"max_pool{_d}"] = _function_pooling(_spatial, adaptive=False)


@_function("interpolate", "upsample")
def _interpolate(flow: Reading, node: fx.Node) -> Value | None:
    x = flow.first(node)
    return replace(x, single=False) if x is not None and x.rank is not None and x.axis == 1 - x.rank else None


@_function("pad")
def _pad(flow: Reading, node: fx.Node) -> Value | None:
    x = flow.first(node)
    sides = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
    if x is None or not isinstance(sides, (list, tuple)) or len(sides) // 2 > -x.axis - 1:
        return None
    return replace(x, single=False)


@_function("layer_norm")
def _functional_layer_norm(flow: Reading, node: fx.Node) -> Value | None:
    given = _arguments(node, ("normalized_shape", "weight", "bias", "eps"))
    x = flow.of(node.args[0]) if node.args else None
    if given is None or not isinstance(x, Features) or x.axis != -1:
        return None
    shape = given.get("normalized_shape")
    if not isinstance(shape, (list, tuple)) or tuple(shape) != (size(x.runs),):
        return None
    affine = [flow.of(given[key]) for key in ("weight", "bias") if given.get(key) is not None]
    return x if _claim_all(flow, x, affine) else None


@_function("batch_norm")
def _functional_batch_norm(flow: Reading, node: fx.Node) -> Value | None:
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given, x = _arguments(node, names), flow.of(node.args[0]) if node.args else None
    if given is None or not isinstance(x, Features) or x.rank is None or x.axis != 1 - x.rank:
        return None
    affine = [flow.of(given[key]) for key in names[:4] if given.get(key) is not None]
    return x if _claim_all(flow, x, affine) else None


def _claim_all(flow: Reading, x: Features, values: list[Value | None]) -> bool:
    helds = [v for v in values if isinstance(v, Held)]
    if len(helds) < len(values) or any(tuple(h.tensor.shape) != (size(x.runs),) for h in helds):
        return False
    for held in helds:
        flow.claims.claim(held.name, held.tensor, 0, x.runs, "carries", "norm")
    return True
