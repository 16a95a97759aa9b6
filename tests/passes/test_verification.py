"""Checking weights against a pattern, and NVIDIA's rule for sparse tactics."""

import io

import pytest
import torch
from models import cnn, mlp
from rich.console import Console
from torch import nn

import nmgraph
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.verification import check_weight, verify_tensors

TWO_OF_FOUR = torch.tensor([1.0, 0.0, 2.0, 0.0])


def linear(*rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight = nn.Parameter(torch.tensor(rows))
    return layer


def test_weight_that_holds():
    check = check_weight("fc", "Linear", TWO_OF_FOUR.repeat(3, 2), Pattern(2, 4), expected=True)
    assert (check.holds, check.density, check.finding, check.tensorrt) == (True, 0.5, "", "")
    assert check.shape == (3, 8)


def test_worst_block_is_named():
    weight = TWO_OF_FOUR.repeat(3, 2)
    weight[0, 1] = 1.0
    weight[2, 4:] = 1.0
    check = check_weight("fc", "Linear", weight, Pattern(2, 4), expected=True)
    assert not check.holds
    assert check.finding == "block 1 of output 2, position 0 keeps 4 of 4"
    assert check.tensorrt == "more than 2 of 4 are non-zero"


def test_blocks_of_a_convolution_run_along_its_input_channels():
    weight = TWO_OF_FOUR.reshape(1, 4, 1, 1).repeat(2, 1, 3, 3)
    assert check_weight("conv", "Conv2d", weight, Pattern(2, 4), expected=True).holds
    weight[1, 1, 2, 0] = 1.0
    finding = check_weight("conv", "Conv2d", weight, Pattern(2, 4), expected=True).finding
    assert finding == "block 0 of output 1, position 6 keeps 3 of 4"


def test_axis_is_the_one_that_is_asked_for():
    weight = TWO_OF_FOUR.repeat(3, 2).T
    assert check_weight("w", "MatMul", weight, Pattern(2, 4), expected=True, axis=0).holds
    assert not check_weight("w", "MatMul", weight.repeat(1, 4), Pattern(2, 4), expected=True, axis=1).holds


def test_channels_that_no_block_divides_do_not_hold():
    check = check_weight("fc", "Linear", torch.zeros(2, 6), Pattern(2, 4), expected=True)
    assert not check.holds
    assert check.finding == check.tensorrt == "6 input channels are not a multiple of 4"


@pytest.mark.parametrize(("pattern", "ready"), [("1:4", True), ("2:8", True), ("1:16", True), ("4:8", False)])
def test_sparse_tactics_need_two_of_every_aligned_four(pattern, ready):
    model = nn.Sequential(linear([1.0, 2.0, 3.0, 4.0] + [0.0] * 12, [1.0] + [0.0] * 15))
    model = nmgraph.finalize(nmgraph.convert(model, method="srste", pattern=pattern))
    (check,) = nmgraph.verify(model).checks
    assert check.holds
    assert check.tensorrt == ("" if ready else "more than 2 of 4 are non-zero")


def test_grouped_convolution_is_no_candidate_for_sparse_tactics():
    check = check_weight("conv", "Conv2d", torch.zeros(8, 4, 3, 3), Pattern(2, 4), expected=False, groups=2)
    assert check.tensorrt == "grouped convolution"


def test_dense_model_does_not_hold():
    found = nmgraph.verify(mlp())
    assert not found.holds
    assert [c.name for c in found.failures] == ["0", "2"]
    assert str(found) == "0 of 2 weights hold; 0 ready for 2:4 sparse tactics"


def test_weight_is_ready_only_if_it_holds():
    model = nn.Sequential(linear([1.0, 2.0] + [0.0] * 14))
    found = nmgraph.verify(model, "1:16")
    assert found.checks[0].tensorrt == ""
    assert str(found) == "0 of 1 weights hold; 0 ready for 2:4 sparse tactics"
    assert found.checks[0].little_gain == ""


def test_converted_model_is_checked_as_it_multiplies():
    assert nmgraph.verify(nmgraph.convert(mlp(), method="srste")).holds
    assert not nmgraph.verify(nmgraph.convert(mlp(), method="lbc")).holds


def test_layers_left_dense_on_purpose_are_listed_but_need_not_hold():
    found = nmgraph.verify(nmgraph.finalize(nmgraph.convert(cnn(), method="srste", skip=["7"])))
    assert [(c.name, c.expected, c.holds) for c in found.checks] == [
        ("0", False, False),
        ("3", True, True),
        ("7", False, False),
    ]
    assert found.holds


def test_pattern_that_is_given_counts_for_every_layer():
    model = nmgraph.finalize(nmgraph.convert(mlp(), method="srste", layers={"0": "1:4"}))
    assert nmgraph.verify(model).holds
    assert [c.name for c in nmgraph.verify(model, "1:4").failures] == ["2"]
    assert nmgraph.verify(model, Pattern(4, 8)).holds


def test_weight_changed_after_finalizing_is_found():
    model = nmgraph.finalize(nmgraph.convert(mlp(), method="srste"))
    with torch.no_grad():
        model[2].weight[5, 8:12] = 1.0
    (failure,) = nmgraph.verify(model).failures
    assert (failure.name, failure.finding) == ("2", "block 2 of output 5, position 0 keeps 4 of 4")


def test_model_without_layers_does_not_hold():
    found = nmgraph.verify(nn.ReLU())
    assert not found.holds
    assert str(found) == "0 of 0 weights hold; 0 ready for 2:4 sparse tactics; no Linear or convolution found"


def test_state_dict_is_checked_by_names_and_shapes():
    tensors = {"fc.weight": TWO_OF_FOUR.repeat(3, 2), "fc.bias": torch.ones(3), "norm.weight": torch.ones(8)}
    found = verify_tensors("weights", tensors | {"stem.weight": torch.ones(8, 3, 2, 2)})
    assert [(c.name, c.expected) for c in found.checks] == [("fc.weight", True), ("stem.weight", False)]
    assert found.holds
    assert str(verify_tensors("empty", {})) == (
        "0 of 0 weights hold; 0 ready for 2:4 sparse tactics; no weight with two or more axes found"
    )


def test_state_dict_of_a_converted_model_is_told_from_that_of_a_finalized_one():
    model = nmgraph.convert(mlp(), method="asp")
    assert str(verify_tensors("weights", model.state_dict())) == (
        "0 of 2 weights hold; 0 ready for 2:4 sparse tactics; "
        "it is the state_dict of a converted model, whose weights are dense until it is finalized"
    )
    assert verify_tensors("weights", nmgraph.finalize(model).state_dict()).holds


def test_plain_values_say_everything():
    values = nmgraph.verify(mlp()).to_dict()
    assert values["holds"] is False
    assert values["subject"] == "Sequential"
    assert [c["name"] for c in values["checks"]] == ["0", "2"]


def test_table_shows_every_weight_with_its_verdict():
    model = nmgraph.finalize(nmgraph.convert(cnn(), method="srste", skip=["7"]))
    console = Console(width=160, file=io.StringIO())
    console.print(nmgraph.verify(model), nmgraph.verify(mlp()))
    text = console.file.getvalue()
    for line in (
        "Sequential: 1 of 1 weights hold; 1 ready for 2:4 sparse tactics",
        "left dense, 100% kept",
        "2:4 holds, 50% kept",
        "2:4 fails: block 0 of output 0, position 0 keeps 4 of 4",
    ):
        assert line in text


def test_a_ready_weight_of_few_channels_is_said_to_gain_little():
    net = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 64), torch.nn.Linear(64, 3))
    found = nmgraph.verify(nmgraph.finalize(nmgraph.convert(net, method="static", skip=["2"])))
    assert [(c.tensorrt, c.little_gain) for c in found.checks] == [
        ("", ""),
        ("", "64 channels: little gain"),
        ("more than 2 of 4 are non-zero", ""),
    ]
    assert [c["little_gain"] for c in found.to_dict()["checks"]] == [c.little_gain for c in found.checks]


def test_what_may_be_a_weight_and_was_not_checked_is_named(tmp_path):
    model = nmgraph.convert(nn.Sequential(nn.MultiheadAttention(16, 2), nn.Embedding(8, 16)), method="asp")
    finished = nmgraph.finalize(model)
    with torch.no_grad():
        finished[0].in_proj_weight += 1  # its zeros are gone
    torch.save(finished.state_dict(), tmp_path / "state.pt")
    said = "not checked, as nothing says what they are: 0.in_proj_weight"
    assert str(nmgraph.verify(tmp_path / "state.pt")).endswith(said)
    assert nmgraph.verify(finished).unchecked == ()
    bare = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Embedding(8, 16))
    bare.load_state_dict(finished.state_dict())
    assert str(nmgraph.verify(bare)).endswith(said)
