"""Permute the input channels of layers so that their masks keep more, and whatever writes them alike (Pool & Yu 2021).

A *region* is a set of channels whose order is free, with all that has to follow it: output channels of the layers
before, norms, depthwise convolutions, input channels of the layers behind. It is free if every operation on it is
known not to mind. What a graph does not show certainly is left alone: the answer of the model must not change.

Training and evaluation mode are both read, and a forward with optional arguments in several ways of calling it. Where
a module cannot be traced, its parts are read one by one, if it can be seen to call them and not what is inside them.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from nmgraph.errors import ConversionError
from nmgraph.layers.kinds import is_layer
from nmgraph.nm.channel_permutation import ESCAPE_WORK, ChannelOrder, best_order
from nmgraph.nm.grouping import FLAT, canonical
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.channel_claims import Claim, Claims
from nmgraph.passes.channel_flow import follow
from nmgraph.passes.channel_runs import Run, pin, whole
from nmgraph.passes.permutation_report import PermutationReport, Region
from nmgraph.passes.rewrite import Decision
from nmgraph.passes.structure import tensors_of
from nmgraph.passes.trace import Trace, Tracing, in_mode, trace

_ESCAPE_WORK = 2**32  # what the searches of all regions may spend on escapes, a few seconds


@dataclass(frozen=True)
class ChannelPlan:
    """New orders for axes of parameters and buffers, and what they gain. Nothing is changed before ``apply``.

    Attributes:
        moves: tensor, axis and int64 order: entry ``i`` becomes what entry ``order[i]`` was.
        report: what the regions are.
    """

    moves: tuple[tuple[Tensor, int, Tensor], ...]
    report: PermutationReport

    def apply(self) -> None:
        """Permute in place; every tensor stays the object it was, in its memory format."""
        _move((t, dim, order) for t, dim, order in self.moves)

    def undo(self) -> None:
        """Take back what ``apply`` did."""
        _move((t, dim, order.argsort()) for t, dim, order in self.moves)


def plan_permutation(
    model: nn.Module, decisions: Sequence[Decision], calls: Mapping[str, int] | None = None
) -> ChannelPlan:
    """Find the regions that layers to be pruned read, and search the best order for each.

    Args:
        model: dense.
        decisions: what its sites become.
        calls: how often a run of the model called each module, where that is known.
    """
    claims = Claims()
    for view in _views(model, calls):
        follow(view.root, view.graph, view.prefix, claims, view.leaves)
    _freeze_the_unmovable(model, claims)
    claims.settle()
    readers = {d.site.name: d for d in decisions if d.refusal is None}
    for claim in claims.axes.values():
        _pin_misfits(claim, readers)
    regions: list[Region] = []
    orders: dict[Run, ChannelOrder] = {}
    found_regions = list(_regions(claims, readers))
    work = min(ESCAPE_WORK, _ESCAPE_WORK // max(1, len(found_regions)))
    for run, found in found_regions:
        region, better = _search(run, found, readers, work)
        regions.append(region)
        if better is not None:
            orders[run] = better
    moves = [(c.tensor, c.dim, order) for c in claims.axes.values() if (order := _order_of(c, orders)) is not None]
    return ChannelPlan(tuple(moves), PermutationReport(tuple(regions)))


def require_same_answer(before: Sequence[Tensor], after: Sequence[Tensor], name: str) -> None:
    """Refuse a permutation that changed the model.

    Raises:
        ConversionError: if its answers differ by more than rounding.
    """
    for one, other in zip(before, after, strict=True):
        if not one.is_floating_point():
            continue
        # Sums in another order differ by rounding; a wrong order of channels, by much more.
        allowed = torch.finfo(one.dtype).eps ** 0.5 * one.detach().abs().nan_to_num(posinf=0.0).max().clamp(min=1e-30)
        if bool(((one - other).abs() > allowed).any()):
            raise ConversionError(
                f"{name} answers otherwise after its channels were permuted, or answers otherwise each time; it has been "
                "left as it was. Convert it without permute_channels (--permute-channels)."
            )


def _regions(claims: Claims, readers: Mapping[str, Decision]) -> Iterator[tuple[Run, list[Claim]]]:
    """Give every run that a layer to be pruned reads, with all claims on it."""
    by_run: dict[Run, list[Claim]] = {}
    for claim in claims.axes.values():
        for run in dict.fromkeys(whole(claim.runs)):
            by_run.setdefault(run, []).append(claim)
    for run, found in by_run.items():
        if any(_reader(c, readers) for c in found):
            yield run, found


def _search(
    run: Run, claims: Sequence[Claim], readers: Mapping[str, Decision], work: int
) -> tuple[Region, ChannelOrder | None]:
    writers = tuple(dict.fromkeys(_owner(c) for c in claims if "writes" in c.roles))
    reading = tuple(dict.fromkeys(_owner(c) for c in claims if _reader(c, readers)))
    if run.pinned:
        return Region(writers, reading, run.size, False, reason=run.pinned), None
    found = best_order([part for c in claims if (d := _reader(c, readers)) for part in _columns(c, run, d)], work=work)
    gained = found.after > found.before
    reason = "" if gained else "no order was found that keeps more"
    region = Region(writers, reading, run.size, gained, found.before, found.after, found.ideal, reason)
    return region, found if gained else None


def _reader(claim: Claim, readers: Mapping[str, Decision]) -> Decision | None:
    """Give the decision of a layer whose reduction axis the claim is."""
    decision = readers.get(_owner(claim))
    if decision is None or "reads" not in claim.roles or not claim.name.endswith("weight"):
        return None
    return decision if decision.recipe.reduction_axis in (FLAT, claim.dim) else None


def _owner(claim: Claim) -> str:
    return claim.name.rpartition(".")[0]


def _columns(claim: Claim, run: Run, decision: Decision) -> Iterator[tuple[Tensor, Pattern]]:
    """Give the columns of a reader's weight that are the run's: ``w_RC``, once for each time it reads the run."""
    w_OSC = canonical(claim.tensor.detach(), claim.dim)
    begin = 0
    for other in whole(claim.runs):
        if other is run:
            yield w_OSC[..., begin : begin + run.size].flatten(0, 1), decision.recipe.pattern
        begin += other.size


def _pin_misfits(claim: Claim, readers: Mapping[str, Decision]) -> None:
    """Keep channels whose blocks do not lie within them, at a reader."""
    decision = _reader(claim, readers)
    if decision is None:
        return
    if decision.recipe.reduction_axis == FLAT:
        pin(claim.runs, f"blocks of {_owner(claim)} run flat")
        return
    m, begin = decision.recipe.pattern.m, 0
    for run in whole(claim.runs):
        end = begin + run.size
        if begin % m or end % m:
            pin((run,), f"{_owner(claim)} reads it as channels {begin} to {end - 1}, which cuts blocks of {m}")
        begin = end


def _order_of(claim: Claim, orders: Mapping[Run, ChannelOrder]) -> Tensor | None:
    """Give the order of an axis, put together from its runs; None if nothing moves."""
    if not any(run in orders for run in whole(claim.runs)):
        return None
    parts, begin = [], 0
    for run in whole(claim.runs):
        parts.append(begin + (orders[run].permutation_C if run in orders else torch.arange(run.size)))
        begin += run.size
    return torch.cat(parts)


def _move(moves: Any) -> None:
    with torch.no_grad():
        for tensor, dim, order in moves:
            for t in (tensor, tensor.grad) if tensor.is_leaf and tensor.grad is not None else (tensor,):
                t.copy_(t.index_select(dim, order.to(t.device)))


def _freeze_the_unmovable(model: nn.Module, claims: Claims) -> None:
    """Freeze tensors whose entries cannot be moved, or not without somebody noticing."""
    kept = {id(t) for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    kept |= {id(p) for p in model.parameters()}
    held = {id(t): t for t in tensors_of(model)}
    memories = Counter(_memory(t) for t in held.values())
    for claim in claims.axes.values():
        t = claim.tensor
        if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.is_meta or t.is_inference():
            claims.freeze(t, f"{claim.name} is no plain tensor")
        elif id(t) not in kept:
            claims.freeze(t, f"{claim.name} is in no state_dict")
        elif memories[_memory(t)] > 1 or t.untyped_storage().nbytes() < t.numel() * t.element_size():
            claims.freeze(t, f"{claim.name} shares its memory")
        elif t._backward_hooks or getattr(t, "_post_accumulate_grad_hooks", None):
            claims.freeze(t, f"{claim.name} has hooks on its gradient")
        elif not bool(torch.isfinite(t.detach()).all()):
            claims.freeze(t, f"{claim.name} holds NaN or infinity")


def _memory(t: Tensor) -> tuple[Any, ...]:
    if t.is_meta or type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided:
        return (id(t),)
    return t.device, t.untyped_storage().data_ptr() or id(t)


# Which graphs tell how a model uses its channels.


@dataclass(frozen=True)
class _View:
    """One graph of a module of the model."""

    root: nn.Module
    graph: Any
    prefix: str
    leaves: list[str]


def _views(model: nn.Module, calls: Mapping[str, int] | None) -> Iterator[_View]:
    """Give the graphs of a model; where a module has none, those of its parts."""
    yield from _views_of(model, "", (), calls)


def _views_of(
    module: nn.Module, prefix: str, untraced: tuple[nn.Module, ...], calls: Mapping[str, int] | None
) -> Iterator[_View]:
    traces = _traces(module)
    if not all(t.graph is not None for t in traces):
        traces = []
    if untraced and traces and not _is_called_whole(module, prefix, traces, untraced, calls):
        return
    for traced in traces:
        yield _View(traced.root, traced.graph, prefix, _untraced_leaves(traced))
    leaves = {prefix: module} if not traces else {
        f"{prefix}{name}.": module.get_submodule(name) for traced in traces for name in _untraced_leaves(traced)
    }  # fmt: skip
    for path, leaf in leaves.items():
        for name, child in leaf.named_children():
            if not is_layer(child):
                yield from _views_of(child, f"{path}{name}.", (*untraced, leaf), calls)


def _traces(module: nn.Module) -> list[Trace]:
    """Trace a module in both modes and in all ways of calling it that its signature knows; up to the first failure."""
    # What hooks of a module see, the graph does not show.
    hooked = {
        type(m): "it has hooks"
        for m in module.modules()
        if m is not module and type(m) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict) and _has_hooks(m)
    }
    if any(_has_hooks(m) for m in module.modules() if type(m) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return [Trace(module, None, "it has hooks")]
    traces = []
    for training in (True, False):
        for given in _ways_to_call(module):
            with in_mode(module, training):
                traces.append(trace(module, dict(hooked), Tracing(concrete_args=given)))
            if traces[-1].graph is None:
                return traces
    return traces


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _ways_to_call(module: nn.Module) -> list[dict[str, Any]]:
    """List values for the optional arguments of a forward: all defaults; each one given; flags the other way; all given."""
    optional = {
        name: p.default
        for name, p in inspect.signature(module.forward).parameters.items()
        if p.default is not p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    ways = [optional] if optional else [{}]
    for name, default in optional.items():
        others = {key: value for key, value in optional.items() if key != name}
        ways.append({**others, name: not default} if isinstance(default, bool) else others)
    flags = {name: value for name, value in optional.items() if isinstance(value, bool)}
    return [*ways, flags] if len(optional) - len(flags) > 1 else ways


def _untraced_leaves(traced: Trace) -> list[str]:
    assert traced.graph is not None
    called = {str(n.target) for n in traced.graph.nodes if n.op == "call_module"}
    kinds = {name: type(traced.root.get_submodule(name)) for name in called}
    return sorted(name for name, kind in kinds.items() if f"{kind.__module__}.{kind.__qualname__}" in traced.leaves)


def _is_called_whole(
    module: nn.Module,
    prefix: str,
    traces: Sequence[Trace],
    untraced: Sequence[nn.Module],
    calls: Mapping[str, int] | None,
) -> bool:
    """Tell whether modules without a graph call this one, and not the layers inside it past its forward."""
    if calls is not None:
        times = calls.get(prefix.rstrip("."), 0)
        inside = [name for name, part in module.named_modules() if is_layer(part)]
        counts = [Counter(str(n.target) for n in t.graph.nodes if n.op == "call_module") for t in traces if t.graph]
        ran = {name: calls.get(prefix + name, 0) for name in inside}
        return times > 0 and any(all(ran[name] == times * count[name] for name in inside) for count in counts)
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False  # who loops over it leaves no trace in the source
    own = set(dir(type(module))) - set(dir(nn.Module)) - {"forward"}
    forbidden = own | set(module._modules) | set(module._parameters) | _REACHING
    return not any("forward" in holder.__dict__ or forbidden & _words(type(holder)) for holder in untraced)


# Not parameters(): its use is to ask for a dtype or device.
_REACHING = {
    "children", "named_children", "modules", "named_modules", "_modules", "get_submodule",
    "named_parameters", "_parameters", "__dict__",
}  # fmt: skip


def _words(kind: type) -> set[str]:
    """Collect the names and strings in a class's forward, and in the methods and functions of its package that it uses."""
    package = kind.__module__.partition(".")[0]
    pending: list[Any] = [inspect.getattr_static(kind, "forward")]
    words: set[str] = set()
    seen: set[Any] = set()
    while pending:
        value = pending.pop()
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        value = inspect.unwrap(value) if callable(value) else value
        if not isinstance(value, FunctionType) or value in seen:
            continue
        seen.add(value)
        found = set(_words_of(value.__code__))
        words |= found
        for name in found:
            method = inspect.getattr_static(kind, name, None)
            if method is not inspect.getattr_static(nn.Module, name, None):
                pending.append(method)
            other = value.__globals__.get(name)
            if isinstance(other, FunctionType) and other.__module__.partition(".")[0] == package:
                pending.append(other)
    return words


def _words_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words_of(constant)
