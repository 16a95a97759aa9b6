"""Which layers of a model train on sparse tensor cores, and what that gains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import nn

from nmgraph.errors import ConversionError
from nmgraph.layers.hardware import MODES, Decision, Hardware, missing, obstacle
from nmgraph.layers.masked import MaskedWeight, accelerate, masked_weights
from nmgraph.layers.probe import Timing
from nmgraph.layers.sparse_product import DENSE

_OFF = 'it was converted or loaded with hardware="off"'
_ELSEWHERE = "it was converted where no sparse tensor cores were; nmgraph.load asks anew"
_FEW = 1 << 16  # of so many weights a dense product takes less time than a sparse one takes to start
_UNCALLED = "no call in half precision was seen; compiled code, and attention that reads its weight, are not seen"


@dataclass(frozen=True)
class ProductSpeed:
    """One of the products of a layer with its weight.

    Attributes:
        sparse: whether it runs on sparse tensor cores.
        dense_ms: median of the dense product.
        sparse_ms: of the sparse one with all that it needs, compressing the weight included; 0 where there is none.
        gather_ms: of it, putting dY into the order of the rows.
        prepare_ms: of it, compressing.
        reason: why it is dense.
    """

    sparse: bool
    dense_ms: float
    sparse_ms: float = 0.0
    gather_ms: float = 0.0
    prepare_ms: float = 0.0
    reason: str = ""

    @property
    def taken_ms(self) -> float:
        """The one that was chosen."""
        return self.sparse_ms if self.sparse else self.dense_ms


@dataclass(frozen=True)
class LayerHardware:
    """What was decided of one sparse layer for one kind of call.

    Attributes:
        name: of the site.
        shape: of its weight, outputs and inputs.
        rows: of its input, rounded up to a power of two; 0 where nothing was decided.
        dtype: of the products.
        forward: ``Y = X Wᵀ``.
        input_gradient: ``dX = dY W``; None where it was not timed.
        reason: why nothing was decided, or what was decided is not known to be used.
    """

    name: str
    shape: tuple[int, ...]
    rows: int = 0
    dtype: str = ""
    forward: ProductSpeed | None = None
    input_gradient: ProductSpeed | None = None
    reason: str = ""

    @property
    def is_sparse(self) -> bool:
        """Tell whether some product was decided to be sparse."""
        return any(p is not None and p.sparse for p in (self.forward, self.input_gradient))

    @property
    def gain(self) -> float:
        """How many times faster the timed products are than dense ones; 1 where nothing is sparse."""
        products = [p for p in (self.forward, self.input_gradient) if p is not None]
        taken = sum(p.taken_ms for p in products)
        return sum(p.dense_ms for p in products) / taken if taken else 1.0


@dataclass(frozen=True)
class HardwareReport:
    """Which layers of a model train on sparse tensor cores, layer by layer."""

    layers: tuple[LayerHardware, ...]

    @property
    def sparse(self) -> tuple[LayerHardware, ...]:
        """Layers of which some product is sparse in the calls that were seen."""
        return tuple(layer for layer in self.layers if layer.is_sparse and not layer.reason)

    @property
    def expected(self) -> tuple[LayerHardware, ...]:
        """Layers of which some product is sparse if compiled code calls them; no other call was seen."""
        return tuple(layer for layer in self.layers if layer.is_sparse and layer.reason)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        layers = [asdict(layer) | {"gain": layer.gain} for layer in self.layers]
        return {"layers": layers}

    def __str__(self) -> str:
        seen, expected, whole = ({layer.name for layer in of} for of in (self.sparse, self.expected, self.layers))
        more = f", and {len(expected)} more if compiled code calls them" if expected else ""
        return f"{len(seen)} of {len(whole)} sparse layers train on sparse tensor cores{more}"

    def __rich__(self) -> Table:
        table = Table(title=str(self), title_justify="left", header_style="bold")
        for column in ("layer", "weight", "rows", "forward: dense to sparse", "input gradient", "gain", "why not"):
            table.add_column(column, overflow="fold", justify="right" if column in ("rows", "gain") else "left")
        untimed: dict[str, list[LayerHardware]] = {}
        for layer in self.layers:
            if layer.forward is None:
                untimed.setdefault(layer.reason, []).append(layer)
                continue
            products = [_shown(p) for p in (layer.forward, layer.input_gradient)]
            reasons = [p.reason for p in (layer.forward, layer.input_gradient) if p is not None and p.reason]
            why = layer.reason or "; ".join(dict.fromkeys(reasons))
            gain = f"{layer.gain:.2f}x" if layer in self.sparse else "-"
            shape = "x".join(map(str, layer.shape))
            table.add_row(escape(layer.name), shape, str(layer.rows), *products, gain, escape(why))
        for reason, (first, *others) in untimed.items():
            names = escape(first.name) + (f" and {len(others)} more" if others else "")
            shape = "" if others else "x".join(map(str, first.shape))
            table.add_row(names, shape, "", "[yellow]dense", "[yellow]dense", "", escape(reason))
        if self.sparse:
            table.caption = "gain: of the two products together, with all that they need; dW is dense either way"
        return table


def allow_hardware(model: nn.Module, mode: str) -> None:
    """Let layers of a converted model train on sparse tensor cores where they may, in place, or no longer.

    Args:
        model: converted.
        mode: ``auto``, where timings show that it is faster; ``force``, wherever it is possible; ``off``.

    Raises:
        ConversionError: if there is no such mode, or it is ``force`` and this machine has none.
    """
    if mode not in MODES:
        raise ConversionError(f"there is no hardware={mode!r}. Use {', '.join(map(repr, MODES))}.")
    lacking = missing()
    if mode == "force" and lacking:
        raise ConversionError(
            f'hardware="force" needs sparse tensor cores, but {lacking}. Use "auto", which trains the same without.'
        )
    for weight in masked_weights(model).values():
        able = mode == "off" or not (lacking or obstacle(weight) or (mode == "auto" and _small(weight)))
        accelerate(weight, Hardware(mode) if able else None)


def _small(weight: MaskedWeight) -> str:
    """Say why a weight need not be timed; empty if it has to be."""
    count = weight.raw.numel()
    return f"its {count:,} weights are too few to pay for the call" if count < _FEW else ""


def report_hardware(model: nn.Module) -> HardwareReport:
    """Say of every sparse layer what was decided so far, and why."""
    found = [entry for name, weight in masked_weights(model).items() for entry in _entries(name, weight)]
    return HardwareReport(tuple(found))


def _entries(name: str, weight: MaskedWeight) -> list[LayerHardware]:
    outputs, _, inputs = weight.raw_OSC.shape
    shape = outputs, inputs
    hardware, lacking = weight.hardware, missing()
    off = hardware is not None and hardware.mode == "off"
    if hardware is None or off or lacking:  # it may come from a machine that has them
        reason = obstacle(weight) or (_OFF if off else lacking or _small(weight) or _ELSEWHERE)
        return [LayerHardware(name, tuple(weight.raw.shape), reason=reason)]
    if not hardware.is_open:
        attached = weight.site in weight.training.attached
        reason = "its masks are not 2:4 yet" if attached else "no optimizer is attached"
        return [LayerHardware(name, shape, reason=reason)]
    if hardware.decisions:
        return [_entry(name, shape, decision) for decision in hardware.decisions.values()]
    if hardware.latest is None:
        return [LayerHardware(name, shape, reason=_UNCALLED)]
    return [replace(_entry(name, shape, hardware.latest), reason=_UNCALLED)]


def _entry(name: str, shape: tuple[int, ...], decision: Decision) -> LayerHardware:
    route, product, other = decision.route, decision.product, decision.input_gradient
    return LayerHardware(
        name,
        shape,
        product.rows,
        product.dtype,
        _speed(decision.forward, route.forward != DENSE),
        None if other is None else _speed(other, route.input_gradient != DENSE),
    )


def _speed(timing: Timing, sparse: bool) -> ProductSpeed:
    reason = ""
    if timing.failure:
        reason = timing.failure
    elif not sparse and timing.pays_ungathered:
        reason = "putting dY into the order of the rows takes the gain; permute=False, or tmask, needs no order"
    elif not sparse:
        reason = "the dense product is as fast"
    whole = 0.0 if timing.failure else timing.whole
    return ProductSpeed(sparse, timing.dense, whole, timing.gather, timing.prepare, reason)


def _shown(product: ProductSpeed | None) -> str:
    if product is None:
        return "[yellow]dense"
    if not product.sparse_ms:
        return f"[yellow]dense[/] {product.dense_ms:.3f} ms"
    kind = "[green]sparse" if product.sparse else "[yellow]dense"
    return f"{kind}[/] {product.dense_ms:.3f} to {product.sparse_ms:.3f} ms"
