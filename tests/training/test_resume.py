"""Stopping and going on, at any step, equals never having stopped: to the bit."""

import copy
import io

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F
from variants import VARIANTS

import nmgraph

STEPS = 12

every = pytest.mark.parametrize("variant", VARIANTS)
optimizers = pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    ],
    ids=["sgd", "adamw"],
)


def network(variant, pattern="2:4"):
    method, options = VARIANTS[variant]
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return nmgraph.convert(net, method=method, pattern=pattern, **options)


def start(variant, make, attached=True):
    model = network(variant)
    optimizer = make(model.parameters())
    if attached:
        nmgraph.attach(model, optimizer, total_steps=STEPS)
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 8, 4, 4, generator=generator), torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@every
@optimizers
@pytest.mark.parametrize("order", ["load, then attach", "attach, then load"])
def test_a_run_resumed_at_any_step_equals_one_that_never_stopped(variant, make, order, caplog):
    model, optimizer = start(variant, make)
    saved = []
    for step in range(STEPS):
        saved.append(through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
        train(model, optimizer, [step])
    for at, checkpoint in enumerate(saved):
        torch.manual_seed(100 + at)  # a new process has other initial weights
        resumed, resumed_optimizer = start(variant, make, attached=order == "attach, then load")
        resumed.load_state_dict(checkpoint["model"], strict=True)
        resumed_optimizer.load_state_dict(checkpoint["optimizer"])
        if order == "load, then attach":
            nmgraph.attach(resumed, resumed_optimizer, total_steps=STEPS)
        train(resumed, resumed_optimizer, range(at, STEPS))
        assert equal(resumed.state_dict(), model.state_dict()), f"resumed at step {at}"
        assert equal(resumed_optimizer.state_dict(), optimizer.state_dict()), f"resumed at step {at}"
    assert caplog.messages == []


@every
def test_a_checkpoint_loaded_into_the_running_model_takes_it_back(variant):
    model, optimizer = start(variant, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    train(model, optimizer, range(3))
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, STEPS))
    wanted = copy.deepcopy(model.state_dict())
    model.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    assert nm(model[0]).clock.tolist() == [3, STEPS]
    train(model, optimizer, range(3, STEPS))
    assert equal(model.state_dict(), wanted)


@every
def test_the_state_of_a_trained_model_loads_strictly_into_a_fresh_one(variant):
    model, optimizer = start(variant, lambda p: torch.optim.SGD(p, lr=0.05))
    train(model, optimizer, range(STEPS))
    fresh = network(variant)
    fresh.load_state_dict(through_a_file(model.state_dict()), strict=True)
    x = torch.randn(8, 8, 4, 4)
    assert torch.equal(fresh(x), model(x))
    assert nmgraph.verify(nmgraph.finalize(fresh)).holds
    assert nm(fresh[0]).clock.tolist() == [STEPS, STEPS]


@every
@pytest.mark.parametrize(
    "fill",
    [
        lambda model, state: model.load_state_dict(state, assign=True),
        lambda model, state: model.to_empty(device="cpu").load_state_dict(state),
    ],
    ids=["assigned", "copied"],
)
def test_a_model_converted_without_memory_takes_over_a_checkpoint(variant, fill):
    model, optimizer = start(variant, lambda p: torch.optim.SGD(p, lr=0.05))
    train(model, optimizer, range(4))
    with torch.device("meta"):
        large = network(variant)
    fill(large, copy.deepcopy(model.state_dict()))
    large_optimizer = torch.optim.SGD(large.parameters(), lr=0.05)
    nmgraph.attach(large, large_optimizer, total_steps=STEPS)
    for each in ((model, optimizer), (large, large_optimizer)):
        train(*each, range(4, STEPS))
    assert equal(large.state_dict(), model.state_dict())


@every
def test_the_step_is_part_of_the_model_and_every_controller_reads_it(variant):
    model, optimizer = start(variant, lambda p: torch.optim.SGD(p, lr=0.05))
    train(model, optimizer, range(5))
    resumed, resumed_optimizer = start(variant, lambda p: torch.optim.SGD(p, lr=0.05), attached=False)
    resumed.load_state_dict(model.state_dict())
    controller = nmgraph.attach(resumed, resumed_optimizer, total_steps=STEPS)
    assert (controller.step, controller.progress) == (5, 5 / STEPS)


def test_a_checkpoint_of_a_longer_run_says_where_the_schedule_goes_on(caplog):
    model, optimizer = start("lbc", lambda p: torch.optim.SGD(p, lr=0.05))
    train(model, optimizer, range(4))
    resumed = network("lbc")
    resumed.load_state_dict(model.state_dict())
    nmgraph.attach(resumed, torch.optim.SGD(resumed.parameters(), lr=0.05), total_steps=8)
    assert caplog.messages == [
        f"{name} was 4 of 12 steps through its schedule; total_steps is 8 now, so it goes on at 50.0%."
        for name in ("0", "3")
    ]
