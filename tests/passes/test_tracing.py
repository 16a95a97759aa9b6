"""Tracing understands what it can, and touches nothing."""

import copy

import pytest
import torch
from models import Branching, Encoder, Recorder, WithBranchingPart, convnext, deit, mlp, resnet
from torch import fx, nn

from nmgraph.passes.trace import trace, trace_both_modes, uses


def test_traceable_model_gives_its_graph():
    traced = trace(resnet())
    assert traced.failure is None
    assert traced.leaves == {}
    assert "layer4.0.conv2" in {node.target for node in traced.graph.nodes if node.op == "call_module"}


def test_untraceable_part_becomes_a_leaf_with_its_reason():
    traced = trace(WithBranchingPart())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["stem", "part", "head"]
    assert traced.leaves == {
        "models.Branching": "TraceError: symbolically traced variables cannot be used as inputs to control flow"
    }


def test_untraceable_root_gives_its_reason_and_no_graph():
    traced = trace(Branching())
    assert traced.graph is None
    assert traced.failure == "TraceError: symbolically traced variables cannot be used as inputs to control flow"


def test_root_of_the_type_of_a_leaf_gives_no_graph():
    class Nested(Branching):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    assert trace(Nested(Nested(None))).graph is None


@pytest.mark.parametrize("make", [Recorder, convnext, deit, Encoder])
def test_tracing_changes_nothing(make):
    model = make()
    before = {name: copy.copy(vars(module)) for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model)
    uses(model)
    assert {name: vars(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_tracing_both_modes_restores_the_mode_of_every_module():
    model = convnext().train()
    model.features[0].eval()
    before = [m.training for m in model.modules()]
    trace_both_modes(model)
    assert [m.training for m in model.modules()] == before


def test_tracing_both_modes_overrides_a_train_method_that_keeps_its_norms_frozen():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    model = Frozen(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout()).train()
    graph = fx.GraphModule(model, trace_both_modes(model).graph)
    x = torch.randn(4, 16)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(graph(x), expected)
    assert [m.training for m in model] == [True, False, True]


def test_one_graph_is_right_in_both_modes():
    model = convnext()
    traced = trace_both_modes(model)
    assert traced.leaves == {"torchvision.ops.stochastic_depth.StochasticDepth": "differs between train() and eval()"}


def test_calls_are_counted_by_qualified_name():
    model = nn.Sequential(mlp(), mlp())
    assert uses(model).calls == {f"{i}.{j}": 1 for i in (0, 1) for j in (0, 1, 2)}


def test_calls_are_counted_below_a_root_that_cannot_be_traced():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = mlp()

        def forward(self, x):
            return self.part(x) if x.sum() > 0 else x

    found = uses(Root())
    assert found.calls == {"part.0": 1, "part.1": 1, "part.2": 1}
    assert list(found.untraced) == ["(root)"]
