"""Where training stands, as `nmgraph status` shows it."""

import re

import pytest
import torch
from torch import nn
from variants import VARIANTS

import nmgraph
from nmgraph.training.standing import standing_of

STEPS = 30


@pytest.mark.parametrize("variant", VARIANTS)
def test_phase_says_when_the_masks_will_be_at_their_pattern(variant):
    method, options = VARIANTS[variant]
    torch.manual_seed(0)
    model = nmgraph.convert(nn.Linear(32, 32), method=method, pattern="1:4", **options)
    assert standing_of(model).layers[0].phase == "training has not begun"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    before = standing_of(model).layers[0]
    for step in range(STEPS):
        found = standing_of(model).layers[0]
        assert found.step == step
        assert (found.phase == "at its pattern") == (not found.unfinished)
        if found.unfinished:
            promised = int(re.search(r"1:4 from step (\d+) on", found.phase)[1])
            assert step < promised <= STEPS
        elif step and before.unfinished:
            assert f"from step {step} on" in before.phase
        before = found
        optimizer.zero_grad()
        model(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
    found = standing_of(model)
    assert found.layers[0].phase == "training has ended"
    assert not found.unfinished


def test_looking_changes_nothing_and_shows_what_the_weights_are():
    model = nmgraph.convert(nn.Linear(16, 8), method="asp")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    layer = standing_of(model).layers[0]
    assert layer.kept == 0.5
    assert 0.5 < layer.magnitude < 1
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_layer_of_zeros_has_no_share_of_its_magnitude():
    layer = nn.Linear(16, 8)
    nn.init.zeros_(layer.weight)
    assert standing_of(nmgraph.convert(layer, method="srste")).layers[0].magnitude is None
