"""The manifest names every linear- or convolution-like weight exactly once."""

import io
from collections import Counter

import pytest
import timm
import torch
import torchvision
from models import Encoder, Recorder, cnn, convnext, deit, mlp, resnet, swin
from rich.console import Console
from torch import nn
from torch.nn.modules.conv import _ConvNd

import nmgraph
from nmgraph.errors import ConversionError
from nmgraph.passes.manifest import Entry, Manifest, find_manifest


def weights_of_layers(model):
    """All weights that a product is taken with, found without nmgraph: by the type of their module."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            yield name
        elif isinstance(module, nn.MultiheadAttention):
            yield f"{name}.in_proj_weight"


def vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=8
    )


@pytest.mark.parametrize(
    "make",
    [
        torchvision.models.resnet18,
        lambda: timm.create_model("deit_tiny_patch16_224"),
        vit,
        Encoder,
        convnext,
        deit,
        swin,
        lambda: timm.create_model("mobilenetv3_small_050"),
    ],
    ids=[
        "resnet18",
        "timm deit_tiny",
        "torchvision ViT",
        "TransformerEncoder",
        "ConvNeXt",
        "DeiT",
        "Swin",
        "MobileNetV3",
    ],
)
def test_every_weight_of_a_product_is_listed_exactly_once(make):
    model = make()
    expected = Counter(weights_of_layers(model))
    found = nmgraph.manifest(nmgraph.convert(model, method="srste"))
    assert Counter(e.name for e in found.entries) == expected
    assert all(e.reason for e in found.skipped)
    assert not any(e.reason for e in found.converted)


def test_resnet18_is_converted_but_for_its_first_layer():
    found = nmgraph.manifest(nmgraph.convert(torchvision.models.resnet18()))
    assert str(found) == "20 sites converted, 1 skipped, 99.9% of their weights"
    assert [(e.name, e.reason) for e in found.skipped] == [("conv1", "3 input channels are not a multiple of 4")]


def test_json_gives_the_manifest_back():
    found = nmgraph.manifest(nmgraph.convert(cnn(), example_inputs=torch.randn(1, 3, 8, 8), skip=["7"]))
    again = Manifest.from_json(found.to_json())
    assert again == found
    assert again.inputs == (((1, 3, 8, 8), "float32", ""),)


def test_entry_says_how_often_its_layer_is_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(self.layer(x))

    entries = nmgraph.manifest(nmgraph.convert(Twice(), example_inputs=torch.randn(2, 16))).entries
    assert [(e.name, e.calls or 0) for e in entries] == [("layer", 2), ("unused", 0)]


def test_calls_are_counted_by_a_run_where_no_graph_can_be_traced():
    class Looping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            for _ in range(int(x[0, 0])):
                x = self.layer(x)
            return x

    traced = nmgraph.manifest(nmgraph.convert(Looping()))
    ran = nmgraph.manifest(nmgraph.convert(Looping(), example_inputs=torch.full((1, 16), 3.0)))
    assert [e.calls for e in (*traced.entries, *ran.entries)] == [None, 3]


def test_coverage_counts_weights():
    entries = (
        Entry("a", "Linear", (8, 16), "2:4", True),
        Entry("b", "Conv2d", (8, 3, 4, 4), "2:4", False, reason="left dense on request"),
    )
    found = Manifest("lbc", entries)
    assert (found.converted, found.skipped) == (entries[:1], entries[1:])
    assert found.coverage == 128 / (128 + 384)
    assert Manifest("lbc", ()).coverage == 0.0


def test_table_shows_every_site_with_its_reason():
    console = Console(width=200, file=io.StringIO())
    console.print(nmgraph.manifest(nmgraph.convert(cnn(), method="srste")))
    text = console.file.getvalue()
    assert "srste: 2 sites converted, 1 skipped, 84.9% of their weights" in text
    assert "skipped: 3 input channels are not a multiple of 4; no usual pattern fits" in text
    assert text.count("converted") == 3


def test_model_that_was_never_converted_has_no_manifest():
    assert find_manifest(mlp()) is None
    with pytest.raises(ConversionError) as caught:
        nmgraph.manifest(mlp())
    assert str(caught.value) == (
        "Sequential is not a converted model. Make it one with nmgraph.convert(model, method=...)."
    )


@pytest.mark.parametrize(
    "wrap", [lambda m: nn.Sequential(m), torch.compile, nn.DataParallel], ids=["module", "compile", "DataParallel"]
)
def test_model_inside_a_wrapper_keeps_its_manifest_and_is_verified_by_it(wrap):
    wrapper = wrap(nmgraph.convert(resnet(), method="srste"))
    assert len(nmgraph.manifest(wrapper).converted) == 13
    found = nmgraph.verify(nmgraph.finalize(wrapper))
    assert sum(c.expected for c in found.checks) == 13
    assert found.holds


def test_manifest_stays_after_finalizing_and_adds_nothing_to_the_state():
    model = Recorder()
    keys = list(model.state_dict())
    finished = nmgraph.finalize(nmgraph.convert(model, method="srste"))
    assert [e.name for e in nmgraph.manifest(finished).converted] == ["layer"]
    assert list(finished.state_dict()) == keys


def test_sites_of_a_part_that_was_sparse_before_are_listed_once():
    backbone = nmgraph.finalize(nmgraph.convert(mlp(), method="srste"))
    model = nmgraph.convert(nn.Sequential(backbone, nn.Linear(8, 8)))
    assert [e.name for e in nmgraph.manifest(model).entries] == ["0.0", "0.2", "1"]
