"""Which of a layer's two products with its weight run on sparse tensor cores, and what they multiply by then.

A layer may use them (:func:`obstacle`), and does while three things hold: a controller trains it and has seen that its
weight is 2:4 by now (:func:`follow`); it is called in half precision (:func:`product`); and the product is faster so at its
shape (``nmgraph.layers.probe``). Otherwise it is an ordinary layer that multiplies by the masked weight.

The operands are made and compressed once per optimizer step. Where code is captured, by ``torch.compile`` or in a CUDA
graph, that becomes a part of the graph, so that a replay never multiplies by an old weight.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from nmgraph.compilation import is_exporting, is_plain
from nmgraph.layers.kinds import has_own_forward, is_layer, is_transposed_convolution
from nmgraph.layers.probe import Product, Timing, fusing_pays, timing_of
from nmgraph.layers.sharding import is_sharded
from nmgraph.layers.sparse_product import DENSE, Operands, compress, multiply
from nmgraph.methods.contract import Method
from nmgraph.nm.both_ways import both_ways
from nmgraph.nm.grouping import canonical
from nmgraph.nm.masks import check_blocks
from nmgraph.nm.pattern import TENSOR_CORES

if TYPE_CHECKING:
    from nmgraph.layers.masked import MaskedWeight

MODES = ("auto", "off", "force")
MULTIPLE = 16  # of both sides of a half-precision weight, for cuSPARSELt
HALVES = (torch.float16, torch.bfloat16)
_MOST_ROWS = 1 << 16  # beyond, both products take longer in the same measure
_USUAL_ROWS = 8192  # for which a compiled layer is timed that never ran otherwise


class Route(NamedTuple):
    """How one kind of call of a layer is computed.

    Attributes:
        dtype: of the operands.
        forward: number of the algorithm of the forward product, or ``DENSE``.
        input_gradient: likewise.
        fused: whether one kernel makes the operands of both.
    """

    dtype: torch.dtype
    forward: int
    input_gradient: int
    fused: bool = False

    @property
    def is_sparse(self) -> bool:
        """Tell whether anything is sparse."""
        return self.forward != DENSE or self.input_gradient != DENSE


class Decision(NamedTuple):
    """A route, and why.

    Attributes:
        route: what was decided.
        product: the forward one.
        forward: its timing.
        input_gradient: the timing of ``dX = dY W``; None where its weight is not 2:4.
    """

    route: Route
    product: Product
    forward: Timing
    input_gradient: Timing | None


class Hardware:
    """What a layer that may use sparse tensor cores knows of them.

    Attributes:
        mode: ``auto``, ``force`` to use them also where they do not pay, or ``off``, which is there for the report.
        is_open: whether a controller stands by that the weight is 2:4.
        decisions: of calls seen, by rows, rounded up to a power of two, 65,536 at most, and dtype.
        latest: the last one on this device; until there is a call, one for the usual number of rows. Compiled code takes it.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.is_open = False
        self.decisions: dict[tuple[int, torch.dtype], Decision] = {}
        self.latest: Decision | None = None
        self._device: torch.device | None = None  # of what was decided
        self._kept: tuple[nn.Parameter, tuple[Any, ...], Operands] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Hardware, (self.mode,)

    def close(self) -> None:
        """Multiply by the masked weight from now on."""
        self.is_open = False
        self.forget()

    def forget(self) -> None:
        """Make the operands anew next time."""
        self._kept = None

    def decide(self, weight: MaskedWeight, rows: int, dtype: torch.dtype) -> Route | None:
        """Decide for a kind of call; at the first of its kind both products are timed. None where there are no kernels."""
        device, rows = weight.raw.device, _rounded(rows)
        if not _has_kernels(device.type):
            return None
        self._move(device)
        found = self.decisions.get((rows, dtype))
        if found is None:
            found = self.decisions[rows, dtype] = _decide(weight, rows, dtype, self.mode == "force")
        self.latest = found
        return found.route

    def expect(self, weight: MaskedWeight) -> None:
        """Decide for calls of the usual size, for code that is compiled before it has run."""
        raw = weight.raw
        self._move(raw.device)
        if self.latest is None and _has_kernels(raw.device.type):
            dtype = raw.dtype if raw.dtype in HALVES else torch.bfloat16
            self.latest = _decide(weight, _USUAL_ROWS, dtype, self.mode == "force")

    def expected(self, device: torch.device) -> Route | None:
        """Give the latest route, where nothing can be timed; None if there is none for a device."""
        return self.latest.route if self.latest is not None and self._device == device else None

    def _move(self, device: torch.device) -> None:
        """Forget what was decided on another device."""
        if self._device != device:
            self._device, self.latest = device, None
            self.decisions.clear()

    def operands(self, weight: MaskedWeight, w_OC: Tensor | None, route: Route, both: bool) -> Operands:
        """Give what the products multiply by: kept from an earlier call since the optimizer's last step, or made now."""
        raw = weight.raw
        if torch.compiler.is_compiling() or _is_captured(raw):
            return _make(weight, w_OC, route, both, packed=False)
        if not isinstance(raw, nn.Parameter):  # called with other weights, through torch.func
            return _make(weight, w_OC, route, both, packed=True)
        # Held weakly, no other storage can come to lie where this one lay.
        place = StorageWeakRef(raw.untyped_storage()), raw.data_ptr()  # type: ignore[no-untyped-call]
        key = (_optimizer_steps(), raw._version, *place, *route)
        kept = self._kept
        # Reentrant checkpointing asks for the forward one alone, and for both, in turns.
        if kept is None or kept[0] is not raw or kept[1] != key or (both and kept[2].backward is None):
            kept = self._kept = raw, key, _make(weight, w_OC, route, both, packed=True)
        return kept[2]


