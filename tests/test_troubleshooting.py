"""Every message that the troubleshooting page quotes is printed by what the page says, and by this code."""

import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import mlp
from torch import nn

import nmgraph
from nmgraph.errors import NMGraphError

PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^```text\n(.*?)\n```", PAGE, re.DOTALL | re.MULTILINE)


def converted(method="lbc", **options):
    return nmgraph.convert(mlp(), method=method, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(model, total_steps, steps=None):
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=total_steps)
    for _ in range(steps or total_steps):
        step(model, optimizer)
    return model


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.stem(x)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x, y):
        return self.fc(x) + y


class Branching(TwoInputs):
    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


def forgotten(path):
    model = converted()
    optimizer = sgd(model)
    for _ in range(2):
        step(model, optimizer)


def saved_state(path):
    torch.save(converted("asp").state_dict(), path / "weights.pt")
    return path / "weights.pt"


def of_asp(path):
    state = mlp().state_dict()
    torch.save(state | {"0.__weight_mma_mask": state["0.weight"] > 0}, path / "asp.pt")
    return path / "asp.pt"


def resumed(path):
    model = train(converted(), 20, steps=4)
    again = converted()
    again.load_state_dict(model.state_dict())
    nmgraph.attach(again, sgd(again), total_steps=40)


def own_tracks(path):
    model = nmgraph.convert(Branching(), method="srste")
    nmgraph.export(model, path / "export", example_inputs=torch.randn(2, 16))


# In the order of the page.
PROVOKED = {
    "no block fits": lambda path: nmgraph.convert(Stem()),
    "converted twice": lambda path: nmgraph.convert(converted(), method="asp"),
    "wrapped": lambda path: nmgraph.convert(torch.compile(mlp())),
    "no such layer": lambda path: nmgraph.convert(mlp(), skip=["fc"]),
    "masks of ASP": lambda path: nmgraph.verify(of_asp(path), model=mlp()),
    "too much state": lambda path: nmgraph.convert(mlp(), method="lbc", pattern="8:16"),
    "no attach": forgotten,
    "another model's optimizer": lambda path: nmgraph.attach(converted(), sgd(mlp()), total_steps=10),
    "short run": lambda path: nmgraph.attach(m := converted("bame"), sgd(m), total_steps=100),
    "raw state": lambda path: nmgraph.verify(saved_state(path)),
    "another recipe": lambda path: converted("srste").load_state_dict(converted("asp").state_dict()),
    "dense into converted": lambda path: converted("asp").load_state_dict(mlp().state_dict()),
    "converted into dense": lambda path: nmgraph.verify(saved_state(path), model=mlp()),
    "longer run": resumed,
    "unfinished": lambda path: nmgraph.finalize(train(converted(), 10, steps=2)),
    "never attached": lambda path: nmgraph.finalize(converted()),
    "no inputs": lambda path: nmgraph.export(nmgraph.convert(TwoInputs(), method="srste"), path / "export"),
    "branches": own_tracks,
    "bf16": lambda path: nmgraph.export(converted("asp"), path / "export", precision="bf16"),
    "no TensorRT": lambda path: nmgraph.export(converted("asp"), path / "export", trt=True),
    "4:8": lambda path: nmgraph.export(converted("asp", pattern="4:8"), path / "export", trt_command=True),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("provoke", "quoted"),
    [pytest.param(provoke, quoted, id=name) for (name, provoke), quoted in zip(PROVOKED.items(), QUOTED, strict=True)],
)
def test_quoted_message_is_what_is_printed(provoke, quoted, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # wherever this runs
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING, "nmgraph"):
        warnings.simplefilter("always")
        try:
            given = provoke(tmp_path)
        except (NMGraphError, RuntimeError) as error:  # load_state_dict's are torch's own
            given = error
    assert quoted in "\n".join([str(given), *caplog.messages, *(str(w.message) for w in warned)])
