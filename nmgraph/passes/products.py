"""Products with bare parameters: which function multiplies by which parameter, and along which of its axes.

A parameter that a layer of a known kind holds is that layer's business. Here are those that a forward multiplies by
itself, ``F.linear(x, self.weight)`` or ``x @ self.projection[i].T``: each is followed through what only moves, selects
or converts its values. What else is done to it first - standardising it, adding another - makes it *computed*, and
zeros in it need not be zeros any more where it is multiplied.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn import functional as F

from nmgraph.nm.grouping import Axis

LOOKUP = "one-hot lookup"
"""A product with ones and zeros, which only selects."""

Axes: TypeAlias = "tuple[int | None, ...]"
"""Of each axis of a value, which axis of the parameter it is; None where it is none, or more than one."""

_LINEAR, _LEFT_RIGHT = {1: -1}, {0: -1, 1: -2}
OPERANDS: dict[str, tuple[tuple[str, ...], dict[int, int]]] = {
    "linear": (("input", "weight"), _LINEAR),
    **{f"conv{n}d": (("input", "weight"), {1: 1}) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": (("input", "weight"), {1: 0}) for n in (1, 2, 3)},
    "matmul": (("input", "other"), _LEFT_RIGHT),
    "mm": (("input", "mat2"), _LEFT_RIGHT),
    "bmm": (("input", "mat2"), _LEFT_RIGHT),
    "addmm": (("input", "mat1", "mat2"), {1: -1, 2: -2}),
    "baddbmm": (("input", "batch1", "batch2"), {1: -1, 2: -2}),
}
"""By name: the parameters that may be tensors, and of each place where a weight may stand the axis summed over."""

_FUNCTIONS = {
    **{getattr(F, name): name for name in OPERANDS if hasattr(F, name)},
    **{getattr(torch, name): name for name in OPERANDS if hasattr(torch, name)},
    operator.matmul: "matmul",
    torch.einsum: "einsum",
    F.embedding: "embedding",
}
_METHODS = {
    "matmul": "matmul",
    "__matmul__": "matmul",
    "mm": "mm",
    "bmm": "bmm",
    "addmm": "addmm",
    "baddbmm": "baddbmm",
}
_KEEPS = {
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach", "cuda", "cpu",
}  # fmt: skip
"""What leaves every axis where it is, whatever else it is given."""
_CUTS = {"chunk": 1, "split": 1, "narrow": 0, "tensor_split": 1}
"""What takes parts along one axis, and the place of that axis among the arguments behind the tensor."""


@dataclass(frozen=True)
class Use:
    """One way a parameter takes part in products.

    Attributes:
        parameter: its qualified name.
        function: what multiplies by it.
        axis: which of its axes is summed over; None if that is not one axis.
        computed: whether anything but a move or a conversion stands between the two.
        groups: of a convolution.
    """

    parameter: str
    function: str
    axis: Axis | None
    computed: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Origin:
    """Where a value comes from that depends on no input: a parameter, as it is, moved or computed."""

    parameter: str
    axes: Axes
    computed: bool = False


def find_uses(graph: fx.Graph, root: nn.Module) -> Iterator[Use]:
    """List the products of a graph in which bare parameters of two axes or more take part."""
    parameters = dict(root.named_parameters(remove_duplicate=False))
    origins: dict[fx.Node, Origin | None] = {}  # None: of constants; activations are missing
    for node in graph.nodes:
        _find_origin(node, parameters, origins)
        written = _written(node, origins)
        if written is not None and parameters[written.parameter].dim() > 1:
            yield Use(written.parameter, str(node.target), None, computed=True)
        table = _embedding(node, root)
        if table in parameters:
            yield Use(table, "embedding", None)
        function = _function(node)
        if function is None:
            continue
        for operand, axis in _weights(node, function):
            origin = origins.get(operand)
            if origin is None or parameters[origin.parameter].dim() < 2:
                continue
            along = (
                None
                if axis is None or origin.computed
                else axis_of(origin.axes, axis, parameters[origin.parameter].dim(), function)
            )
            yield Use(origin.parameter, function, along, origin.computed, _groups(node, function))


def axis_of(axes: Axes, summed: int, dims: int, function: str) -> Axis | None:
    """Name the reduction axis of a parameter, from the axis of a value of it that is summed over."""
    if not -len(axes) <= summed < len(axes):
        return None
    axis = axes[summed]
    if axis is None or dims == 2:
        return axis
    if function.startswith("conv"):
        return axis if len(axes) == dims else None  # a stack of kernels
    return axis - dims if axis >= dims - 2 else None  # a stack of matrices


def contracted(equation: str, place: int) -> int | None:
    """Give the axis of one operand that an ``einsum`` sums over together with another; None if it is not one axis.

    >>> contracted("bld,hdk->blhk", 1), contracted("ij,kj->ik", 0), contracted("i...,ij->j...", 1)
    (1, 1, None)
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if "." in equation or not arrow or len(operands) < 2:
        return None
    others = {letter for i, operand in enumerate(operands) if i != place for letter in operand}
    summed = [i for i, letter in enumerate(operands[place]) if letter not in output and letter in others]
    return summed[0] if len(summed) == 1 else None


def _function(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):  # in the graphs of torch.export
        name = node.target.overloadpacket.__name__
        return name if node.target.namespace == "aten" and name in OPERANDS else None
    return _FUNCTIONS.get(node.target)


def _groups(node: fx.Node, function: str) -> int:
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return groups if function.startswith("conv") and isinstance(groups, int) else 1


