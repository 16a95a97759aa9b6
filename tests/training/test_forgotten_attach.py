"""Training without attach is noticed: once, by name, with the line to add. Nothing else is taken for it."""

import copy
import warnings

import pytest
import torch
from handles import nm
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nmgraph
from nmgraph.methods import METHODS

SAID = (
    "0 is trained with the method lbc, but no optimizer is attached: its masks do not move. "
    "After making the optimizer, add: nmgraph.attach(model, optimizer, total_steps=...)"
)


def network(method="lbc", **options):
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return nmgraph.convert(net, method=method, **options)


def forward(model):
    return model(torch.randn(8, 16)).square().mean()


def take_steps(model, steps=4, attach=False, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    if attach:
        nmgraph.attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        forward(model).backward()
        optimizer.step()


@pytest.fixture
def said():
    """Collect the text of every warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = []
        yield lambda: texts.extend(str(w.message) for w in caught) or texts


def test_a_forgotten_attach_is_said_once_with_the_layer_and_the_line_to_add(said):
    model = network()
    take_steps(model)
    take_steps(model)
    assert said() == [SAID]


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls().needs_attach])
def test_every_method_that_needs_its_steps_says_so(method, said):
    take_steps(network(method))
    (text,) = said()
    assert text.startswith(f"0 is trained with the method {method}, but no optimizer is attached")
    assert text.endswith("add: nmgraph.attach(model, optimizer, total_steps=...)")


def test_what_is_said_of_srste_is_true(said):
    model = network("srste", decay=0.1)
    before = nm(model[0]).mask()
    with torch.no_grad():
        nm(model[0]).raw.copy_(nm(model[0]).raw.flip(1))
    assert not torch.equal(nm(model[0]).mask(), before)  # its masks do move, attached or not
    take_steps(model)
    assert "masks do not move" not in said()[0]


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {}], ids=["foreach", "fused", "plain"])
def test_it_is_noticed_under_every_kind_of_optimizer(options, said):
    model = network()
    take_steps(model, optimizer=torch.optim.AdamW(model.parameters(), **options))
    assert said() == [SAID]


def test_two_models_are_each_told(said):
    take_steps(network())
    take_steps(network())
    assert said() == [SAID, SAID]


def test_only_the_layers_without_an_optimizer_are_named(said):
    model = network()
    nmgraph.attach(model, torch.optim.SGD(model[0].parameters(), lr=0.1), total_steps=4)
    take_steps(model)
    assert [text.split()[0] for text in said()] == ["2"]


def test_a_copy_that_is_trained_is_told_although_the_original_is_attached(said):
    model = network()
    nmgraph.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4)
    take_steps(copy.deepcopy(model))
    assert said() == [SAID]


def test_an_attached_model_is_not_told(said):
    take_steps(network(), attach=True)
    assert said() == []


def test_the_plain_straight_through_estimator_needs_no_attach(said):
    take_steps(network("srste", decay=0.0))
    assert said() == []


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_evaluating_is_not_training(grad, train, said):
    model = network().train(train)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            forward(model)
    assert said() == []


def test_gradients_that_no_optimizer_uses_are_not_training(said):
    model = network()
    for _ in range(3):
        forward(model).backward()
    assert said() == []


def test_a_copy_that_is_only_evaluated_is_not_told(said):
    model = network()
    forward(model)
    take_steps(model, attach=True)
    twin = copy.deepcopy(model)
    for mode in (twin.train, twin.eval):
        mode()
        forward(twin)
        forward(twin)
    assert said() == []


def test_an_averaged_copy_follows_the_masks_and_is_not_told(said):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.attach(model, optimizer, total_steps=6)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(6):
        take_steps(model, 1, optimizer=optimizer)
        average.update_parameters(model)
        with torch.no_grad():
            forward(average)
        forward(average.eval())
        average.train()
    assert said() == []
    assert nmgraph.verify(nmgraph.finalize(average.module)).holds
    assert torch.equal(nm(average.module[0]).mask(), nm(model[0]).mask())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(network().state_dict()),
        lambda model: model.bfloat16().float(),
        lambda model: model.double().float(),
    ],
    ids=["loading", "rounding", "moving"],
)
def test_what_else_changes_weights_is_not_training(change, said):
    model = network()
    forward(model).backward()
    change(model)
    forward(model)
    assert said() == []


def test_a_copy_taken_in_training_is_not_told_until_it_is_trained_itself(said):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forward(model).backward()  # before attach, as in a first try of the loop
    nmgraph.attach(model, optimizer, total_steps=6)
    take_steps(model, 3, optimizer=optimizer)
    twin = copy.deepcopy(model)
    forward(twin)
    assert said() == []
    take_steps(twin)
    assert said() == [SAID]


def test_attaching_after_the_first_steps_is_enough(said):
    model = network()
    forward(model)
    take_steps(model, attach=True)
    assert said() == []
