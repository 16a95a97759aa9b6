"""The layers at a model's ends, found in the graph, and left dense when asked."""

import pytest
import timm
import torch
import torchvision
from models import cnn, deit, mlp
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError, PatternError
from nmgraph.passes.trace import uses


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.body = nn.Linear(16, 16)
        self.boxes, self.classes = nn.Linear(16, 4), nn.Linear(16, 8)

    def forward(self, x, y):
        z = self.body(torch.relu(self.left(x) + self.right(y)))
        return self.boxes(z), self.classes(z).softmax(-1)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(self.embedding(x)).relu())


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.body(x) if x.sum() > 0 else x)


ENDS = {
    "resnet18": (torchvision.models.resnet18, ("conv1",), ("fc",)),
    "densenet121": (torchvision.models.densenet121, ("features.conv0",), ("classifier",)),
    "swin_t": (torchvision.models.swin_t, ("features.0.0",), ("head",)),
    "deit": (deit, ("patch_embed.proj",), ("head",)),
    "deit with two heads": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224"),
        ("patch_embed.proj",),
        ("head", "head_dist"),
    ),
    "mlp": (mlp, ("0",), ("2",)),
    "two inputs, two outputs": (TwoHeads, ("left", "right"), ("boxes", "classes")),
    "words": (Words, (), ("head",)),
    "untraceable": (Untraceable, ("first",), ("last",)),
}


@pytest.mark.parametrize(("make", "stem", "head"), ENDS.values(), ids=ENDS)
def test_both_ends_are_found(make, stem, head):
    found = uses(make())
    assert (found.stem, found.head) == (stem, head)


def reasons(model, **options):
    return {e.name: e.reason for e in nmgraph.manifest(nmgraph.convert(model, **options)).skipped}


def test_what_is_asked_for_stays_dense_and_the_manifest_says_as_what():
    assert reasons(deit(), keep_dense=["stem", "head"], pattern="2:4", method="static") == {
        "patch_embed.proj": "left dense as the model's stem",
        "head": "left dense as the model's head",
    }
    assert reasons(deit(), keep_dense=["head"]) == {
        "patch_embed.proj": "3 input channels are not a multiple of 4",
        "head": "left dense as the model's head",
    }


def test_by_default_only_what_does_not_divide_stays_dense():
    assert list(reasons(cnn())) == ["0"]


def test_a_layer_named_in_full_is_converted_all_the_same():
    assert "head" not in reasons(deit(), keep_dense=["head"], layers={"head": "1:4"})


def test_a_layer_that_is_both_ends_leaves_nothing_to_convert():
    with pytest.raises(ConversionError, match=r"0: left dense as the model's head"):
        nmgraph.convert(nn.Sequential(nn.Linear(16, 4)), keep_dense=["head"])


def test_another_end_is_refused_before_anything_changes():
    model = mlp()
    with pytest.raises(ConversionError, match=r"^keep_dense knows stem and head, not 'tail'\."):
        nmgraph.convert(model, keep_dense=["tail"])
    assert type(model[0]) is nn.Linear


def test_misfits_are_still_listed_where_an_end_is_left_dense():
    with pytest.raises(PatternError, match=r"divides no layer of Sequential"):
        nmgraph.convert(mlp(), pattern="3:5", keep_dense=["head"])
