"""A converted model is still that model."""

import copy

import pytest
import torch
from models import FunctionalDropout, Recorder, TiedLanguageModel, cnn, mlp, resnet
from torch import nn

import nmgraph
from nmgraph.layers.recipe import Recipe
from nmgraph.methods import SRSTE
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.rewrite import rewrite

METHODS = sorted(nmgraph.METHODS)


def snapshot(model):
    """Everything a failed conversion must not have changed."""
    return {
        name: (type(module), sorted(vars(module)), list(module._parameters), list(module._buffers))
        for name, module in model.named_modules()
    }, {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    structure, state = snapshot(model)
    assert structure == before[0]
    assert list(state) == list(before[1])
    assert all(torch.equal(state[key], tensor) for key, tensor in before[1].items() if not tensor.isnan().any())


@pytest.mark.parametrize("method", METHODS)
def test_model_is_changed_in_place_and_stays_of_its_class(method):
    model = resnet()
    assert nmgraph.convert(model, method=method) is model
    assert type(model).__name__ == "ResNet"
    assert isinstance(model.fc, nn.Linear)
    assert isinstance(model.layer1[0].conv1, nn.Conv2d)
    assert model.layer1[0].conv1.kernel_size == (3, 3)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_keep_identity_order_and_keys(method):
    model = resnet()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    nmgraph.convert(model, method=method)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert [key for key in model.state_dict() if ".nm_" not in key] == keys


@pytest.mark.parametrize("method", METHODS)
def test_optimizer_made_before_the_conversion_trains_the_model(method):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.convert(model, method=method)
    nmgraph.attach(model, optimizer, total_steps=4)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(was, now) for was, now in zip(before, model.parameters(), strict=True))
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_attributes_methods_and_hooks_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.classes = nn.Linear(16, 8), ("cat", "dog")

        def forward(self, x):
            return self.layer(x)

        def describe(self):
            return f"{self.classes} from {self.layer.in_features}"

    model, seen = Net(), []
    model.layer.register_forward_hook(lambda *_: seen.append("layer"))
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    model.layer.weight.register_hook(lambda _: seen.append("gradient"))
    nmgraph.convert(model, method="srste")
    model(torch.randn(2, 16)).sum().backward()
    assert seen == ["model", "layer", "gradient"]
    assert model.describe() == "('cat', 'dog') from 16"


def test_frozen_parameters_stay_frozen_and_others_trainable():
    model = cnn()
    model[7].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    nmgraph.convert(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_training_mode_of_every_module_stays():
    model = cnn().train()
    model[1].eval()
    nmgraph.convert(model, example_inputs=torch.randn(2, 3, 8, 8))
    assert [m.training for m in model] == [True, False, *[True] * 6]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_stays(method, dtype):
    model = nmgraph.convert(mlp().to(dtype), method=method)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model[0].weight.dtype == dtype
    assert model(torch.randn(2, 16, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_stays_in_weights_and_activations(method, memory_format):
    model = cnn()[:5].to(memory_format=memory_format)
    x = torch.randn(2, 3, 8, 8).to(memory_format=memory_format)
    strides, answer = model[3].weight.stride(), model(x).stride()
    nmgraph.convert(model, method=method)
    assert model[3]._parameters["weight"].stride() == strides
    assert model[3].weight.stride() == strides
    assert model(x).stride() == answer


def test_lbc_answers_as_the_dense_model_until_it_is_trained():
    dense = resnet().eval()
    converted = nmgraph.convert(copy.deepcopy(dense), method="lbc")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(converted(x), dense(x))


@pytest.mark.parametrize("example_inputs", [None, torch.randn(2, 16)], ids=["traced", "run"])
def test_conversion_leaves_nothing_behind_in_a_model_that_writes_on_itself(example_inputs):
    model = Recorder()
    nmgraph.convert(model, example_inputs=example_inputs)
    assert (model.calls, model.kept, hasattr(model, "activation")) == (0, [], False)
    assert torch.equal(model.mean, torch.zeros(16))
    assert model.count == 0


def test_model_that_keeps_its_last_activations_can_be_converted_after_it_ran():
    model = Recorder()
    model(torch.randn(2, 16))
    kept = model.activation
    nmgraph.convert(model, method="srste")
    assert model.activation is kept
    assert model.calls == 1


def test_conversion_leaves_the_random_state_as_it_was():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            return self.layer(x + torch.rand(1))

    model, state = Noisy(), torch.get_rng_state()
    nmgraph.convert(model, example_inputs=torch.zeros(2, 16))
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights_stay_tied():
    model = nmgraph.convert(TiedLanguageModel())
    assert model.head.weight is model.embedding.weight


def test_copy_of_a_converted_model_is_independent_of_it():
    model = nmgraph.convert(mlp(), method="srste")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0]._parameters["weight"].zero_()
    assert model[0].weight.any()
    assert not copied[0].weight.any()
    assert str(nmgraph.manifest(copied)) == str(nmgraph.manifest(model))


def with_nan():
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mlp, {"method": "sr-ste"}),
        (mlp, {"momentum": 2.0}),
        (mlp, {"pattern": "4:2"}),
        (mlp, {"pattern": "2:5"}),
        (mlp, {"mode": "both"}),
        (mlp, {"skip": ["1"]}),
        (mlp, {"layers": {"0": "2:3"}}),
        (mlp, {"pattern": "8:16"}),
        (mlp, {"example_inputs": torch.zeros(2, 5)}),
        (with_nan, {}),
        (FunctionalDropout, {"mode": "graph"}),
    ],
)
def test_failed_conversion_leaves_the_model_untouched(make, options):
    model = make()
    before = snapshot(model)
    with pytest.raises(nmgraph.NMGraphError):
        nmgraph.convert(model, **options)
    assert_unchanged(model, before)


def test_layers_already_rewritten_are_undone_when_a_later_one_fails():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 6), nn.Linear(6, 8))
    before = snapshot(model)
    two_of_four = Recipe(SRSTE(), Pattern(2, 4))
    with pytest.raises(KeyError):
        rewrite(model, {"0": two_of_four, "1": two_of_four, "3": two_of_four})
    assert_unchanged(model, before)


def test_finalized_model_is_an_ordinary_one_of_the_original_classes():
    model = resnet()
    classes = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    nmgraph.convert(model, method="srste")
    finished = nmgraph.finalize(model)
    assert {name: type(module) for name, module in finished.named_modules()} == classes
    assert list(finished.state_dict()) == keys
    assert all(isinstance(p, nn.Parameter) for p in finished.parameters())


def test_progress_names_what_begins():
    stages = []
    nmgraph.convert(mlp(), progress=stages.append)
    assert stages == ["tracing", "rewriting layers"]
