"""What is known of a graph's tensors, and what that says about the axes of parameters and buffers.

An axis is counted from the right: broadcasting is, and a rank is often not known.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nmgraph.passes.channel_runs import Run, join, pin, size


@dataclass(frozen=True)
class Features:
    """A tensor whose channels are known.

    Attributes:
        runs: its channels.
        axis: where they lie, from the right: -1 is the last.
        rank: number of dimensions, where known.
        single: whether every dimension between and behind batch and channels has length 1.
    """

    runs: tuple[Run, ...]
    axis: int
    rank: int | None = None
    single: bool = False


@dataclass(frozen=True)
class Held:
    """A parameter or buffer that the forward reads itself."""

    name: str
    tensor: Tensor


NUMBER = "a number that no order of channels changes, or a shape"
OPAQUE = "a tensor of which nothing is known"
Value: TypeAlias = "Features | Held | tuple[Features, ...] | str"


@dataclass
class Claim:
    """One axis of a parameter or buffer that lies in the order of these runs.

    Attributes:
        name: qualified name of the tensor.
        tensor: the parameter or buffer.
        dim: its axis.
        runs: what is known of the channels on it.
        roles: ``writes`` for outputs of a layer, ``reads`` for its inputs, ``carries`` for all else.
    """

    name: str
    tensor: Tensor
    dim: int
    runs: tuple[Run, ...]
    roles: set[str] = field(default_factory=set)


@dataclass
class Claims:
    """What all graphs of a model say about its parameters and buffers.

    Attributes:
        axes: claims by tensor and axis.
        frozen: reasons to leave a tensor as it is.
        touched: tensors that the graph being read has claimed.
    """

    axes: dict[tuple[int, int], Claim] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)
    _kinds: dict[int, str] = field(default_factory=dict)

    def claim(self, name: str, tensor: Tensor | None, dim: int, runs: tuple[Run, ...], role: str, kind: str) -> None:
        """Say that an axis lies in the order of ``runs``; if that was said before, both orders are one."""
        if tensor is None:
            return
        self.touched.add(id(tensor))
        if self._kinds.setdefault(id(tensor), kind) != kind or tensor.shape[dim] != size(runs):
            self.freeze(tensor, f"{name} is used in two ways")
        known = self.axes.setdefault((id(tensor), dim), Claim(name, tensor, dim, runs))
        known.roles.add(role)
        join(known.runs, runs)

    def freeze(self, tensor: Tensor, reason: str) -> None:
        """Leave a tensor as it is."""
        self.frozen.setdefault(id(tensor), reason)

    def freeze_module(self, module: nn.Module, reason: str, only: set[int] | None = None) -> None:
        """Leave all that a module and its parts hold as it is, or ``only`` these tensors of it."""
        for part in module.modules():
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None and (only is None or id(tensor) in only):
                    self.freeze(tensor, reason)

    def settle(self) -> None:
        """Pin the runs of all frozen tensors."""
        for (key, _), claim in self.axes.items():
            if key in self.frozen:
                pin(claim.runs, self.frozen[key])


@dataclass
class Reading:
    """How far a graph is read.

    Attributes:
        values: what the nodes so far give.
        claims: what they say about parameters and buffers.
    """

    values: dict[fx.Node, Value]
    claims: Claims

    def of(self, argument: Any) -> Value | None:
        """Give the value of an argument; None if it is neither a node nor a plain number."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        return NUMBER if isinstance(argument, (bool, int, float)) else None

    def plain(self, node: fx.Node, *but: fx.Node) -> bool:
        """Tell whether all other nodes that come to a node are numbers."""
        return all(self.values[n] is NUMBER for n in node.all_input_nodes if n not in but)

    def first(self, node: fx.Node) -> Features | None:
        """Give a node's first argument, if its channels are known and all else is plain."""
        given = node.args[0] if node.args else None
        value = self.of(given)
        known = isinstance(value, Features) and isinstance(given, fx.Node) and self.plain(node, given)
        return value if known and isinstance(value, Features) else None


def operation(node: fx.Node) -> str:
    """Name a method, or a function of torch or of Python's operators; empty for any other."""
    if node.op == "call_method":
        return str(node.target)
    name = str(getattr(node.target, "__name__", ""))
    if node.target is getattr:
        return "getattr"
    if name == "stochastic_depth" and getattr(node.target, "__module__", "") == "torchvision.ops.stochastic_depth":
        return name
    return name if any(getattr(home, name, None) is node.target for home in (torch, F, operator)) else ""


def is_one(output_size: Any) -> bool:
    """Tell whether a pooling layer leaves one position."""
    return output_size == 1 or (isinstance(output_size, (tuple, list)) and set(output_size) == {1})


def flattened(x: Features, start: Any, end: Any) -> Features | None:
    """Flatten positions alone, or channels with positions that are one; None where it is more or not known."""
    if x.rank is None or not isinstance(start, int) or end not in (-1, x.rank - 1):
        return None
    start, channels = start % x.rank, x.rank + x.axis
    if start > channels:  # positions alone
        return Features(x.runs, channels - start - 1, start + 1, x.single)
    if start == channels and (x.single or x.axis == -1):
        return Features(x.runs, -1, start + 1, x.single)
    return None
