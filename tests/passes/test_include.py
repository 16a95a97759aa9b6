"""What stays dense unless it is asked for: grouped, frozen and shared weights; and what never is."""

import copy

import pytest
import torch
from handles import nm
from models import TiedLanguageModel
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError


def entry(model, site):
    return next(e for e in nmgraph.manifest(model).entries if e.name == site)


def train(model, x, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def grouped():
    return nn.Sequential(nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 8, 1))


def test_grouped_convolution_on_request_keeps_its_blocks_inside_the_groups():
    model = nmgraph.convert(grouped(), method="srste", include=["0"])
    finished = nmgraph.finalize(train(model, torch.randn(2, 16, 6, 6)))
    assert (finished[0].weight.movedim(1, -1).reshape(16, 9, 2, 4).ne(0).sum(-1) == 2).all()
    found = nmgraph.verify(finished)
    assert found.holds
    assert found.checks[0].tensorrt == "grouped convolution"


def test_transposed_grouped_convolution_keeps_its_blocks_inside_the_groups():
    model = nn.Sequential(nn.ConvTranspose2d(12, 8, 2, groups=2), nn.Conv2d(8, 8, 1))
    nmgraph.convert(model, method="srste", include=["0"])
    assert entry(model, "0").reason == "6 input channels are not a multiple of 4"  # those of a group
    model = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, groups=2), nn.Conv2d(8, 8, 1))
    nmgraph.convert(model, method="srste", include=["0"])
    assert (model[0].weight.movedim(0, -1).reshape(4, 2, 2, 4, 4).ne(0).sum(-1) == 2).all()


def test_depthwise_convolution_stays_dense_whatever_is_asked():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1))
    nmgraph.convert(model, method="srste", include=["0"])
    assert not entry(model, "0").converted


def test_frozen_layer_on_request_gets_a_fixed_mask_by_magnitude():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    model[0].requires_grad_(False)
    dense = model[0].weight.detach().clone()
    nmgraph.convert(model, method="lbc", include=["0"])
    assert entry(model, "0").how == "in place; frozen, so its mask by magnitude is fixed"
    mask = nm(model[0]).mask()
    train(model, torch.randn(4, 16))
    assert torch.equal(nm(model[0]).mask(), mask)
    assert torch.equal(model[0].weight, dense * mask)
    assert not nm(model[0]).raw.requires_grad
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_head_tied_to_an_embedding_on_request_is_masked_in_both():
    model = nmgraph.convert(TiedLanguageModel(), method="srste", include=["head"])
    tokens = torch.randint(0, 24, (4, 5))
    assert model.head._parameters["weight"] is model.embedding._parameters["weight"]
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert (model.embedding.weight.reshape(24, 4, 4).ne(0).sum(-1) == 2).all()
    train(model, tokens)
    for twin in (model, copy.deepcopy(model)):
        finished = nmgraph.finalize(twin)
        assert type(finished.embedding) is nn.Embedding
        assert finished.head.weight is finished.embedding.weight
        assert torch.equal(finished(tokens), twin(tokens))
        assert nmgraph.verify(finished).holds


def test_tied_head_survives_a_file(tmp_path):
    model = nmgraph.convert(TiedLanguageModel(), method="srste", include=["head"])
    nmgraph.save(model, tmp_path / "a.nm.pt")
    loaded, tokens = nmgraph.load(tmp_path / "a.nm.pt", trust=["models"]), torch.randint(0, 24, (4, 5))
    assert torch.equal(loaded(tokens), model(tokens))
    assert torch.equal(loaded.embedding.weight, loaded.head.weight)


def test_two_layers_that_share_a_weight_are_one_site_on_request():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    nmgraph.convert(model, method="srste", include=["*"])
    assert entry(model, "0").converted
    assert entry(model, "2").reason == "its weight is that of 0, and masked there"
    assert torch.equal(model[0].weight, model[2].weight)
    x = torch.randn(4, 16)
    finished = nmgraph.finalize(train(model, x))
    assert torch.equal(finished(x), model(x))
    assert finished[0].weight is finished[2].weight


def test_layer_asked_for_by_its_full_name_needs_no_include():
    model = nmgraph.convert(grouped(), method="srste", layers={"0": "1:4"})
    assert (entry(model, "0").converted, entry(model, "0").pattern) == (True, "1:4")


def test_glob_that_matches_nothing_is_an_error():
    with pytest.raises(ConversionError, match="no layer is named 'heads'"):
        nmgraph.convert(TiedLanguageModel(), include=["heads"])


class Adapted(nn.Module):
    """As PEFT wraps a layer; a stand-in for its class, which is not installed."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(16, 16).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 8, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(8, 16, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_and_what_they_adapt_stay_dense():
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 16), Adapted()), method="srste")
    refused = {e.name: (e.reason, e.remedy) for e in nmgraph.manifest(model).skipped}
    assert refused == dict.fromkeys(
        ["1.base_layer", "1.lora_A.default", "1.lora_B.default"],
        (
            "it is part of 1, a layer with an adapter, and merging that would fill its zeros",
            "merge the adapters first (merge_and_unload)",
        ),
    )
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 16), Adapted()), method="srste", include=["*"])
    assert [e.name for e in nmgraph.manifest(model).converted] == ["0", "1.base_layer"]


def test_in_a_graph_a_bare_parameter_is_refused_and_an_attention_converted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.matrix, self.head = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 8)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0] @ self.matrix)

    graph = nmgraph.convert(Net(), method="srste", mode="graph")
    assert {e.name: e.reason for e in nmgraph.manifest(graph).skipped} == {
        "matrix": "the graph multiplies by this parameter itself"
    }
    assert entry(graph, "attention.in_proj_weight").converted
    x = torch.randn(2, 5, 16)
    assert torch.equal(nmgraph.finalize(copy.deepcopy(graph)).eval()(x), graph.eval()(x))
