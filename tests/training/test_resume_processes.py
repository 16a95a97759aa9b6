"""What a checkpoint carries into another process, another precision, another length of the run."""

import copy
import multiprocessing
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from variants import VARIANTS

import nmgraph
from nmgraph.layers.masked import masked_weights
from nmgraph.methods import METHODS

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import faults_resume

STEPS = 12

every = pytest.mark.parametrize("variant", VARIANTS)


def network(variant, seed=1):
    torch.manual_seed(seed)
    method, options = VARIANTS[variant]
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return nmgraph.convert(net, method=method, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def backward(model, step, size=8):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(size, 8, 4, 4, generator=generator), torch.randint(4, (size,), generator=generator)
    F.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y).backward()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def ours(state):
    return {key: value for key, value in state.items() if key.rpartition(".")[2].startswith("nm_")}


def test_a_new_process_goes_on_as_if_there_had_been_no_stop(tmp_path):
    draws, tasks = random.Random(0), []
    pairs = [("resnet", "sgd"), ("transformer", "adamw-fused")]  # the benchmark has every variant with both
    for number, variant in enumerate(VARIANTS):
        case = faults_resume.Case(variant, *pairs[number % 2], steps=6, interval=2)
        stop = draws.choice(faults_resume.stops_of(case, 0, draws))
        folder = tmp_path / str(number)
        folder.mkdir()
        faults_resume.run_through(case, [stop], folder)
        tasks.append((case, stop, str(folder)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(faults_resume.go_on, tasks) == [[] for _ in tasks]


@pytest.mark.slow
def test_the_benchmark_of_resuming_finds_no_difference():
    found = faults_resume.measure(quick=True)
    assert found["resumed"] > 100
    assert found["differing"] == 0


@every
@pytest.mark.parametrize(("saved", "loaded"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_another_precision_of_the_weights_takes_over_the_methods_state_as_it_is(variant, saved, loaded):
    model = network(variant).to(saved)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(5))
    other = network(variant, seed=2).to(loaded)
    other.load_state_dict(model.state_dict())
    assert same(ours(other.state_dict()), ours(model.state_dict()))
    assert all(torch.equal(p, q.to(loaded)) for p, q in zip(other.parameters(), model.parameters(), strict=True))
    other_optimizer = sgd(other)
    other_optimizer.load_state_dict(optimizer.state_dict())
    nmgraph.attach(other, other_optimizer, total_steps=STEPS)
    train(other, other_optimizer, range(5, STEPS))
    assert nmgraph.verify(nmgraph.finalize(other)).holds


@every
def test_a_checkpoint_whose_floats_were_all_cast_to_bfloat16_is_gone_on_from(variant):
    model = network(variant)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(5))
    cast = {key: t.bfloat16() if t.is_floating_point() else t for key, t in model.state_dict().items()}
    other = network(variant, seed=2)
    other.load_state_dict(cast)
    assert {key: t.dtype for key, t in other.state_dict().items()} == {
        k: t.dtype for k, t in model.state_dict().items()
    }
    other_optimizer = sgd(other)
    other_optimizer.load_state_dict(optimizer.state_dict())
    nmgraph.attach(other, other_optimizer, total_steps=STEPS)
    train(other, other_optimizer, range(5, STEPS))
    assert nmgraph.verify(nmgraph.finalize(other)).holds


def test_a_checkpoint_whose_clock_was_cast_is_refused():
    state = network("lbc").state_dict()
    state["0.nm_clock"] = torch.tensor([1001, 3001]).bfloat16()  # is 1000 of 3008 now
    with pytest.raises(
        RuntimeError, match=r"0: 0.nm_clock is torch.bfloat16, which cannot count steps. Cast only weights"
    ):
        network("lbc").load_state_dict(state)


@every
@pytest.mark.parametrize(
    ("total", "order"),
    [(6, "load, then attach"), (24, "attach, then load"), (4, "load, then attach"), (3, "attach, then load")],
    ids=["shorter", "longer", "at its end", "past its end"],
)
def test_another_number_of_steps_is_said_and_the_run_ends_at_its_pattern(variant, total, order, caplog):
    model = network(variant)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(4))
    resumed = network(variant, seed=2)
    resumed_optimizer = sgd(resumed)
    caplog.clear()
    if order == "attach, then load":
        nmgraph.attach(resumed, resumed_optimizer, total_steps=total)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    if order == "load, then attach":
        nmgraph.attach(resumed, resumed_optimizer, total_steps=total)
    train(resumed, resumed_optimizer, range(4, max(5, total)))
    share = {6: "66.7", 24: "16.7", 4: "100.0", 3: "100.0"}[total]
    assert [m for m in caplog.messages if "through its schedule" in m] == [
        f"{name} was 4 of 12 steps through its schedule; total_steps is {total} now, so it goes on at {share}%."
        for name in ("0", "3")
    ]
    assert all(p.isfinite().all() for p in resumed.parameters())
    assert nmgraph.verify(nmgraph.finalize(resumed)).holds


@pytest.mark.parametrize(
    "variant", [v for v, (method, _) in VARIANTS.items() if "mask" in METHODS[method].state_type._fields]
)
def test_weights_once_pruned_for_good_stay_so_in_a_run_made_longer(variant):
    model = network(variant)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, range(4))
    before = {name: int(weight.state.mask.sum()) for name, weight in masked_weights(model).items()}
    nmgraph.attach(model, optimizer, total_steps=10 * STEPS)
    train(model, optimizer, range(4, 9))
    for name, weight in masked_weights(model).items():
        assert int(weight.state.mask.sum()) <= before[name]


@every
def test_a_stop_between_two_micro_batches_is_resumed_with_their_gradients(variant):
    def halves(model, optimizer, first, last):
        for half in range(first, last):
            backward(model, half)
            if half % 2:
                optimizer.step()
                optimizer.zero_grad()

    model = network(variant)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    halves(model, optimizer, 0, 9)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), gradients))
    resumed = network(variant, seed=2)
    resumed_optimizer = sgd(resumed)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    for name, p in resumed.named_parameters():
        p.grad = saved[2][name]
    nmgraph.attach(resumed, resumed_optimizer, total_steps=STEPS)
    for each in ((model, optimizer), (resumed, resumed_optimizer)):
        halves(*each, 9, 2 * STEPS)
    assert same(resumed.state_dict(), model.state_dict())
