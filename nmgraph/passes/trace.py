"""Trace a model to understand it: automatic leaves, both modes, nothing left behind in the model.

Plain ``torch.fx`` gives up on the first module it cannot follow, and bakes ``self.training`` into the graph. Here
a module that cannot be traced becomes a leaf and the rest is tried again; where a graph shall take a module's
place, training and evaluation mode are both traced, and what differs between them stays a leaf.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from nmgraph.errors import ConversionError, first_line
from nmgraph.layers.kinds import is_layer
from nmgraph.passes.products import Use, find_uses
from nmgraph.passes.structure import copy_structure, share

_lock = threading.Lock()  # torch.fx puts its own __call__ into nn.Module, and takes it out again


@dataclass(frozen=True)
class Trace:
    """What could be learned from a model's graph.

    Attributes:
        root: the copy that was traced, sharing the model's tensors.
        graph: its graph, or None where the root itself cannot be traced.
        failure: why not.
        leaves: types that had to stay leaves, with the reason.
    """

    root: nn.Module
    graph: fx.Graph | None
    failure: str | None = None
    leaves: dict[str, str] = field(default_factory=dict)


class _Tracer(fx.Tracer):
    # An in-place change of a buffer must become a node, not happen for real while tracing.
    proxy_buffer_attributes = True

    def __init__(self, leaves: dict[type[nn.Module], str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.failed: nn.Module | None = None
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Never enter a layer that holds a weight, whatever its subclass does.
        return type(m) in self.leaves or is_layer(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m  # the innermost one sees the exception first
            raise


@dataclass(frozen=True)
class Tracing:
    """What a user knows of how to trace the model.

    Attributes:
        tracer: used for the model as a whole in place of ours; its leaves are its own.
        concrete_args: arguments of the forward that are fixed, as ``torch.fx`` takes them.
    """

    tracer: fx.Tracer | None = None
    concrete_args: dict[str, Any] | None = None


USUAL = Tracing()


def trace(model: nn.Module, leaves: dict[type[nn.Module], str] | None = None, how: Tracing = USUAL) -> Trace:
    """Trace in the model's present mode; types that cannot be traced become leaves. The model is not touched."""
    root = copy_structure(model, share)
    leaves = dict(leaves or {})
    while True:
        tracer = how.tracer or _Tracer(leaves)
        try:
            with _lock, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                # Another seed for each mode, so that a random draw that gets baked in shows as a difference.
                torch.default_generator.manual_seed(int(root.training))
                graph = tracer.trace(root, how.concrete_args)
        except Exception as error:
            # Any error at all: the code being traced is the user's, and the answer is a leaf, never a crash.
            reason = f"{type(error).__name__}: {first_line(error).partition('. ')[0]}"
            failed = tracer.failed if isinstance(tracer, _Tracer) else None
            if failed is None or type(failed) in leaves:
                return Trace(root, None, reason, _named(leaves))
            leaves[type(failed)] = reason
        else:
            return Trace(root, graph, None, _named(leaves))


def trace_both_modes(model: nn.Module, how: Tracing = USUAL) -> Trace:
    """Trace so that one graph is right in training and in evaluation.

    Raises:
        ConversionError: if the root cannot be traced, or itself differs between the modes.
    """
    leaves: dict[type[nn.Module], str] = {}
    while True:
        with in_mode(model, True):
            train = trace(model, leaves, how)
        with in_mode(model, False):
            evaluate = trace(model, leaves, how)
        for traced in (train, evaluate):
            if traced.graph is None:
                raise ConversionError(
                    f'{type(model).__name__} cannot be traced as a whole ({traced.failure}). Use mode="auto", which '
                    "converts its layers in place and needs no graph."
                )
        difference = _first_difference(train, evaluate)
        if difference is None:
            return Trace(train.root, train.graph, None, train.leaves | evaluate.leaves)
        stack = list((difference.meta.get("nn_module_stack") or {}).values())
        owner = type(train.root.get_submodule(stack[-1][0])) if stack and stack[-1][0] else type(model)
        if owner is type(model) or owner in leaves or how.tracer is not None:
            raise ConversionError(
                f"{type(model).__name__}.forward itself differs between train() and eval() (at "
                f'{difference.format_node()}), and one graph cannot hold both. Use mode="auto", or move that step '
                "into a module of its own."
            )
        leaves[owner] = "differs between train() and eval()"


@dataclass
class Uses:
    """How weights are used, as far as graphs, or a run, show it.

    Attributes:
        calls: how often each module is called, by qualified name; leaves' inner modules are missing.
        products: those with bare parameters, with the parameters' qualified names.
        macs: multiply-accumulate operations with each parameter in one run, where there was one.
        untraced: classes whose own forward could not be followed, or ``(root)``, with the reason.
        unfollowed: parameters that these modules hold themselves; what becomes of them is not known.
        stem: sites that no other site comes before, from the model's input on; none where an embedding does.
        head: sites that no other site comes after, up to the model's output.
    """

    calls: Counter[str] = field(default_factory=Counter)
    products: list[Use] = field(default_factory=list)
    macs: Counter[str] = field(default_factory=Counter)
    untraced: dict[str, str] = field(default_factory=dict)
    unfollowed: list[str] = field(default_factory=list)
    stem: tuple[str, ...] = ()
    head: tuple[str, ...] = ()