def obstacle(weight: MaskedWeight) -> str:
    """Say why a weight can never be multiplied by on sparse tensor cores; empty if it may."""
    layer, pattern = weight.layer, weight.told.pattern
    if weight.key != "weight" or not is_layer(layer):
        return "no layer of its own multiplies by it"
    if has_own_forward(layer.nm_base):
        return f"{layer.nm_base.__name__} has a forward of its own"
    shape = weight.raw.shape
    if is_transposed_convolution(layer) or any(size != 1 for size in shape[2:]):
        return "only Linear layers and 1x1 convolutions are products of two matrices"
    if _is_convolution(layer) and (layer.groups != 1 or layer.padding not in ("valid", "same", (0,) * len(shape[2:]))):
        return "its convolution has groups or padding"
    if not pattern.implies(TENSOR_CORES):
        return f"{pattern} may keep more than 2 of 4"
    if any(size % MULTIPLE for size in shape[:2]):
        return f"{shape[0]}x{shape[1]} are not both multiples of {MULTIPLE}"
    return ""


def missing() -> str:
    """Say why this machine has no sparse tensor cores that torch could use; empty if it has."""
    if _has_kernels("cpu"):
        return ""
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    lacking = missing_in()
    if not (lacking or (_has_kernels("cuda") and torch.backends.cusparselt.is_available())):
        return f"torch {torch.__version__} was built without cuSPARSELt"
    return lacking


def missing_in(device: torch.device | None = None) -> str:
    """Say that a GPU has no sparse tensor cores, by default the current one; empty if it has."""
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return ""
    return f"{torch.cuda.get_device_name(device)} has no sparse tensor cores"


def follow(weight: MaskedWeight, claimed: bool) -> None:
    """Open or close the sparse products of a layer before its next step; a controller calls this after each.

    Compressing makes any mask 2:4, silently. So when a method says that its weight is, that is looked at first; a
    device is waited for then.

    Args:
        weight: any masked weight.
        claimed: whether its method says that all blocks keep N at most from now on.
    """
    hardware = weight.hardware
    if hardware is None or hardware.mode == "off":
        return
    if hardware.is_open != claimed:
        hardware.close()
        hardware.is_open = claimed and not is_sharded(weight.raw) and _is_24(weight)
    if hardware.is_open:
        hardware.expect(weight)


def product(weight: MaskedWeight, x: Tensor, *rest: Any) -> Tensor | None:
    """Compute what a layer's forward would, on sparse tensor cores; None where it has to compute it itself."""
    hardware, layer = weight.hardware, weight.layer
    if hardware is None or not hardware.is_open or not layer.training or rest:
        return None
    dtype = _dtype(weight.raw, x) if _is_ordinary(x) else None
    rows = None if dtype is None else _as_rows(layer, x)
    if dtype is None or rows is None:
        return None
    if torch.compiler.is_compiling() or _is_captured(x):  # nothing can be timed now
        route = hardware.expected(x.device)
    else:
        route = hardware.decide(weight, math.prod(rows.shape[:-1]), dtype)
    if route is None or not route.is_sparse or route.dtype != dtype:
        return None
    if route.forward == DENSE and not x.requires_grad:
        return None
    # The masked weight is looked at once a step; in between it only says where the gradient goes.
    w_OC = None if weight.told.method.straight_through else _forward_matrix(weight)
    operands = hardware.operands(weight, w_OC, route, x.requires_grad)
    x_RC = rows.reshape(-1, rows.shape[-1]).to(dtype).contiguous()
    y_RO = multiply(x_RC, _matrix(weight, weight.raw) if w_OC is None else w_OC, layer.bias, operands)  # type: ignore[arg-type]
    y = y_RO.reshape(*rows.shape[:-1], y_RO.shape[-1])
    return y.movedim(-1, 1) if _is_convolution(layer) else y


def _is_ordinary(x: Any) -> bool:
    """Tell whether an input is a tensor with memory, and nobody looks on who could not follow the products."""
    if not isinstance(x, Tensor) or x.is_nested or is_exporting():
        return False
    if torch.compiler.is_compiling():
        return not torch._C._are_functorch_transforms_active()
    return is_plain(x) and torch._C._get_tracing_state() is None and forward_ad._current_level < 0


