"""A fast sample of the zoo (benchmarks/zoo.py), and the watcher that its checks rest on, on models made for it."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from zoo_checks import METHOD, check_manifest, measure
from zoo_models import LIBRARIES
from zoo_page import failures
from zoo_products import watch

SAMPLE = [
    "torchvision/mobilenet_v3_small", "torchvision/resnet18", "torchvision/shufflenet_v2_x0_5", "torchvision/vit_l_16",
    "timm/convnext/test_convnext", "timm/efficientnet/test_efficientnet", "timm/maxxvit/test_coatnet",
    "timm/nfnet/test_nfnet", "timm/vision_transformer/test_vit", "transformers/bert", "transformers/llama",
    "transformers/gpt2", "transformers/mixtral", "transformers/swin", "transformers/t5", "transformers/whisper",
]  # fmt: skip


@pytest.fixture(scope="module")
def zoo():
    return {entry.name: entry for make in LIBRARIES.values() for entry in make()}


@pytest.mark.parametrize("name", SAMPLE)
def test_model_converts_and_behaves_as_it_did(zoo, name):
    result = measure(zoo[name], (METHOD,), beside=False)
    assert failures(result) == []
    assert result["converted"] > 0
    if not result["light"]:
        assert result["checks"]["training"]["changed"] > 0
        assert result["checks"]["faithful"]["bit_equal"]


def test_zoo_has_all_of_torchvision_and_every_timm_family(zoo):
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    floats = {f"torchvision/{n}" for n in torchvision.models.list_models() if not n.startswith("quantized_")}
    assert {name for name in zoo if name.startswith("torchvision/")} == floats
    assert {name.split("/")[1] for name in zoo if name.startswith("timm/")} == set(timm.list_modules())
    assert sum(name.startswith("transformers/") for name in zoo) == 30


class Everything(nn.Module):
    """Weights that get to a product in every way, and parameters that don't."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(8, 4)
        self.turned = nn.Parameter(torch.randn(4, 8))
        self.stack = nn.Parameter(torch.randn(3, 8, 8))
        self.standardised = nn.Conv1d(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.table = nn.Parameter(torch.randn(5, 4))
        self.learned = nn.Parameter(torch.randn(2, 8))
        self.scale = nn.Parameter(torch.ones(2, 8))
        self.register_buffer("places", torch.tensor([0, 2, 2, 4]))

    def forward(self, x):
        x = x * self.scale + self.plain(self.learned).mean()
        x = x @ self.turned.t()  # [2, 4]
        x = x + x @ self.table[self.places]
        x = x @ self.turned.to(torch.float64).to(torch.float32)
        for i in range(3):
            x = x @ self.stack[i]
        weight = self.standardised.weight
        weight = self.gain * (weight - weight.mean((1, 2), keepdim=True))
        return (
            F.conv1d(x.reshape(2, 4, 2), weight) if x.numel() < 16 else F.conv1d(x.reshape(1, 4, 4), weight, padding=1)
        )


def test_watcher_sees_how_each_weight_gets_to_its_product():
    model = Everything()
    uses = watch(model, lambda: model(torch.randn(2, 8))).uses
    assert {name: use.how for name, use in uses.items()} == {
        "plain.weight": "as it is",
        "turned": "moved",
        "stack": "as it is",
        "standardised.weight": "computed",
        "table": "gathered",
    }
    assert (uses["plain.weight"].axis, uses["stack"].axis, uses["stack"].length) == (1, 1, 8)


def test_watcher_counts_operations_and_groups():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Flatten(), nn.Linear(384, 5)
    )
    uses = watch(model, lambda: model(torch.randn(1, 4, 6, 6))).uses
    assert [use.flops for use in uses.values()] == [2 * 8 * 16 * 2 * 9, 2 * 8 * 16 * 6 * 4, 2 * 384 * 5]
    assert [use.groups for use in uses.values()] == [2, 1, 1]
    assert [use.axis for use in uses.values()] == [1, 0, 1]


def test_watcher_follows_packed_attention():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    uses = watch(model, lambda: model(x, x, x)).uses
    assert set(uses) == {"in_proj_weight", "out_proj.weight"}


class Said:
    """A manifest that says what it is told to."""

    def __init__(self, *entries):
        self.entries = [
            type("Entry", (), dict(zip(("name", "shape", "axis", "converted"), e, strict=True))) for e in entries
        ]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([("0", (4, 8), 1, True)], ""),
        ([], "0.weight [4, 8] reaches addmm (as it is), and is not in the manifest"),
        ([("0", (4, 8), 1, True)] * 2, "0.weight is in the manifest 2 times"),
        ([("0", (4, 8), 0, True)], "0.weight is summed over its axis 1, and converted along 0"),
        ([("0", (8, 4), 1, True)], "0.weight is (4, 8), its entry says (8, 4)"),
    ],
)
def test_manifest_that_is_wrong_is_found_out(entries, problem):
    from zoo_checks import Findings

    model, found = nn.Sequential(nn.Linear(8, 4)), Findings()
    uses = watch(model, lambda: model(torch.randn(2, 8))).uses
    check_manifest(found, Said(*entries), model, uses, set())
    problems = found.checks["manifest"].get("problems", [])
    assert (problem in problems) if problem else not problems
