"""Follow channels through a graph: who writes them, who carries them in an order, who reads them.

Each tensor of the graph is known by the runs of its channels and the axis they lie on, or not at all. A rule says of
one operation what becomes of them; a rule that is not certain answers None. What has no rule, or no certain answer,
pins all channels that come to it and freezes all parameters that it reads: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, fx, nn

from nmgraph.passes.channel_claims import NUMBER, OPAQUE, Claims, Features, Held, Reading, Value, operation
from nmgraph.passes.channel_functions import ARITHMETIC, ASKED, ASKING, FUNCTIONS
from nmgraph.passes.channel_layers import MODULES
from nmgraph.passes.channel_runs import pin


def follow(root: nn.Module, graph: fx.Graph, prefix: str, claims: Claims, leaves: Collection[str] = ()) -> None:
    """Read one graph of the module at ``prefix``; what it tells is added to the claims.

    ``leaves`` are called modules whose parts have graphs of their own: of these only what this graph uses, too, is frozen.
    """
    claims.touched.clear()
    flow = _Flow(root, prefix, Reading({}, claims), leaves)
    for node in graph.nodes:
        flow.known.values[node] = flow.value(node)
    for name in leaves:
        claims.freeze_module(root.get_submodule(name), f"{prefix}{name} is not followed", claims.touched)


@dataclass(frozen=True)
class _Flow:
    root: nn.Module
    prefix: str
    known: Reading
    leaves: Collection[str]

    def value(self, node: fx.Node) -> Value:
        """Say what a node gives; pin what comes to it where that is not certain."""
        if node.op == "placeholder":
            return OPAQUE
        if node.op == "get_attr":
            return self._held(str(node.target))
        found = None if "out" in node.kwargs else self._rule(node)
        if found is None:
            self._stop(node)
            found = OPAQUE
        return found

    def _rule(self, node: fx.Node) -> Value | None:
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            rule = None if _is_watched(module) else MODULES.get(type(module))
            # A layer takes one argument; another would be one that its class doesn't know.
            if rule is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
                return None
            value = self.known.values[node.args[0]]
            if not isinstance(value, Features) and value is not OPAQUE:
                return None
            return rule(self.known.claims, module, value, f"{self.prefix}{node.target}")
        if node.op == "output":
            return None
        name = operation(node)
        if name in ASKING or (name == "getattr" and node.args[1] in ASKED):
            return NUMBER
        if all(self.known.values[n] is NUMBER for n in node.all_input_nodes):
            return NUMBER if name in ARITHMETIC else OPAQUE
        function = FUNCTIONS.get(name)
        return function(self.known, node) if function else None

    def _held(self, path: str) -> Value:
        owner, _, name = path.rpartition(".")
        found = getattr(self.root.get_submodule(owner), name)
        return Held(f"{self.prefix}{path}", found) if isinstance(found, Tensor) else OPAQUE

    def _stop(self, node: fx.Node) -> None:
        where = self.prefix.rstrip(".")
        reason = f"{_shown(node)} in {where}" if where and node.op not in ("call_module", "output") else _shown(node)
        if node.op == "output":
            reason = f"it is an output of {where or 'the model'}"
        elif node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            reason = f"{self.prefix}{node.target} ({type(module).__name__}) is not followed"
            if node.target not in self.leaves:
                self.known.claims.freeze_module(module, reason)
        for given in node.all_input_nodes:
            value = self.known.values[given]
            if isinstance(value, Held):
                self.known.claims.freeze(value.tensor, reason)
            elif not isinstance(value, str):
                for features in (value,) if isinstance(value, Features) else value:
                    pin(features.runs, reason)


def _shown(node: fx.Node) -> str:
    return f"{operation(node) or getattr(node.target, '__name__', node.target)} is not followed"


def _is_watched(module: nn.Module) -> bool:
    """Tell whether hooks, or a forward of its own, may do more than the class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__