def _dtype(raw: Tensor, x: Tensor) -> torch.dtype | None:
    """Give the half precision in which the layer's own forward would multiply; None where it is another one, or refused."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        taken = {x.dtype, raw.dtype} <= {torch.float32, *HALVES}  # autocast leaves float64 as it is
        dtype = torch.get_autocast_dtype(device) if taken else None
    else:
        dtype = x.dtype if x.dtype == raw.dtype else None
    return dtype if dtype in HALVES else None


def _as_rows(layer: Any, x: Tensor) -> Tensor | None:
    """Give a layer's input with what it sums over last; None where that is not so in memory, or the rows are none."""
    if not _is_convolution(layer):
        return x if x.dim() > 1 and x.numel() else None
    if x.dim() != len(layer.stride) + 2 or not x.numel():
        return None
    last = x.movedim(1, -1)
    if not last.is_contiguous():  # not channels_last
        return None
    for axis, stride in enumerate(layer.stride, start=1):
        last = last[(slice(None),) * axis + (slice(None, None, stride),)]
    return last


def _decide(weight: MaskedWeight, rows: int, dtype: torch.dtype, forced: bool) -> Decision:
    raw_OSC, method = weight.raw_OSC, weight.told.method
    outputs, _, inputs = raw_OSC.shape
    bias = getattr(weight.layer, "bias", None) is not None
    forward = Product(outputs, inputs, rows, _name(dtype), bias=bias)
    timings: list[Timing | None] = [timing_of(forward, raw_OSC.device), None]
    if method.sparse_input_gradient:
        gathers = method.row_order(weight.state) is not None
        other = Product(inputs, outputs, rows, _name(dtype), input_gradient=True, gathers=gathers)
        timings[1] = timing_of(other, raw_OSC.device)
    taken = [t.algorithm if t is not None and (t.usable if forced else t.wins) else DENSE for t in timings]
    fused = False
    if taken[1] != DENSE and _can_write_both(method):
        pattern = weight.told.pattern if method.splits_backward else None
        fused = fusing_pays(_forward_matrix(weight).detach(), dtype, method.row_order(weight.state), pattern)
    return Decision(Route(dtype, taken[0], taken[1], fused), forward, *timings)  # type: ignore[arg-type]


def _can_write_both(method: Method[Any]) -> bool:
    return not method.splits_backward or method.backward_by_magnitude


@torch.no_grad()
def _make(weight: MaskedWeight, w_OC: Tensor | None, route: Route, both: bool, *, packed: bool) -> Operands:
    """Make the operands of a layer from its forward weight, computed here if it is not given."""
    method, state, pattern = weight.told.method, weight.state, weight.told.pattern
    w_OC, order = (_forward_matrix(weight) if w_OC is None else w_OC).detach(), method.row_order(state)
    backward: Tensor | None = None
    if both and route.input_gradient != DENSE and _can_write_both(method):
        columns = pattern if method.splits_backward else None
        forward, backward = both_ways(w_OC, route.dtype, order, columns, fused=route.fused and packed)
    else:
        forward = w_OC.to(route.dtype).contiguous()
        if both:
            other_OSC = method.backward_weight(w_OC.unsqueeze(1), state, pattern)
            backward = w_OC if other_OSC is None else other_OSC.squeeze(1)
            if route.input_gradient != DENSE:
                backward = (backward if order is None else backward.index_select(0, order)).t()
            backward = backward.to(route.dtype).contiguous()
    if packed:
        forward = forward if route.forward == DENSE else compress(forward)
        backward = backward if backward is None or route.input_gradient == DENSE else compress(backward)
    # A copy, as DDP writes into buffers at every forward, also between one and its backward.
    return Operands(forward, route.forward, backward, route.input_gradient, None if order is None else order.clone())


@torch.no_grad()
def _is_24(weight: MaskedWeight) -> bool:
    both, route = weight.told.method.sparse_input_gradient, Route(weight.raw.dtype, 0, 0)
    made = _make(weight, None, route, both, packed=False)
    along = [t for t in (made.forward, made.backward) if t is not None]
    return all(check_blocks(t.unsqueeze(1), TENSOR_CORES).holds for t in along)


def _forward_matrix(weight: MaskedWeight) -> Tensor:
    return _matrix(weight, weight.forward_weight())


def _matrix(weight: MaskedWeight, t: Tensor) -> Tensor:
    """Read a tensor of the raw weight's shape as ``[O, C]``, a view."""
    return canonical(t, weight.told.reduction_axis).squeeze(1)


def _is_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd)


def _is_captured(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _has_kernels(device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_cslt_compress", device.upper())


def _rounded(rows: int) -> int:
    return min(1 << max(4, (rows - 1).bit_length()), _MOST_ROWS)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_steps = 0


def _optimizer_steps() -> int:
    """Count the steps of all optimizers of this process, from the first time that it is asked for."""
    _count_steps()
    return _steps


@cache
def _count_steps() -> None:
    def count(*_: Any) -> None:
        # Not the tensors' versions alone: fused optimizers do not count them up.
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)
