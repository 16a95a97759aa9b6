"""Hooking a model to its optimizer: what is refused, what is said, and what is left alone."""

import gc
import logging
import re

import numpy as np
import pytest
import torch
from handles import nm
from torch import nn

import nmgraph
from nmgraph.errors import TrainingError
from nmgraph.layers.masked import Training, sparsify
from nmgraph.layers.recipe import Recipe
from nmgraph.methods import METHODS
from nmgraph.methods.lbc import LBC
from nmgraph.nm.pattern import Pattern
from nmgraph.training.controller import Controller

both = pytest.mark.parametrize("method", METHODS)


def network(method="lbc", **options):
    return nmgraph.convert(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), method=method, **options)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def take_steps(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


def clocks(model):
    return [nm(layer).clock.tolist() for layer in model if hasattr(layer, "nm_clock")]


@pytest.mark.parametrize("total_steps", [0, -1, True, 1.5, 10.0, "10", None])
def test_a_number_of_steps_that_is_none_is_refused(total_steps):
    message = f"total_steps={total_steps!r} must be the number of optimizer steps of the whole run: 1 or more."
    model = network()
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        nmgraph.attach(model, sgd(model), total_steps=total_steps)


def test_a_model_without_sparse_layers_is_refused():
    model = nn.Sequential(nn.Linear(16, 8))
    message = "Sequential has no sparse layer. Convert it first: nmgraph.convert(model, method=...)."
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        nmgraph.attach(model, sgd(model), total_steps=10)


def test_a_finalized_model_is_refused():
    model = nmgraph.finalize(network("srste"))
    message = "Sequential has no sparse layer. Convert it first: nmgraph.convert(model, method=...)."
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        nmgraph.attach(model, sgd(model), total_steps=10)


def test_an_optimizer_of_another_model_is_refused():
    message = (
        "the optimizer trains none of the 2 sparse weights (0, ...). Make it from the parameters() of this very model."
    )
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        nmgraph.attach(network(), sgd(network()), total_steps=10)


def test_a_refused_attach_leaves_no_trace():
    model, other = network(), network()
    optimizer = sgd(other)
    with pytest.raises(TrainingError):
        nmgraph.attach(model, optimizer, total_steps=10)
    assert not optimizer._optimizer_step_pre_hooks
    assert clocks(model) == [[0, 0], [0, 0]]


def test_layers_that_the_optimizer_does_not_train_are_named(caplog):
    model = network()
    with caplog.at_level(logging.WARNING, logger="nmgraph"):
        nmgraph.attach(model, sgd(model[2]), total_steps=10)
    assert caplog.messages == [
        "1 sparse layers are not trained by this optimizer, and keep their masks unless another one is attached: 0"
    ]


@both
def test_attach_changes_nothing_of_the_optimizer(method):
    model = network(method)
    optimizer = sgd(model, weight_decay=1e-4)
    twin = sgd(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), weight_decay=1e-4)
    before = optimizer.state_dict()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    nmgraph.attach(model, optimizer, total_steps=10)
    assert optimizer.state_dict() == before == twin.state_dict()
    take_steps(model, optimizer, 3)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == held
    assert [list(state) for state in optimizer.state.values()] == [["momentum_buffer"]] * 4
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@both
@pytest.mark.filterwarnings("ignore:.*no optimizer is attached")
def test_detach_restores_the_optimizer_and_stops_the_updates(method):
    model = network(method)
    optimizer = sgd(model)
    controller = nmgraph.attach(model, optimizer, total_steps=10)
    take_steps(model, optimizer, 3)
    controller.detach()
    assert not optimizer._optimizer_step_pre_hooks
    before = {key: b.clone() for key, b in model.named_buffers()}
    take_steps(model, optimizer, 3)
    assert all(torch.equal(b, before[key]) for key, b in model.named_buffers())
    controller.detach()  # a second time does nothing


def test_a_run_goes_on_where_it_was_detached():
    model = network()
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=10).detach()
    nmgraph.attach(model, optimizer, total_steps=10)
    take_steps(model, optimizer, 4)
    assert clocks(model) == [[4, 10], [4, 10]]


def test_the_controller_need_not_be_kept():
    model = network()
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=10)
    gc.collect()
    take_steps(model, optimizer, 4)
    assert clocks(model) == [[4, 10], [4, 10]]


def test_the_controller_says_how_far_it_is():
    model = network()
    optimizer = sgd(model)
    controller = nmgraph.attach(model, optimizer, total_steps=4)
    assert (controller.step, controller.progress) == (0, 0.0)
    take_steps(model, optimizer, 1)
    assert repr(controller) == "Controller(2 sparse layers, step 1 of 4)"
    assert (controller.step, controller.progress) == (1, 0.25)
    take_steps(model, optimizer, 5)
    assert (controller.step, controller.progress) == (6, 1.0)


@pytest.mark.parametrize("same_optimizer", [True, False])
def test_attaching_again_takes_over_and_counts_every_step_once(same_optimizer):
    model = network()
    optimizer = sgd(model)
    first = nmgraph.attach(model, optimizer, total_steps=20)
    take_steps(model, optimizer, 3)
    later = optimizer if same_optimizer else sgd(model)
    second = nmgraph.attach(model, later, total_steps=20)
    take_steps(model, later, 2)
    assert clocks(model) == [[5, 20], [5, 20]]
    assert repr(first) != repr(second) == "Controller(2 sparse layers, step 5 of 20)"
    assert len(later._optimizer_step_pre_hooks) == 1
    if not same_optimizer:
        assert not optimizer._optimizer_step_pre_hooks
        take_steps(model, optimizer, 2)
        assert clocks(model) == [[5, 20], [5, 20]]


