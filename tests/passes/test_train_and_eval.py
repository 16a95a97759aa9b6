"""The weights of a finalized model, in a fresh model, answer the same: in eval, in train, and after switching."""

import copy

import pytest
import torch
from models import Branching, Encoder, FunctionalDropout, WithBranchingPart, cnn, convnext, deit, resnet, swin
from torch import fx, nn
from torch.nn import functional as F

import nmgraph
from nmgraph.errors import ConversionError

VECTOR, SEQUENCE, IMAGE = (4, 16), (2, 5, 32), (2, 3, 32, 32)
NETWORKS = {
    "functional dropout": (FunctionalDropout, VECTOR),
    "untraceable root": (Branching, VECTOR),
    "untraceable submodule": (WithBranchingPart, VECTOR),
    "TransformerEncoder": (Encoder, SEQUENCE),
    "ConvNeXt with StochasticDepth": (convnext, IMAGE),
    "DeiT with DropPath": (deit, IMAGE),
    "Swin with functional attention": (swin, IMAGE),
    "ResNet with batch norm": (resnet, IMAGE),
}
GRAPHS = {name: NETWORKS[name] for name in NETWORKS if name.startswith(("ConvNeXt", "DeiT", "ResNet", "Swin"))}


def answers(model, x):
    """Run in eval, train, eval and train again: every switch, every time with the same seed."""
    outputs = []
    for training in (False, True, False, True):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(model.train(training)(x))
    return outputs


def assert_same_answers(one, other, x):
    for mode, a, b in zip(
        ("eval", "train", "eval again", "train again"), answers(one, x), answers(other, x), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, mode=mode: f"{mode}: {text}")


def finalized_weights_in_fresh_model(converted, dense):
    fresh = copy.deepcopy(dense)
    fresh.load_state_dict(nmgraph.finalize(converted, force=True).state_dict())
    return fresh


@pytest.mark.parametrize("start_in_training", [True, False], ids=["from train", "from eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_finalized_weights_answer_the_same_in_a_fresh_model(name, start_in_training):
    make, shape = NETWORKS[name]
    dense, x = make().train(start_in_training), torch.randn(shape)
    converted = nmgraph.convert(copy.deepcopy(dense), method="lbc")
    fresh = finalized_weights_in_fresh_model(converted, dense)
    assert nmgraph.verify(nmgraph.finalize(converted, force=True)).holds
    assert_same_answers(nmgraph.finalize(converted, force=True), fresh, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_converted_model_answers_as_its_finalized_weights_do(name):
    make, shape = NETWORKS[name]
    dense, x = make(), torch.randn(shape)
    converted = nmgraph.convert(copy.deepcopy(dense), method="srste")  # its mask is N:M from the first forward on
    fresh = finalized_weights_in_fresh_model(converted, dense)
    assert_same_answers(converted, fresh, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_mode_still_differs_where_it_did(name):
    make, shape = NETWORKS[name]
    dense, x = make(), torch.randn(shape)
    evaluated, trained, *_ = answers(nmgraph.convert(dense, method="srste"), x)
    assert not torch.allclose(evaluated, trained)


@pytest.mark.parametrize("start_in_training", [True, False], ids=["from train", "from eval"])
@pytest.mark.parametrize("name", GRAPHS)
def test_graph_answers_as_its_finalized_weights_do(name, start_in_training):
    make, shape = GRAPHS[name]
    dense, x = make().train(start_in_training), torch.randn(shape)
    graph = nmgraph.convert(copy.deepcopy(dense), method="srste", mode="graph")
    assert isinstance(graph, fx.GraphModule)
    assert_same_answers(graph, finalized_weights_in_fresh_model(graph, dense), x)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "auto") for name in NETWORKS), *((name, "graph") for name in GRAPHS)]
)
def test_every_converted_site_is_verified_after_finalizing(name, mode):
    make, _ = NETWORKS[name]
    finished = nmgraph.finalize(nmgraph.convert(make(), method="srste", mode=mode))
    found = nmgraph.verify(finished)
    assert [c.name for c in found.checks if c.expected] == [e.name for e in nmgraph.manifest(finished).converted]
    assert found.holds