def _weights(node: fx.Node, function: str) -> Iterator[tuple[fx.Node, int | None]]:
    """List the operands of a product that may be weights, with the axis that is summed over."""
    if function == "embedding":
        yield from (
            (table, None) for table in (*node.args[1:2], node.kwargs.get("weight")) if isinstance(table, fx.Node)
        )
    elif function == "einsum":
        operands = node.args[1:]
        operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
        equation = node.args[0]
        for place, operand in enumerate(operands):
            if isinstance(operand, fx.Node) and isinstance(equation, str):
                yield operand, contracted(equation, place)
    else:
        names, axes = OPERANDS[function]
        for place, axis in axes.items():
            operand = node.args[place] if place < len(node.args) else node.kwargs.get(names[place])
            if isinstance(operand, fx.Node):
                yield operand, axis


def _find_origin(node: fx.Node, parameters: Mapping[str, nn.Parameter], origins: dict[fx.Node, Origin | None]) -> None:
    if node.op == "get_attr":
        name = str(node.target)
        origins[node] = Origin(name, tuple(range(parameters[name].dim()))) if name in parameters else None
        return
    first = node.args[0] if node.args else None
    source = origins.get(first) if isinstance(first, fx.Node) else None
    if source is not None and str(getattr(node.target, "__name__", node.target)) in _KEEPS:
        origins[node] = source  # also where a dtype is asked of an activation
        return
    if node.op in ("placeholder", "output") or any(n not in origins for n in node.all_input_nodes):
        return  # an activation
    sources = [o for n in node.all_input_nodes if (o := origins[n]) is not None]
    if not sources:
        origins[node] = None
        return
    moved = None
    if source is not None and not source.computed and len(sources) == 1:
        moved = _moved(node, source.axes)
    if moved is not None and source is not None:
        origins[node] = Origin(source.parameter, moved)
    else:
        largest = max(sources, key=lambda o: parameters[o.parameter].numel())
        origins[node] = Origin(largest.parameter, (), computed=True)


def _moved(node: fx.Node, axes: Axes) -> Axes | None:
    """Follow the axes of a value through one operation; None if that does more than move, select or convert."""
    called, arguments = node.target, node.args[1:]
    name = called if node.op == "call_method" else getattr(called, "__name__", "")
    if called is getattr:
        name, arguments = str(node.args[1]), ()
    elif called is operator.getitem:
        return _selected(node, arguments[0], axes)
    elif node.op == "call_function" and getattr(called, "__module__", None) not in (
        "torch",
        "_operator",
        "torch._C",
        None,
    ):
        return None
    if name in _CUTS:
        place = arguments[_CUTS[name]] if len(arguments) > _CUTS[name] else node.kwargs.get("dim", 0)
        return _cut(axes, place) if isinstance(place, int) else None
    if node.kwargs or not all(isinstance(a, (int, tuple, list)) for a in arguments):
        return None
    if name in ("t", "T", "H"):
        return axes[::-1]
    if name in ("mT", "mH", "adjoint"):
        return (*axes[:-2], axes[-1], axes[-2])
    if name in ("transpose", "swapaxes") and len(arguments) == 2:
        order: Any = list(range(len(axes)))
        a, b = (int(i) for i in arguments)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
        return tuple(axes[i] for i in order)
    if name == "permute":
        order = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)) else arguments
        return tuple(axes[i] for i in order)
    if name == "unsqueeze" and len(arguments) == 1:
        place = int(arguments[0]) % (len(axes) + 1)  # type: ignore[arg-type]
        return (*axes[:place], None, *axes[place:])
    if name == "select" and len(arguments) == 2:
        place = int(arguments[0]) % len(axes)  # type: ignore[arg-type]
        return (*axes[:place], *axes[place + 1 :])
    if name == "unbind":
        place = int(arguments[0]) % len(axes) if arguments else 0  # type: ignore[arg-type]
        return (*axes[:place], *axes[place + 1 :])
    return None


def _selected(node: fx.Node, index: Any, axes: Axes) -> Axes | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if str(getattr(source.target, "__name__", source.target)) in (*_CUTS, "unbind"):
        return axes  # one of several parts
    if isinstance(index, (int, fx.Node)):
        return axes[1:]
    steps = index if isinstance(index, tuple) else (index,)
    left: list[int | None] = []
    for place, step in enumerate(steps):
        if isinstance(step, slice):
            left.append(axes[place] if step == slice(None) else None)  # a part need not hold whole blocks
        elif not isinstance(step, int):
            return None
    return (*left, *axes[len(steps) :])


def _cut(axes: Axes, place: int) -> Axes:
    """Forget an axis that a part is taken of, as that need not hold whole blocks."""
    return tuple(None if i == place % len(axes) else axis for i, axis in enumerate(axes))


def _written(node: fx.Node, origins: Mapping[fx.Node, Origin | None]) -> Origin | None:
    """Give the parameter that a node writes to in place, if it does."""
    name = str(getattr(node.target, "__name__", node.target))
    first = node.args[0] if node.args else None
    in_place = node.op.startswith("call_") and name.endswith("_") and not name.endswith("__")
    return origins.get(first) if in_place and isinstance(first, fx.Node) else None


def _embedding(node: fx.Node, root: nn.Module) -> str:
    """Name the table of an embedding that a node calls."""
    if node.op != "call_module" or not isinstance(root.get_submodule(str(node.target)), nn.Embedding):
        return ""
    return f"{node.target}.weight"
