"""Run a finalized model's 2:4 layers on sparse tensor cores in PyTorch itself.

PyTorch multiplies by 2:4 weights on NVIDIA GPUs from Ampere on (``torch.sparse.to_sparse_semi_structured``). Small
layers lose by it, so each is timed at the shape it is called with, dense against sparse, and changed only if it wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from nmgraph.errors import ConversionError
from nmgraph.export.inputs import Inputs
from nmgraph.layers.hardware import HALVES, MULTIPLE, missing_in
from nmgraph.layers.masked import masked_weights
from nmgraph.layers.probe import WIN, median_ms
from nmgraph.nm.grouping import canonical
from nmgraph.nm.masks import check_blocks
from nmgraph.nm.pattern import TENSOR_CORES


@dataclass(frozen=True)
class LayerSpeed:
    """One Linear.

    Attributes:
        name: qualified name.
        shape: of its weight.
        rows: of the input it is called with; 0 if it was not called.
        changed: whether it multiplies by a semi-structured weight now.
        reason: why not.
        dense_ms: median of the dense product; 0 if it was not timed.
        sparse_ms: median of the sparse one.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    changed: bool
    reason: str = ""
    dense_ms: float = 0.0
    sparse_ms: float = 0.0


@dataclass(frozen=True)
class Acceleration:
    """What was changed, layer by layer."""

    layers: tuple[LayerSpeed, ...]

    @property
    def changed(self) -> tuple[LayerSpeed, ...]:
        """Layers that multiply by a semi-structured weight now."""
        return tuple(layer for layer in self.layers if layer.changed)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{len(self.changed)} of {len(self.layers)} linear layers run on sparse tensor cores"

    def __rich__(self) -> Table:
        table = Table(title=str(self), title_justify="left", header_style="bold")
        for column in ("layer", "shape", "rows", "dense", "sparse", "decision"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            times = [f"{ms:.3f} ms" if ms else "-" for ms in (layer.dense_ms, layer.sparse_ms)]
            decision = "[green]sparse" if layer.changed else f"[yellow]dense[/]: {escape(layer.reason)}"
            table.add_row(escape(layer.name), "x".join(map(str, layer.shape)), str(layer.rows), *times, decision)
        return table


def accelerate_linears(model: nn.Module, inputs: Inputs) -> Acceleration:
    """Give a finalized model's linear layers semi-structured weights, in place, wherever that is faster.

    Args:
        model: finalized, on the GPU, in the precision that it will run in.
        inputs: what it is called with, on the same device; layers are timed at the shapes these lead to.

    Returns:
        What was decided of every Linear. On a CPU nothing is changed, and each says why.

    Raises:
        ConversionError: if the model is not finalized.
        ExportError: if it does not take the inputs.
    """
    sparse = masked_weights(model)
    if sparse:
        raise ConversionError(
            f"{next(iter(sparse))} is still being trained. Finalize the model first: nmgraph.finalize(model)."
        )
    rows = _rows_seen(model, inputs)
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    return Acceleration(tuple(_decide(name, layer, rows.get(name, 0)) for name, layer in linears.items()))


def _rows_seen(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    rows: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: rows.update({name: max(rows.get(name, 0), args[0].numel() // args[0].shape[-1])})

    hooks = [m.register_forward_pre_hook(note(n)) for n, m in model.named_modules() if type(m) is nn.Linear]
    try:
        inputs.call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _decide(name: str, layer: nn.Linear, rows: int) -> LayerSpeed:
    weight = layer.weight
    reason = _obstacle(weight, rows)
    if reason:
        return LayerSpeed(name, tuple(weight.shape), rows, False, reason)
    with torch.no_grad():
        packed = nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False)
        x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        dense_ms, sparse_ms = (median_ms(partial(F.linear, x, w, layer.bias), x.device) for w in (weight, packed))
    wins = dense_ms > WIN * sparse_ms
    if wins:
        layer.weight = packed
    reason = "" if wins else "the dense product is as fast at this shape"
    return LayerSpeed(name, tuple(weight.shape), rows, wins, reason, dense_ms, sparse_ms)


def _obstacle(weight: Tensor, rows: int) -> str:
    if isinstance(weight, SparseSemiStructuredTensor):
        return "it is semi-structured already"
    if not weight.is_cuda:
        return f"its weight is on the {weight.device.type}; sparse tensor cores are in NVIDIA GPUs from Ampere on"
    lacking = missing_in(weight.device)
    if lacking:
        return lacking
    if weight.dtype not in HALVES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; use float16 or bfloat16"
    if any(size % MULTIPLE for size in weight.shape):
        return f"{weight.shape[0]}x{weight.shape[1]} are not both multiples of {MULTIPLE}"
    if not check_blocks(canonical(weight), TENSOR_CORES).holds:
        return "its weight is not 2:4"
    return "" if rows else "the inputs did not reach it"
