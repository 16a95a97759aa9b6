"""Accelerate prepares, accumulates, saves and loads; nothing of a method gets lost on the way."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from variants import IN_SHORT

import nmgraph
from nmgraph.methods import METHODS

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_accelerate.py"


@pytest.fixture(autouse=True)
def _one_accelerator_for_each_test():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(method):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8))
    nmgraph.convert(net, method=method, **IN_SHORT.get(method, {}))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(net, optimizer)
    return accelerator, model, optimizer, nmgraph.attach(model, optimizer, total_steps=8)


def train(accelerator, model, optimizer, batches):
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_training_resumes_from_the_saved_state(method, tmp_path):
    x = torch.randn(128, 8, 4, 4)
    batches = list(DataLoader(TensorDataset(x, x.flatten(1).argmax(1) % 8), batch_size=8))
    accelerator, whole, optimizer, controller = prepared(method)
    train(accelerator, whole, optimizer, batches[:6])
    accelerator.save_state(tmp_path)
    train(accelerator, whole, optimizer, batches[6:])
    assert controller.step == 8  # of 16 batches
    accelerator, resumed, optimizer, controller = prepared(method)
    accelerator.load_state(tmp_path)
    assert controller.step == 3
    train(accelerator, resumed, optimizer, batches[6:])
    assert same(whole, resumed)
    assert nmgraph.verify(nmgraph.finalize(resumed)).holds


def test_the_example_stops_resumes_and_ends_as_if_it_never_had(tmp_path, monkeypatch, capsys):
    for arguments in (["--out", "whole"], ["--out", "parts", "--epochs", "3"], ["--out", "parts"]):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        assert ended.value.code == 0
    assert "3 of 3 weights hold" in capsys.readouterr().out
    whole, parts = (tmp_path / run / "state" / "model.safetensors" for run in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
