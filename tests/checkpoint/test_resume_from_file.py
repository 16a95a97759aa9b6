"""A run that was saved, loaded and continued ends, bit for bit, where one that never stopped does."""

import pytest
import torch
from models import cnn
from torch.nn import functional as F
from variants import VARIANTS

import nmgraph

STEPS = 10


def make(variant):
    torch.manual_seed(1)
    method, options = VARIANTS[variant]
    model = nmgraph.convert(cnn(), method=method, layers={"3": "1:4"}, **options)
    return model, optimizer_of(model)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def run(model, optimizer, steps):
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(4, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=VARIANTS)
def uninterrupted(request):
    model, optimizer = make(request.param)
    run(model, optimizer, range(STEPS))
    return request.param, model.state_dict()


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 9])
def test_continued_run_equals_one_that_never_stopped(uninterrupted, stop, tmp_path):
    method, expected = uninterrupted
    model, optimizer = make(method)
    run(model, optimizer, range(stop))
    nmgraph.save(model, tmp_path / "model.nm.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    loaded = nmgraph.load(tmp_path / "model.nm.pt")
    again = optimizer_of(loaded)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    run(loaded, again, range(stop, STEPS))

    state = loaded.state_dict()
    assert list(state) == list(expected)
    assert [key for key, value in expected.items() if not torch.equal(state[key], value)] == []


def test_masks_moved_during_the_run():
    model, optimizer = make("lbc")
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("nm_mask")}
    run(model, optimizer, range(STEPS))
    assert all(not torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert nmgraph.verify(nmgraph.finalize(model)).holds