def test_graph_shares_parameters_and_leaves_the_model_dense():
    model = cnn()
    graph = nmgraph.convert(model, method="srste", mode="graph")
    assert [id(p) for p in graph.parameters()] == [id(p) for p in model.parameters()]
    assert type(model[0]) is nn.Conv2d
    assert not any(".nm_" in key for key in model.state_dict())
    assert [e.name for e in nmgraph.manifest(graph).converted] == ["3", "7"]


def test_finalized_graph_is_still_a_graph_with_its_manifest():
    finished = nmgraph.finalize(nmgraph.convert(cnn(), method="srste", mode="graph"))
    assert isinstance(finished, fx.GraphModule)
    finished.graph.lint()
    assert nmgraph.verify(finished).holds
    assert [e.name for e in nmgraph.manifest(finished).converted] == ["3", "7"]


def test_modules_that_differ_between_the_modes_stay_leaves_of_the_graph():
    graph = nmgraph.convert(convnext(), mode="graph")
    called = {type(graph.get_submodule(node.target)).__name__ for node in graph.graph.nodes if node.op == "call_module"}
    assert "StochasticDepth" in called
    assert "CNBlock" not in called


def test_part_that_cannot_be_traced_stays_a_leaf_and_its_layers_are_converted():
    dense, x = WithBranchingPart(), torch.randn(VECTOR)
    graph = nmgraph.convert(copy.deepcopy(dense), method="srste", mode="graph")
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["stem", "part", "head"]
    converted = [e.name for e in nmgraph.manifest(graph).converted]
    assert converted == ["stem", "part.first", "part.last", "head"]
    assert_same_answers(graph, finalized_weights_in_fresh_model(graph, dense), x)


def test_graph_is_refused_where_the_root_differs_between_the_modes():
    with pytest.raises(ConversionError) as caught:
        nmgraph.convert(FunctionalDropout(), mode="graph")
    assert str(caught.value) == (
        "FunctionalDropout.forward itself differs between train() and eval() (at %dropout : [num_users=1] = "
        "call_function[target=torch.nn.functional.dropout](args = (%first,), kwargs = {p: 0.5, training: True, inplace: "
        'False})), and one graph cannot hold both. Use mode="auto", or move that step into a module of its own.'
    )


def test_graph_is_refused_where_the_root_cannot_be_traced():
    with pytest.raises(ConversionError) as caught:
        nmgraph.convert(Branching(), mode="graph")
    assert str(caught.value) == (
        "Branching cannot be traced as a whole (TraceError: symbolically traced variables cannot be used as inputs to "
        'control flow). Use mode="auto", which converts its layers in place and needs no graph.'
    )


class Depending(nn.Module):
    """Takes a decision on its input's shape, which a graph bakes in."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x):
        scale = 2.0 if isinstance(x, torch.Tensor) and type(x) is torch.Tensor else 1.0
        return self.layer(x) * scale


def test_graph_is_held_to_the_answer_on_example_inputs():
    with pytest.raises(ConversionError) as caught:
        nmgraph.convert(Depending(), mode="graph", example_inputs=torch.randn(2, 16))
    assert str(caught.value) == (
        "the graph of Depending does not answer as the model does: its forward depends on values that a graph bakes "
        'in. Use mode="auto".'
    )


class Noisy(nn.Module):
    """Draws a number of its own in every forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x):
        return self.layer(x) * torch.rand(1)


def test_graph_is_refused_where_it_would_bake_a_random_draw():
    with pytest.raises(ConversionError, match=r"^Noisy.*auto"):
        nmgraph.convert(Noisy(), mode="graph")


class FusedHead(nn.Module):
    """Multiplies by a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x):
        return F.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("mode", ["auto", "graph"])
def test_whoever_reads_a_converted_weight_gets_the_masked_one(mode):
    dense, x = FusedHead(), torch.randn(2, 16)
    converted = nmgraph.convert(copy.deepcopy(dense), method="srste", mode=mode)
    assert_same_answers(converted, finalized_weights_in_fresh_model(converted, dense), x)
    converted(x).sum().backward()
    assert nmgraph.verify(nmgraph.finalize(converted)).holds
    assert dict(converted.named_parameters())["layer.weight"].grad.any()
