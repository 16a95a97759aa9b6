"""Suggestions: what patterns cost, and what can be reached."""

import re

import pytest
import torch
from models import TiedLanguageModel, cnn, mlp
from torch import nn

import nmgraph
from nmgraph.accounting.budget import DENSE, Budget, suggest
from nmgraph.errors import ConversionError
from nmgraph.passes.sensitivity import Sensitivity, SiteHarm


def sensitivity(*changes, macs=1000, weights=1024):
    """Make sites of one size, named a, b, c, with these changes."""
    shape = (16, weights // 16)
    sites = tuple(
        SiteHarm(name, "Linear", shape, 1, 4 * weights, macs, False, c) for name, c in zip("abc", changes, strict=False)
    )
    return Sensitivity("cross entropy", 1.0, "given", macs * len(sites), 4 * weights * len(sites), sites)


def test_the_least_harmful_patterns_within_the_budget_are_suggested():
    found = suggest(sensitivity({"2:4": 1.0, "1:4": 5.0}, {"2:4": 0.1, "1:4": 0.2}), Budget("flops", 0.625))
    assert found.patterns == {"a": DENSE, "b": "1:4"}
    assert (found.reached, found.harm, found.bound) == (0.625, 0.2, 0.2)


def test_a_change_for_the_better_counts_as_none():
    found = suggest(sensitivity({"2:4": -3.0}, {"2:4": 0.5}), Budget("flops", 0.5))
    assert found.harm == 0.5


def test_where_nothing_got_worse_all_are_pruned_alike_and_no_more_than_asked():
    better = {"2:4": -0.1, "1:4": -0.2, "1:8": 0.0}
    assert suggest(sensitivity(better, better, better), Budget("flops", 0.5)).patterns == dict.fromkeys("abc", "2:4")
    assert suggest(sensitivity(better, better), Budget("size", 0.29)).patterns == dict.fromkeys("ab", "1:4")


def test_what_is_never_called_is_left_dense_for_operations_and_pruned_for_bytes():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model.add_module("unused", nn.Linear(64, 64, bias=False))
    model.forward = lambda x: model[1](model[0](x))
    found = nmgraph.sensitivity(model, torch.randn(2, 16), patterns=["1:4"])
    assert suggest(found, Budget("flops", 0.7)).patterns["unused"] == DENSE
    assert suggest(found, Budget("size", 0.5)).patterns["unused"] == "1:4"


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "1:16", "3:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_an_exported_file(pattern, dtype, tmp_path):
    model, x = nn.Sequential(nn.Linear(48, 6, bias=False)).to(dtype), torch.randn(2, 48, dtype=dtype)
    found = suggest(nmgraph.sensitivity(model, x, patterns=[pattern]), Budget("size", 0.9))
    nmgraph.convert(model, **found.recipe(method="srste").arguments())
    report = nmgraph.export(
        model, tmp_path / "out", onnx=False, safetensors=True, precision="bf16" if dtype == torch.bfloat16 else "fp32"
    )
    assert found.patterns == {"0": pattern}
    assert found.reached == pytest.approx(report.sizes.ratio)


def test_what_can_not_be_reached_says_what_can():
    found = nmgraph.sensitivity(cnn(), torch.randn(2, 3, 8, 8), patterns=["2:4"])
    with pytest.raises(ConversionError) as raised:
        suggest(found, Budget("flops", 0.3))
    least = re.fullmatch(
        r"flops=0\.3 can't be kept: with the sparsest of the patterns tried everywhere, \d\d\.\d% of the operations with weights "
        r"are left\. Allow at least (flops=0\.\d+), or try sparser patterns\.",
        str(raised.value),
    )[1]
    assert set(suggest(found, Budget.parse(least)).patterns.values()) == {"2:4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops", "'flops' is no budget. Write flops=SHARE or size=SHARE, for example flops=0.5."),
        ("flops=half", "'flops=half' is no budget. Write flops=SHARE or size=SHARE, for example flops=0.5."),
        ("macs=0.5", "there is no budget of 'macs'. Use flops or size, for example flops=0.5."),
        ("size=1", "a budget of 1.0 is no share of the dense model. Use for example size=0.5."),
        ("size=nan", "a budget of nan is no share of the dense model. Use for example size=0.5."),
        ("flops=50", "a budget of 50.0 is no share of the dense model. Use for example flops=0.5."),
    ],
)
def test_what_is_no_budget_is_refused(text, message):
    with pytest.raises(ConversionError, match=f"^{re.escape(message)}$"):
        Budget.parse(text)


def test_sites_of_any_name_convert_to_what_was_suggested():
    model = nn.Sequential(nn.ModuleDict({"a*": nn.Linear(16, 16), "ab": nn.Linear(16, 16), "[ab]?": nn.Linear(16, 16)}))
    model.forward = lambda x: model[0]["[ab]?"](model[0]["ab"](model[0]["a*"](x)))
    found = suggest(
        Sensitivity(
            "cross entropy", 1.0, "given", 3 * 256, 3 * 1024,
            tuple(
                SiteHarm(f"0.{name}", "Linear", (16, 16), 1, 1024, 256, False, {"1:4": harm, "1:8": 9.0})
                for name, harm in {"a*": 0.1, "ab": 5.0, "[ab]?": 0.2}.items()
            ),
        ),
        Budget("flops", 0.5),
    )  # fmt: skip
    assert found.patterns == {"0.a*": "1:4", "0.ab": DENSE, "0.[ab]?": "1:4"}
    nmgraph.convert(model, **found.recipe().arguments())
    assert {e.name: e.pattern for e in nmgraph.manifest(model).converted} == {"0.a*": "1:4", "0.[ab]?": "1:4"}


def test_a_root_that_is_a_layer_and_a_shared_weight_convert_as_suggested():
    found = suggest(nmgraph.sensitivity(root := nn.Linear(16, 4), torch.randn(2, 16)), Budget("flops", 0.3))
    nmgraph.convert(root, **found.recipe().arguments())
    assert {e.name: e.pattern for e in nmgraph.manifest(root).converted} == found.patterns == {"": "1:4"}

    tied, tokens = TiedLanguageModel(), torch.randint(0, 24, (2, 6))
    measured = nmgraph.sensitivity(tied, tokens, patterns=["2:4", "1:4"], include=["head"])
    found = suggest(measured, Budget("flops", 0.3))
    assert found.included == ("head",)
    nmgraph.convert(tied, example_inputs=tokens, **found.recipe().arguments())
    assert {e.name: e.pattern for e in nmgraph.manifest(tied).converted} == found.patterns


def test_a_suggestion_is_shown_with_what_it_reaches():
    found = suggest(nmgraph.sensitivity(mlp(), torch.randn(2, 16)), Budget("flops", 0.5))
    assert str(found).startswith("suggested for flops=0.5: ")
    assert found.to_dict()["patterns"] == found.patterns
