"""A tracer of the user's own, and arguments of the forward that are fixed while tracing."""

import pytest
import torch
from models import Branching, mlp
from torch import fx, nn

import nmgraph
from nmgraph.errors import ConversionError


class Optional(nn.Module):
    """Takes another way where a flag says so."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x, flip=False):
        x = self.first(x)
        if flip:
            x = -x
        return self.last(x)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.head = Branching(), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.part(x))


class BranchingIsALeaf(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Branching) or super().is_leaf_module(m, module_qualified_name)


def test_graph_of_a_model_traced_by_the_users_own_tracer():
    model, x = Nested(), torch.randn(4, 16)
    graph = nmgraph.convert(model, method="srste", mode="graph", tracer=BranchingIsALeaf())
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["part", "head"]
    assert [e.name for e in nmgraph.manifest(graph).converted] == ["part.first", "part.last", "head"]
    graph.eval()
    assert torch.equal(nmgraph.finalize(graph)(x), graph(x))


def test_tracer_that_fails_says_why_in_a_graph_and_is_made_up_for_in_place():
    with pytest.raises(ConversionError, match="cannot be traced as a whole"):
        nmgraph.convert(Nested(), mode="graph", tracer=fx.Tracer())
    found = nmgraph.manifest(nmgraph.convert(Nested(), tracer=fx.Tracer()))
    assert len(found.converted) == 3
    assert "(root)" in found.untraced


def test_arguments_may_be_fixed():
    graph = nmgraph.convert(Optional(), method="srste", mode="graph", concrete_args={"flip": True})
    assert "neg" in {getattr(n.target, "__name__", "") for n in graph.graph.nodes}
    plain = nmgraph.convert(Optional(), method="srste", mode="graph", concrete_args={"flip": False})
    assert "neg" not in {getattr(n.target, "__name__", "") for n in plain.graph.nodes}


def test_exported_program_is_converted_trained_and_finalized(tmp_path):
    torch.export.save(torch.export.export(mlp().train(), (torch.randn(4, 16),)), tmp_path / "a.pt2")
    model = nmgraph.convert(torch.export.load(tmp_path / "a.pt2").module(), method="srste")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.attach(model, optimizer, total_steps=2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    finished, x = nmgraph.finalize(model), torch.randn(4, 16)
    assert nmgraph.verify(finished).holds
    assert len(nmgraph.manifest(finished).converted) == 2
    assert torch.equal(finished(x), model(x))