def uses(model: nn.Module, how: Tracing = USUAL) -> Uses:
    """Follow the model's forward; where the root resists, follow each child by itself."""
    found = Uses()
    traced = trace(model, how=how)
    _collect(model, traced, "", found)
    found.stem, found.head = _ends(model, traced)
    return found


def _ends(model: nn.Module, traced: Trace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Find the layers at both ends: by the graph, or where there is none, by the order of the modules."""
    if traced.graph is None:
        holders = [name for name, module in model.named_modules() if _holds_weights(module)]
        layers = [name for name in holders if is_layer(model.get_submodule(name))]
        return tuple(n for n in layers[:1] if n == holders[0]), tuple(layers[-1:])
    forward, backward = list(traced.graph.nodes), list(reversed(traced.graph.nodes))
    stem = _first_on_every_path(forward, lambda node: node.all_input_nodes, traced.root, first=True)
    head = _first_on_every_path(backward, lambda node: list(node.users), traced.root, first=False)
    return stem, head


def _first_on_every_path(
    nodes: list[fx.Node], before: Callable[[fx.Node], list[fx.Node]], root: nn.Module, *, first: bool
) -> tuple[str, ...]:
    """List the layers with no other layer or embedding before them; of a module that was not followed, its first or last."""
    ends: list[str] = []
    passed: set[fx.Node] = set()  # nodes that a layer comes before
    for node in nodes:
        behind = any(n in passed for n in before(node))
        called = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        inside = [] if called is None else [
            (f"{node.target}.{name}".rstrip("."), module)
            for name, module in called.named_modules()
            if _holds_weights(module)
        ]  # fmt: skip
        if inside and not behind:
            name, module = inside[0 if first else -1]
            ends += [name] if is_layer(module) else []
        if inside or behind:
            passed.add(node)
    return tuple(dict.fromkeys(ends if first else reversed(ends)))


def _holds_weights(module: nn.Module) -> bool:
    return is_layer(module) or isinstance(module, nn.Embedding)


def _collect(module: nn.Module, traced: Trace, prefix: str, found: Uses) -> None:
    found.untraced.update(traced.leaves)
    if traced.graph is None:
        if type(module).forward is not nn.Module.forward:  # containers have none to follow
            found.untraced[_type_name(type(module)) if prefix else "(root)"] = traced.failure or ""
        _collect_unfollowed(module, prefix, found)
        return
    for node in traced.graph.nodes:
        if node.op == "call_module":
            found.calls[prefix + str(node.target)] += 1
            called = traced.root.get_submodule(str(node.target))
            if _type_name(type(called)) in traced.leaves:
                _collect_unfollowed(called, f"{prefix}{node.target}.", found)
    found.products += [replace(use, parameter=prefix + use.parameter) for use in find_uses(traced.graph, traced.root)]


def _collect_unfollowed(module: nn.Module, prefix: str, found: Uses) -> None:
    found.unfollowed += [prefix + key for key, p in module._parameters.items() if p is not None]
    for name, child in module.named_children():
        if not is_layer(child):
            _collect(child, trace(child), f"{prefix}{name}.", found)


def _first_difference(train: Trace, evaluate: Trace) -> fx.Node | None:
    left, right = _nodes(train), _nodes(evaluate)
    place = {node: i for nodes in (left, right) for i, node in enumerate(nodes)}

    def signature(node: fx.Node, root: nn.Module) -> tuple[Any, ...]:
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{place[n]}")
        # What a forward computed without its inputs is baked in as a constant; a random draw differs each time.
        constant = node.op == "get_attr" and str(node.target).startswith("_tensor_constant")
        value = getattr(root, str(node.target)).tolist() if constant else None
        return node.op, str(node.target), repr(arguments), repr(value)

    for a, b in zip(left, right, strict=False):
        if signature(a, train.root) != signature(b, evaluate.root):
            depth_a, depth_b = (len(n.meta.get("nn_module_stack") or {}) for n in (a, b))
            return a if depth_a >= depth_b else b
    if len(left) != len(right):
        return max(left, right, key=len)[min(len(left), len(right))]
    return None


def _nodes(traced: Trace) -> list[fx.Node]:
    return [] if traced.graph is None else list(traced.graph.nodes)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put all modules into a mode for a while."""
    before = {module: module.training for module in model.modules()}
    try:
        # Not model.train(): some models override it, to keep their norms frozen.
        for module in before:
            module.training = training
        yield
    finally:
        for module, was in before.items():
            module.training = was


def _named(leaves: dict[type[nn.Module], str]) -> dict[str, str]:
    return {_type_name(kind): reason for kind, reason in leaves.items()}


def _type_name(kind: type[nn.Module]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
