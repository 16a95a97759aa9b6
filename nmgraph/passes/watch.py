"""Run a model once and watch its products: which parameters are multiplied by, along which axis, at what cost.

A graph shows what a forward says; a run shows what it does, whatever Python leads there. Below autograd everything is
one of a few products of matrices, and a weight in them is known by the memory it lies in: a transposed, selected or
split view still has the strides of its parameter's axes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from nmgraph.layers.kinds import is_layer
from nmgraph.passes.products import LOOKUP, OPERANDS, Use, axis_of
from nmgraph.passes.structure import copy_structure, share_parameters

_PRODUCTS = {name: OPERANDS[name][1] for name in ("mm", "bmm", "addmm", "baddbmm", "linear")}
_PRODUCTS |= {"_grouped_mm": _PRODUCTS["mm"], "_addmm_activation": _PRODUCTS["addmm"]}
_ATTENTION_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"  # torch 2.13 counts only those of GPUs
_COPIES = {"_to_copy", "clone", "copy"}


@dataclass
class Watched:
    """What a run showed.

    Attributes:
        calls: how often each module was called, by qualified name.
        uses: of bare parameters in products, each once.
        macs: multiply-accumulate operations with each parameter, by its qualified name.
        reached_macs: those of them whose other factor needs a gradient, where the run computes gradients.
        all_macs: those of all products, also between activations.
    """

    calls: Counter[str] = field(default_factory=Counter)
    uses: list[Use] = field(default_factory=list)
    macs: Counter[str] = field(default_factory=Counter)
    reached_macs: Counter[str] = field(default_factory=Counter)
    all_macs: int = 0


def watch(model: nn.Module, run: Callable[[nn.Module], Any]) -> Watched:
    """Run a copy that shares the parameters, in evaluation mode, and watch it.

    Of a model on the meta device only shapes are computed: what depends on values is not seen.
    """
    if any(p.is_meta for p in model.parameters()):
        with fake_tensors() as fakes:
            return watch_itself(fake_copy(model, fakes).eval(), run)
    return watch_itself(copy_structure(model, share_parameters).eval(), run)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Compute shapes alone; what can't be done with them raises, and is not logged besides."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
            yield fakes
    finally:
        log.disabled = before


def fake_copy(model: nn.Module, fakes: FakeTensorMode) -> nn.Module:
    """Copy a model with tensors that have shapes and no values; those on the meta device count as being on the CPU."""

    def fake(t: Tensor) -> Tensor:
        if t.is_meta:
            made = fakes.fake_tensor_converter.from_meta_and_device(fakes, t.detach(), torch.device("cpu"))
        else:
            made = fakes.from_tensor(t.detach())
        return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made

    return copy_structure(model, fake)


def watch_itself(watched: nn.Module, run: Callable[[nn.Module], Any]) -> Watched:
    """Run a model that is a copy already, and watch it."""
    found = Watched()
    for name, module in watched.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: found.calls.update([name]))
    devices = {p.device for p in watched.parameters() if p.is_cuda}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer shows no products
    try:
        with torch.random.fork_rng(devices=devices), _Spy(watched, found):
            run(watched)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return found


def prefer(seen: list[Use], read: list[Use]) -> list[Use]:
    """Join what a run showed of parameters and what a graph said of them: of the same one, the run counts."""
    ran = {use.parameter for use in seen}
    return seen + [use for use in read if use.parameter not in ran]


@dataclass(frozen=True)
class _Span:
    """Part of a memory that holds a parameter, or a copy of one: its axes by their strides."""

    parameter: str
    begin: int
    end: int
    axes: dict[int, int]
    shape: tuple[int, ...]
    computed: bool = False


class _Spy(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, found: Watched) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self.spans: dict[int, list[_Span]] = {}  # by memory
        layers = {id(m._parameters.get("weight")) for m in model.modules() if is_layer(m)}
        self.names: dict[str, list[str]] = {}  # all, by the first
        self.held: set[str] = set()
        first: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(first.setdefault(id(p), name), []).append(name)
            if id(p) in layers:
                self.held.add(first[id(p)])
        self.constants = {_memory(b) for b in model.buffers()}
        self.alive: list[Tensor] = []  # or their memory would be used again
        for name, p in model.named_parameters():
            axes = {stride: i for i, (size, stride) in enumerate(zip(p.shape, p.stride(), strict=True)) if size > 1}
            begin = int(p.storage_offset())
            self.spans.setdefault(_memory(p), []).append(_Span(name, begin, begin + p.numel(), axes, tuple(p.shape)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            span = self._span(args[0])
            if span is not None and not span.computed and func._schema.arguments[0].alias_info is not None:
                # The model's own parameters must not change because they are looked at.
                self.found.uses.append(Use(span.parameter, name, None, computed=True))
                args = (args[0].clone(), *args[1:])
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.found.all_macs += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
        elif name == _ATTENTION_ON_CPU:
            self.found.all_macs += sdpa_flop_count(*(t.shape for t in args[:3])) // 2  # type: ignore[no-untyped-call]
        if name == "convolution":
            self._note(
                args[1],
                0 if args[6] else 1,
                (args[0] if args[6] else out).numel() * args[1][0].numel(),
                "conv",
                args[0],
                groups=args[8],
            )
        elif name in _PRODUCTS:
            if func.overloadpacket not in flop_registry:
                place, axis = next(iter(_PRODUCTS[name].items()))
                self.found.all_macs += out.numel() * args[place].shape[axis]
            both = 3 if 2 in _PRODUCTS[name] else 1  # the places of the two factors, added
            for place, axis in _PRODUCTS[name].items():
                summed = args[place].shape[axis]
                self._note(args[place], axis, out.numel() * summed, "matmul", args[both - place])
        elif name == "embedding":
            self._note(args[0], None, 0, "embedding")
        else:
            given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self._follow(name, made, given)
        return out

    def _note(
        self, weight: Tensor, axis: int | None, macs: int, function: str, other: Tensor | None = None, groups: int = 1
    ) -> None:
        span = self._span(weight)
        if span is None or len(span.shape) < 2:
            return
        if function == "matmul" and other is not None and span.parameter not in self.held and _is_one_hot(other):
            function, axis = LOOKUP, None
        axes = tuple(span.axes.get(stride) if size > 1 else None for size, stride in _layout(weight))
        along = None if axis is None or span.computed else axis_of(axes, axis, len(span.shape), function)
        if axis is not None and isinstance(along, int) and weight.shape[axis] != span.shape[along]:
            along = None  # a part of it need not hold whole blocks
        use = Use(span.parameter, function, along, span.computed, groups)
        if use not in self.found.uses and span.parameter not in self.held:
            self.found.uses.append(use)
        if axis is not None:
            names = self.names[span.parameter]
            self.found.macs.update(dict.fromkeys(names, macs))
            if other is not None and other.requires_grad:
                self.found.reached_macs.update(dict.fromkeys(names, macs))

    def _follow(self, name: str, out: Tensor, given: list[Tensor]) -> None:
        """Note what a new memory holds, if nothing but parameters and constants went into it."""
        memory = _memory(out)
        if memory in self.spans or memory in self.constants:
            return  # a view
        spans = [self._span(t) for t in given]
        of_parameters = [s for s in spans if s is not None]
        if not of_parameters or any(
            s is None and _memory(t) not in self.constants for s, t in zip(spans, given, strict=True)
        ):
            return
        source, copied = of_parameters[0], name in _COPIES and len(given) == 1
        axes = {
            stride: source.axes[old]
            for (size, stride), (_, old) in zip(_layout(out), _layout(given[0]), strict=False)
            if copied and size > 1 and old in source.axes
        }
        computed = source.computed or not copied
        self.spans[memory] = [_Span(source.parameter, 0, out.numel(), axes, source.shape, computed)]
        self.alive.append(out)

    def _span(self, t: Tensor) -> _Span | None:
        place = t.storage_offset()
        return next((s for s in self.spans.get(_memory(t), ()) if s.begin <= place < s.end or s.computed), None)


def _is_one_hot(t: Tensor) -> bool:
    holds = ((t == 0) | (t == 1)).all() & (t.sum(-1) == 1).all()
    # Under fake tensors what is computed of a real one is fake, too.
    return not (holds.is_meta or isinstance(holds, FakeTensor)) and bool(holds)


def _memory(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _layout(t: Tensor) -> Iterator[tuple[int, int]]:
    return zip(t.shape, t.stride(), strict=True)