def test_a_run_taken_over_equals_one_that_was_not():
    def run(again):
        torch.manual_seed(3)
        model = network()
        optimizer = sgd(model)
        nmgraph.attach(model, optimizer, total_steps=12)
        for _ in range(12):
            if again:
                nmgraph.attach(model, optimizer, total_steps=12)
            take_steps(model, optimizer, 1)
        return model.state_dict()

    once, again = run(False), run(True)
    assert all(torch.equal(once[key], again[key]) for key in once)


def test_a_change_of_total_steps_is_logged_for_every_layer(caplog):
    model = network()
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=10)
    take_steps(model, optimizer, 3)
    with caplog.at_level(logging.WARNING, logger="nmgraph"):
        nmgraph.attach(model, optimizer, total_steps=10)
        assert caplog.messages == []
        nmgraph.attach(model, optimizer, total_steps=12)
    assert caplog.messages == [
        f"{name} was 3 of 10 steps through its schedule; total_steps is 12 now, so it goes on at 25.0%."
        for name in ("0", "2")
    ]
    assert clocks(model) == [[3, 12], [3, 12]]


def test_a_shorter_schedule_catches_up_at_once():
    model = network(pattern="2:4")
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=1000)
    take_steps(model, optimizer, 5)
    assert all(nm(layer).mask().all() for layer in (model[0], model[2]))
    nmgraph.attach(model, optimizer, total_steps=6)
    take_steps(model, optimizer, 1)
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_two_optimizers_may_share_a_model():
    model = network()
    first, last = sgd(model[0]), sgd(model[2])
    nmgraph.attach(model, first, total_steps=10)
    nmgraph.attach(model, last, total_steps=20)
    for step in range(10):
        model(torch.randn(8, 16)).square().mean().backward()
        first.step()
        if step % 2:
            last.step()
        model.zero_grad()
    assert clocks(model) == [[10, 10], [5, 20]]
    assert (nm(model[0]).mask().view(8, 4, 4).sum(-1) == 2).all()
    assert nm(model[2]).unfinished() is not None


def test_a_model_may_be_attached_inside_a_larger_one():
    model = network()
    whole = nn.Sequential(nn.Linear(16, 16), model)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    nmgraph.attach(whole, optimizer, total_steps=6)
    take_steps(whole, optimizer, 2)
    nmgraph.attach(model, optimizer, total_steps=6)
    take_steps(whole, optimizer, 4)
    assert clocks(model) == [[6, 6], [6, 6]]
    assert not any(nm(layer).unfinished() for layer in (model[0], model[2]))


def test_every_score_moves_with_the_current_learning_rate_of_its_weight():
    model = network(LBC(score_decay=0.0, momentum=0.0))
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.4}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    nmgraph.attach(model, optimizer, total_steps=100)
    wanted = {layer: torch.zeros_like(nm(layer).raw) for layer in (model[0], model[2])}
    for rates in ((0.2, 0.4), (0.1, 0.2)):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        for (layer, total), rate in zip(wanted.items(), rates, strict=True):
            total -= rate * nm(layer).raw.detach() * nm(layer).raw.grad
        optimizer.step()
        schedule.step()
    for layer, total in wanted.items():
        assert torch.allclose(nm(layer).state.accumulator[:, 0], total, atol=1e-7)


@both
def test_a_layer_made_sparse_by_hand_trains_without_any_conversion(method):
    layer = nn.Linear(16, 8)
    sparsify(layer, "weight", "layer", Recipe(METHODS[method](), Pattern(2, 4)), Training())
    optimizer = sgd(layer)
    Controller(layer, optimizer, 6)
    take_steps(layer, optimizer, 6)
    assert nm(layer).clock.tolist() == [6, 6]
    assert nm(layer).unfinished() is None
    assert (layer.weight.view(8, 4, 4) != 0).sum(-1).max() == 2


def test_layers_that_are_frozen_or_dense_are_left_alone():
    model = network(skip=("2",))
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=4)
    take_steps(model, optimizer, 4)
    assert clocks(model) == [[4, 4]]
    assert (model[2].weight != 0).all()


def test_a_numpy_number_of_steps_counts_as_a_number():
    model = network()
    assert nmgraph.attach(model, sgd(model), total_steps=np.int64(10)).total_steps == 10


def test_swapped_arguments_are_said():
    model = network()
    with pytest.raises(TrainingError) as caught:
        nmgraph.attach(sgd(model), model, total_steps=10)
    assert str(caught.value) == (
        "attach takes a model and a torch optimizer, not a SGD and a Sequential: "
        "nmgraph.attach(model, optimizer, total_steps=...)."
    )


def test_a_detached_controller_still_tells_the_step():
    model = network()
    optimizer = sgd(model)
    controller = nmgraph.attach(model, optimizer, total_steps=10)
    model[0](torch.randn(2, 16)).sum().backward()
    optimizer.step()
    controller.detach()
    assert controller.step == 1


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (
            "bame",
            {},
            "bame in 90 steps: no mask adaption falls between t_i and t_f, as interval=100. Set a smaller interval.",
        ),
        ("rigl", {}, "rigl in 90 steps: the mask never changes before t_f, as interval=100. Set a smaller interval."),
        ("bame", {"interval": 30}, None),
        ("rigl", {"interval": 60}, None),
        ("lbc", {}, None),
    ],
)
def test_a_run_too_short_for_what_the_method_does_is_said_once(method, options, said, caplog):
    model = nmgraph.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), method=method, **options)
    nmgraph.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=90)
    assert caplog.messages == ([] if said is None else [said])
