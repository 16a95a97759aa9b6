"""Training with masks from compiled functions: the same to the bit as without."""

import warnings

import pytest
import torch
from torch import nn

import nmgraph
from nmgraph.compilation import SWITCH


def trained(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.Flatten(), nn.Linear(512, 32))
    nmgraph.convert(model, method=method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=8)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 16, 4, 4)).square().mean().backward()
        optimizer.step()
    return {**model.state_dict(), **{str(i): s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}}


@pytest.mark.parametrize("method", ["srste", "bimask"])
def test_weights_state_and_momentum_are_the_same_compiled_or_not(method, monkeypatch):
    monkeypatch.setenv(SWITCH, "never")
    plain = trained(method)
    monkeypatch.setenv(SWITCH, "always")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="masks are made without compiled code")
        compiled = trained(method)
    assert plain.keys() == compiled.keys()
    assert [name for name in plain if not torch.equal(plain[name], compiled[name])] == []
