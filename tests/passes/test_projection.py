"""Pruning finished weights further, onto a pattern that hardware takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nmgraph
from nmgraph.nm.masks import check_blocks
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.projection import project

TWO_OF_FOUR = Pattern(2, 4)


def finished(model, **options):
    model = nmgraph.finalize(nmgraph.convert(model, method="srste", **options))
    return model, nmgraph.manifest(model)


def test_largest_magnitudes_of_every_four_stay():
    model, manifest = finished(nn.Sequential(nn.Linear(8, 1)), pattern="4:8")
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0, 2.0, -3.0, 0.0, 0.0, 0.0, 0.0]]))
    (cost,), renewed = project(model, manifest, TWO_OF_FOUR)
    assert model[0].weight.tolist() == [[0.0, -4.0, 0.0, -3.0, 0.0, 0.0, 0.0, 0.0]]
    assert (cost.name, cost.before, cost.after, cost.kept_weights, cost.kept_magnitude) == ("0", "4:8", "2:4", 0.5, 0.7)
    assert (renewed.patterns["0"], renewed.entries[0].how) == (TWO_OF_FOUR, "projected from 4:8")


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "1:16", "1:2"])
def test_weights_that_fit_already_are_left_alone(pattern):
    model, manifest = finished(nn.Sequential(nn.Linear(16, 8)), pattern=pattern)
    before = model[0].weight.clone()
    assert project(model, manifest, TWO_OF_FOUR) == ((), manifest)
    assert torch.equal(model[0].weight, before)


def test_dense_layers_stay_dense():
    model, manifest = finished(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), pattern="4:8", skip=["1"])
    before = model[1].weight.clone()
    costs, renewed = project(model, manifest, TWO_OF_FOUR)
    assert [c.name for c in costs] == ["0"]
    assert torch.equal(model[1].weight, before)
    assert renewed.skipped == manifest.skipped


def test_flat_blocks_are_projected_along_the_channels():
    model, manifest = finished(nn.Sequential(nn.Conv2d(8, 8, 3)), block_axis="flat")
    assert nmgraph.verify(model).checks[0].tensorrt == "more than 2 of 4 are non-zero"
    (cost,), renewed = project(model, manifest, TWO_OF_FOUR)
    assert (cost.before, cost.after, renewed.axes["0"]) == ("2:4", "2:4", 1)
    assert nmgraph.verify(model).checks[0].tensorrt == ""


def test_layers_whose_channels_do_not_divide_are_left_alone():
    model, manifest = finished(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), pattern="4:8", layers={"0": "1:2"})
    before = model[0].weight.clone()
    assert [c.name for c in project(model, manifest, TWO_OF_FOUR)[0]] == ["1"]
    assert torch.equal(model[0].weight, before)


@given(st.integers(1, 12), st.integers(2, 13), st.integers(1, 7), st.integers(2, 8), st.integers(0, 2**31))
def test_a_pattern_implies_another_exactly_if_no_weight_of_it_breaks_the_other(n, m, other_n, other_m, seed):
    n, other_n = min(n, m - 1), min(other_n, other_m - 1)
    pattern, other = Pattern(n, m), Pattern(other_n, other_m)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(1, 64, m * other_m, generator=generator)
    mask = torch.zeros_like(rows)
    for block in range(0, m * other_m, m):
        kept = rows[..., block : block + m].argsort(-1)[..., :n] + block
        mask.scatter_(-1, kept, 1.0)
    if pattern.implies(other):
        assert check_blocks(mask, other).holds
    else:
        assert not check_blocks(_worst(pattern, other), other).holds


def _worst(pattern, other):
    """For each block of the other in turn, a row that keeps as much in it as the pattern allows."""
    length = pattern.m * other.m
    rows = torch.zeros(length // other.m, 1, length)
    for row, start in enumerate(range(0, length, other.m)):
        for block in range(0, length, pattern.m):
            inside = [i for i in range(block, block + pattern.m) if start <= i < start + other.m]
            rows[row, 0, inside[: pattern.n]] = 1.0
    return rows
