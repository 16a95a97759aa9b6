"""Weights that lie in parts on several processes, as ``DTensor`` of ``fully_shard`` or of tensor parallelism.

What a method remembers of a weight lies where the weight lies: a state tensor ``[O, S, ...]`` is a ``DTensor`` of
the same parts, so that no process holds more of it than of the weight. Every block is whole on one process, which
decides about it alone; only what looks across blocks is done on the weight as a whole, gathered for the moment.

``torch.distributed.tensor`` takes a second to import, so it is imported only where a tensor needs it; whoever made one
has done so before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nmgraph.errors import TrainingError
from nmgraph.nm.grouping import FLAT, Axis, canonical_shape
from nmgraph.nm.packing import pack_bits, unpack_bits


class Layout(NamedTuple):
    """Where the parts of a tensor lie.

    Attributes:
        mesh: ``DeviceMesh`` of the processes.
        placements: for each of its dimensions, which axis of the tensor is split over it, if any.
    """

    mesh: Any
    placements: tuple[Any, ...]


def is_sharded(tensor: Tensor | None) -> bool:
    """Tell whether a tensor lies in parts on several processes."""
    return type(tensor).__name__ == "DTensor"


def reshard(model: nn.Module) -> None:
    """Let ``fully_shard`` put its parameters back: after a forward without a backward it leaves those of the root whole."""
    for module in model.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def local(tensor: Any) -> Tensor:
    """Give this process's part of a tensor, in place; all of it if it is not sharded."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def whole(tensor: Any) -> Tensor:
    """Gather a tensor from all its processes, each of which has to ask. A mask travels as bits."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    if all(p.is_replicate() for p in tensor.placements):
        return local(tensor)
    last = tensor.dim() - 1
    if tensor.dtype != torch.bool or any(_axis(p) == last for p in tensor.placements):
        return tensor.full_tensor()  # type: ignore[no-any-return]
    packed = pack_bits(tensor.to_local())
    gathered = _assembled(packed, layout_of(tensor), (*tensor.shape[:-1], packed.shape[-1])).full_tensor()
    return unpack_bits(gathered, tensor.shape[-1])


def cut(tensor: Tensor, layout: Layout) -> Tensor:
    """Give the part of a whole tensor that belongs to this process; differentiable, nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * layout.mesh.ndim
    replicated: Any = DTensor.from_local(tensor, layout.mesh, everywhere, run_check=False)
    return replicated.redistribute(placements=layout.placements).to_local()  # type: ignore[no-any-return]


def part_of(sharded: Tensor, value: Tensor) -> Tensor:
    """Give this process's part of a value that is complete, as it is parted in a sharded tensor."""
    return cut(value, layout_of(sharded)) if is_sharded(sharded) else value


def spread(value: Tensor, raw: Any, complete: bool) -> Tensor:
    """Lay out a value as a sharded weight, out of every process's part or of the complete value; differentiable."""
    layout = layout_of(raw)
    part = cut(value, layout) if complete else value
    return _assembled(part, layout, tuple(raw.shape))  # type: ignore[no-any-return]


def shard(tensor: Tensor, layout: Layout) -> Tensor:
    """Make a sharded tensor of one that every process has; each keeps a copy of its part."""
    return _assembled(cut(tensor, layout).clone(), layout, tuple(tensor.shape))  # type: ignore[no-any-return]


def layout_of(tensor: Any) -> Layout:
    """Say where the parts of a sharded tensor lie."""
    return Layout(tensor.device_mesh, tuple(tensor.placements))


def is_per_weight(tensor: Tensor) -> bool:
    """Tell whether a tensor of a method's state begins as ``w_OSC`` does, not one number or one per row."""
    return tensor.dim() >= 3


class Beside:
    """A method's state as it belongs beside the weight or a part of it; read by the names of its fields.

    Args:
        buffer: gives a field's tensor as it lies.
        layout: of the part; None is the whole weight.
    """

    def __init__(self, buffer: Callable[[str], Tensor], layout: Layout | None) -> None:
        self._buffer, self._layout = buffer, layout

    def __getattr__(self, name: str) -> Tensor:
        tensor = self._buffer(name)
        if is_sharded(tensor) and layout_of(tensor) == self._layout:
            return local(tensor)
        # With fully_shard and tensor parallelism together a forward sees other parts than lie here.
        tensor = whole(tensor)
        return cut(tensor, self._layout) if self._layout and is_per_weight(tensor) else tensor


def state_layout(raw: Any, axis: Axis, m: int, site: str) -> Layout:
    """Say where the parts of a sharded weight's state lie, whose tensors begin as ``w_OSC`` does.

    Args:
        raw: the weight.
        axis: its reduction axis.
        m: weights of a block.
        site: its name, for messages.

    Raises:
        TrainingError: if blocks would be cut.
    """
    places = _places_in_OSC(raw.dim(), axis)
    split = {own: _count(raw, own) for p in raw.placements if (own := _axis(p)) is not None}
    for own, parts in split.items():
        if places.get(own) is None or (places[own] == 2 and canonical_shape(tuple(raw.shape), axis)[2] % (m * parts)):
            raise TrainingError(
                f"{site}: its weight {list(raw.shape)} is sharded along axis {own} into {parts} parts, which cuts blocks of {m} "
                "apart. Shard it along its output channels: fully_shard(..., shard_placement_fn=...)."
            )
    return Layout(raw.device_mesh, tuple(_moved(p, places) for p in raw.placements))


def agreed(flag: Tensor, sharded: Sequence[Any]) -> Tensor:
    """Give the largest of the numbers that the processes have, over all that share a sharded tensor."""
    from torch import distributed

    for mesh in {id(t.device_mesh): t.device_mesh for t in sharded}.values():
        for group in mesh.get_all_groups():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=group)
    return flag


def _assembled(part: Tensor, layout: Layout, shape: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import DTensor

    stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return DTensor.from_local(
        part, layout.mesh, layout.placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def _axis(placement: Any) -> int | None:
    """Say which axis is split; both kinds of splitting have one."""
    return getattr(placement, "dim", None)


def _count(raw: Any, axis: int) -> int:
    sizes = (raw.device_mesh.size(place) for place, p in enumerate(raw.placements) if _axis(p) == axis)
    return math.prod(sizes)


def _places_in_OSC(dims: int, axis: Axis) -> dict[int, int]:
    """Say which axis of a weight becomes which of ``w_OSC``; not the axes that share one."""
    if axis == FLAT:
        return {0: 0}
    if axis < 0:  # a stack of matrices
        outputs, channels = (dims - 2, dims - 1) if axis == -1 else (dims - 1, dims - 2)
        return {outputs: 0, channels: 2} | ({0: 1} if dims == 3 else {})
    return {1 - axis: 0, axis: 2}


def _moved(placement: Any, places: dict[int, int]) -> Any:
    own = _axis(placement)
    if own is None or own == places[own]:
        return placement
    if hasattr(placement, "split_factor"):
        return type(placement)(places[own], split_factor=placement.split_factor)
    return type(placement)(places[own])
