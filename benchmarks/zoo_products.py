"""Which parameters take part in a product: watched at the level of operators, without any of nmgraph's code.

Every operator that runs is seen below autograd, where a linear layer, an attention or an einsum is a few matrix products.
A tensor that was made from parameters alone remembers which, and how: as it is (a view, a transpose), moved (copied,
cast, joined), selected (one matrix of a stack), gathered (rows of a table), or computed (any other function). What takes
in an activation is one, and so is the result of a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOW = ("as it is", "moved", "selected", "gathered", "computed")

# operator: positions of the operands that may be weights, and whether the first of them is one only if the last is not
_TWO_SIDED = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "addbmm": (1, 2), "mv": (0, 1), "addmv": (1, 2), "dot": (0, 1), "_grouped_mm": (0, 1)}  # fmt: skip
_LAYERS = {"convolution": 1, "_convolution": 1, "mkldnn_convolution": 1, "linear": 1, "mkldnn_linear": 1}
_FUSED = {"_trilinear", "mkldnn_rnn_layer", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"}
_MOVES = {"_to_copy", "clone", "cat", "stack", "repeat", "constant_pad_nd", "flip", "roll", "_unsafe_view", "contiguous", "view_copy", "permute_copy", "_reshape_copy", "copy_", "detach", "alias", "lift_fresh", "expand_copy", "split_with_sizes_copy"}  # fmt: skip
_GATHERS = {"index", "index_select", "gather", "_unsafe_index"}


@dataclass
class Use:
    """What a parameter does in the products of a run.

    Attributes:
        how: the least direct of the ways in which it gets there.
        operators: which products it takes part in.
        flops: of all its products.
        length: of the axis that is summed over; of the last product.
        axis: which of the parameter's own axes that is, where the operand is a view of it.
        groups: of a convolution.
    """

    how: str
    operators: set[str] = field(default_factory=set)
    flops: float = 0
    length: int = 0
    axis: int | None = None
    groups: int = 1


@dataclass(frozen=True)
class _Origin:
    parameters: frozenset[str]
    how: int
    main: int  # number of weights


class Products(TorchDispatchMode):
    """Watch a model's run; ``uses`` then has an entry for each parameter that was multiplied by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.uses: dict[str, Use] = {}
        self.attended: set[str] = set()  # went into a fused attention as query, key or value
        self._parameters = dict(model.named_parameters())
        self._origins: dict[int, _Origin] = {}
        self._constants: set[int] = set()
        self._alive: list[Tensor] = []  # so that no storage's address is used again
        for name, parameter in self._parameters.items():
            self._remember(parameter, _Origin(frozenset([name]), 0, parameter.numel()))
        for buffer in model.buffers():
            self._remember(buffer, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name in _TWO_SIDED or name in _LAYERS or name in _FUSED or "scaled_dot_product" in name:
            self._note_product(name, args, kwargs, outputs)
        elif func._schema.is_mutable:
            self._derive(name, inputs, outputs[:1] or inputs[:1], mutable=True)
        else:
            self._derive(name, inputs, outputs, mutable=False)
        return out

    def _origin(self, tensor: Tensor) -> _Origin | None:
        return self._origins.get(_storage(tensor))

    def _remember(self, tensor: Tensor, origin: _Origin | None) -> None:
        key = _storage(tensor)
        self._alive.append(tensor)
        if origin is None:
            self._origins.pop(key, None)
            self._constants.add(key)
        else:
            self._constants.discard(key)
            self._origins[key] = origin

    def _forget(self, tensor: Tensor) -> None:
        self._origins.pop(_storage(tensor), None)
        self._constants.discard(_storage(tensor))

    def _derive(self, name: str, inputs: list[Tensor], outputs: list[Tensor], *, mutable: bool) -> None:
        gathers = name in _GATHERS
        relevant = [t for t in inputs if t.is_floating_point()] if gathers else inputs
        known = all(_storage(t) in self._origins or _storage(t) in self._constants for t in relevant)
        if name in ("embedding", "embedding_bag"):
            known = False
        if name == "lift_fresh":
            known = True
        origins = [o for t in relevant if (o := self._origin(t)) is not None]
        for out in outputs:
            if not mutable and any(_storage(out) == _storage(t) for t in inputs):
                continue  # a view is known by its storage
            if not known:
                if mutable:
                    self._forget(out)
            elif not origins or not out.is_floating_point():
                self._remember(out, None)
            else:
                self._remember(out, self._made(name, relevant, origins, out))

    def _made(self, name: str, inputs: list[Tensor], origins: list[_Origin], out: Tensor) -> _Origin | None:
        joined = name in ("cat", "stack")
        step = HOW.index("moved" if name in _MOVES else "computed")
        if name in _GATHERS:
            whole = inputs[0].dim() >= 3 and out.shape[-2:] == inputs[0].shape[-2:] and name != "gather"
            step = HOW.index("selected" if whole else "gathered")
        largest = max(o.main for o in origins)
        # What is smaller than the weight beside it only scales it.
        main = [o for o in origins if joined or o.main == largest]
        if step == HOW.index("computed") and out.numel() < largest:
            return None  # a statistic of it
        return _Origin(frozenset().union(*(o.parameters for o in main)), max(step, *(o.how for o in main)), largest)

    def _note_product(self, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        if "scaled_dot_product" in name:
            for operand in args[:3]:
                origin = self._origin(operand)
                self.attended |= origin.parameters if origin else set()
            return
        for position, operand in self._weights(name, args):
            origin = self._origin(operand)
            assert origin is not None
            flops, length, along, groups = _cost(name, position, args, outputs[0])
            for parameter in origin.parameters:
                if self._parameters[parameter].dim() < 2:
                    continue
                use = self.uses.setdefault(parameter, Use(HOW[origin.how]))
                use.how = HOW[max(HOW.index(use.how), origin.how)]
                use.operators.add(name)
                use.flops += flops / len(origin.parameters)
                use.length, use.groups = length, groups
                use.axis = _own_axis(self._parameters[parameter], operand, along)

    def _weights(self, name: str, args: Any) -> Iterator[tuple[int, Tensor]]:
        """List the operands that are weights; a learned input of a layer is none."""
        if name in _LAYERS:
            positions: tuple[int, ...] = (_LAYERS[name],)
        elif name in _FUSED:
            positions = tuple(range(1, len(args)))
        else:
            positions = _TWO_SIDED[name]
        found = [
            (i, args[i]) for i in positions if i < len(args) and isinstance(args[i], Tensor) and self._origin(args[i])
        ]
        yield from found if name in _FUSED else found[-1:]


def watch(model: nn.Module, call: Any) -> Products:
    """Run ``call`` while the model's products are watched."""
    with torch.no_grad(), Products(model) as products:
        call()
    return products


def _storage(tensor: Tensor) -> int:
    if tensor.is_sparse:
        return id(tensor)
    return tensor.untyped_storage()._cdata


def _cost(name: str, position: int, args: Any, out: Tensor) -> tuple[float, int, int | None, int]:
    """Give floating-point operations, length and place of the axis summed over, and groups."""
    operand = args[position]
    if name in ("convolution", "_convolution", "mkldnn_convolution"):
        transposed = bool(args[6]) if name != "mkldnn_convolution" else False
        groups = int(args[8]) if name != "mkldnn_convolution" else int(args[6])
        if transposed:
            length = operand.shape[0] // groups
            return 2 * args[0].numel() * prod(operand.shape[1:]), length, 0, groups
        return 2 * out.numel() * prod(operand.shape[1:]), operand.shape[1], 1, groups
    if name in ("linear", "mkldnn_linear"):
        return 2 * out.numel() * operand.shape[-1], operand.shape[-1], 1, 1
    if name in _FUSED:
        rows = args[0].numel() // max(args[0].shape[-1], 1)
        return 2 * rows * operand.numel(), operand.shape[-1], None, 1
    right = position == _TWO_SIDED[name][1]
    along = operand.dim() - 2 if right and operand.dim() > 1 else operand.dim() - 1
    return 2 * out.numel() * operand.shape[along], operand.shape[along], along, 1


def _own_axis(parameter: Tensor, operand: Tensor, along: int | None) -> int | None:
    if along is None or _storage(operand) != _storage(parameter) or operand.shape[along] < 2:
        return None
    fits = [
        d for d in range(parameter.dim()) if parameter.stride(d) == operand.stride(along) and parameter.shape[d] > 1
    ]
    return fits[0] if len(fits) == 1 else None
