"""A layer made sparse in place: what it answers, and what it stays."""

import copy
import io
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from handles import nm
from torch import nn
from transformers.pytorch_utils import Conv1D

import nmgraph
from nmgraph.layers.kinds import layer_axis
from nmgraph.layers.masked import Masked, Training, masked_weights, sparsify, unmask
from nmgraph.layers.recipe import Recipe
from nmgraph.methods import METHODS, make_method
from nmgraph.methods.srste import SRSTE
from nmgraph.nm.pattern import Pattern

KINDS = {
    "Linear": lambda: nn.Linear(16, 8),
    "Conv1d": lambda: nn.Conv1d(16, 8, 3),
    "Conv2d": lambda: nn.Conv2d(16, 8, 3),
    "Conv2d 1x1": lambda: nn.Conv2d(16, 8, 1),
    "Conv3d": lambda: nn.Conv3d(16, 8, 2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(16, 8, 3),
    "Conv1D": lambda: Conv1D(8, 16),
}
SHAPES = {"Linear": (2, 16), "Conv1d": (2, 16, 5), "Conv2d": (2, 16, 5, 5), "Conv2d 1x1": (2, 16, 5, 5)}
SHAPES |= {"Conv3d": (2, 16, 4, 4, 4), "ConvTranspose2d": (2, 16, 5, 5), "Conv1D": (2, 16)}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def sparse(layer, method="srste", pattern="2:4", site="fc"):
    """Make a layer sparse-trainable; LBC's masks are random half-way ones, as a fresh state masks nothing."""
    recipe = Recipe(make_method(method), Pattern.parse(pattern), layer_axis(layer))
    sparsify(layer, "weight", site, recipe, Training())
    if method == "lbc":
        layer._buffers["nm_mask"].copy_(torch.rand(layer._buffers["nm_mask"].shape) > 0.5)
    return layer


both = pytest.mark.parametrize("method", METHODS)
kinds = pytest.mark.parametrize("kind", KINDS)


@both
@kinds
def test_whoever_reads_the_weight_gets_the_masked_one(method, kind):
    layer = sparse(KINDS[kind](), method)
    nm(layer).state = nm(layer).told.method.conclude(
        nm(layer).raw_OSC.detach(), nm(layer).state, nm(layer).told.pattern
    )
    raw, mask = nm(layer).raw.detach(), nm(layer).mask()
    assert mask.dtype == torch.bool
    assert mask.shape == raw.shape
    assert not mask.all()
    assert torch.equal(layer.weight != 0, mask)
    if method not in ("maxq", "sste"):  # which multiply by more than a mask
        assert torch.equal(layer.weight, raw * mask)
    assert layer.weight.dtype == raw.dtype
    assert layer.weight.requires_grad


@both
@kinds
def test_the_layer_multiplies_by_the_masked_weight(method, kind):
    dense = KINDS[kind]()
    layer = sparse(copy.deepcopy(dense), method)
    dense.weight.data = layer.weight.detach().clone()
    x = torch.randn(SHAPES[kind])
    assert torch.equal(layer(x), dense(x))


@both
@kinds
@pytest.mark.parametrize("last", [False, True])
def test_the_masked_weight_lies_in_memory_as_the_raw_one_does(method, kind, last):
    layer = KINDS[kind]()
    if last and layer.weight.dim() in LAST:
        layer = layer.to(memory_format=LAST[layer.weight.dim()])
    strides = layer.weight.stride()
    sparse(layer, method)
    assert layer.weight.stride() == strides
    assert nm(layer).mask().stride() == strides


@both
@kinds
@pytest.mark.parametrize("last", [False, True])
def test_the_answer_lies_in_memory_as_before(method, kind, last):
    layer, x = KINDS[kind](), torch.randn(SHAPES[kind])
    if last and x.dim() in LAST:
        layer, x = (t.to(memory_format=LAST[x.dim()]) for t in (layer, x))
    before = layer(x)
    assert sparse(layer, method)(x).stride() == before.stride()


@both
@kinds
def test_channels_last_weights_are_masked_as_contiguous_ones_are(method, kind):
    plain = KINDS[kind]()
    last = copy.deepcopy(plain)
    if last.weight.dim() in LAST:
        last = last.to(memory_format=LAST[last.weight.dim()])
    torch.manual_seed(1)
    sparse(plain, method)
    torch.manual_seed(1)
    sparse(last, method)
    assert torch.equal(plain.weight, last.weight)


@both
@kinds
def test_the_state_dict_keeps_its_keys_and_adds_only_ours(method, kind):
    dense = KINDS[kind]()
    layer = sparse(copy.deepcopy(dense), method)
    state = layer.state_dict()
    fields = [name for name, t in nm(layer).state._asdict().items() if t.numel()]
    assert list(state)[:2] == ["weight", "bias"]
    assert set(state) == {"weight", "bias", "nm_clock", "nm_recipe", *(f"nm_{name}" for name in fields)}
    assert torch.equal(state["weight"], dense.weight)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


@both
@kinds
def test_a_sparse_layer_stays_an_instance_of_its_class_and_the_same_object(method, kind):
    layer = KINDS[kind]()
    cls, weight = type(layer), layer.weight
    sparse(layer, method)
    assert isinstance(layer, cls)
    assert isinstance(layer, Masked)
    assert type(layer).__module__ == cls.__module__  # by which tracers take torch.nn's layers as leaves
    assert nm(layer).raw is weight
    assert type(layer) is type(sparse(KINDS[kind](), method))  # one class for all layers of a kind


def test_the_repr_says_pattern_and_method():
    assert re.fullmatch(
        r"NMLinear\(in_features=16, out_features=8, bias=True, 2:4 lbc\)", repr(sparse(KINDS["Linear"](), "lbc"))
    )


@both
@kinds
def test_a_deep_copy_is_equal_and_independent(method, kind):
    layer, x = sparse(KINDS[kind](), method), torch.randn(SHAPES[kind])
    twin = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for t in (*twin.parameters(), *twin.buffers()):
            t.zero_()
    assert torch.equal(layer(x), before)
    assert type(twin) is type(layer)
    assert nm(twin).training is not nm(layer).training


def test_the_layers_of_a_copied_model_share_what_they_know_of_their_training():
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)))
    twin = copy.deepcopy(model)
    assert nm(twin[0]).training is nm(twin[1]).training
    assert nm(twin[0]).training is not nm(model[0]).training


@both
@kinds
def test_a_pickled_layer_comes_back_as_it_was(method, kind):
    layer, x = sparse(KINDS[kind](), method), torch.randn(SHAPES[kind])
    file = io.BytesIO()
    torch.save(nn.Sequential(layer, nn.Identity()), file)
    file.seek(0)
    read = torch.load(file, weights_only=False)[0]
    assert type(read) is type(layer)
    assert nm(read).told == nm(layer).told
    assert torch.equal(read(x), layer(x))
    assert all(torch.equal(a, b) for a, b in zip(read.buffers(), layer.buffers(), strict=True))


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_a_change_of_dtype_is_for_the_weights_and_leaves_the_state_as_it_is(convert):
    layer = sparse(nn.Linear(16, 8), "lbc")
    layer._buffers["nm_accumulator"].normal_()
    before = {name: b.clone() for name, b in layer.named_buffers()}
    convert(layer)
    assert layer.weight.dtype == nm(layer).raw.dtype == layer.bias.dtype != torch.float32
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert layer(torch.randn(2, 16).to(layer.bias.dtype)).dtype == layer.bias.dtype


@both
@kinds
def test_unmask_gives_the_layer_back_as_it_was(method, kind):
    dense = KINDS[kind]()
    layer = copy.deepcopy(dense)
    attributes = set(vars(layer))
    unmask(sparse(layer, method))
    assert type(layer) is type(dense)
    assert set(vars(layer)) == attributes
    assert repr(layer) == repr(dense)
    assert layer.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), dense.parameters(), strict=True))


def test_masked_weights_finds_each_once_by_its_name():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Linear(8, 3)), "b": shared})
    sparse(shared)
    assert list(masked_weights(model)) == ["a.0"]
    assert masked_weights(model)["a.0"] == nm(shared)


@dataclass(frozen=True)
class Typo(SRSTE):
    """A method with a bug in it."""

    name: ClassVar[str] = "typo"

    def forward_weight(self, w_OSC, state, pattern):
        return state.no_such_field


def test_an_attribute_error_inside_a_method_does_not_give_the_dense_weight():
    layer = nn.Linear(16, 8)
    sparsify(layer, "weight", "blocks.0.fc", Recipe(Typo(), Pattern(2, 4)), Training())
    message = (
        "blocks.0.fc: the masked weight could not be computed: 'SRSTEState' object has no attribute 'no_such_field'"
    )
    for use in (lambda: layer.weight, lambda: layer(torch.randn(2, 16))):
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            use()


def test_a_new_parameter_put_in_place_of_the_weight_is_masked_too():
    layer = sparse(nn.Linear(16, 8))
    layer.weight = nn.Parameter(torch.randn(8, 16))
    assert nm(layer).raw.shape == (8, 16)
    assert ((layer.weight != 0).view(8, 4, 4).sum(-1) == 2).all()


@both
def test_hooks_that_were_there_stay(method):
    layer, called = nn.Linear(16, 8), []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    sparse(layer, method)(torch.randn(2, 16))
    assert called == ["hook"]


@both
def test_a_model_loads_its_own_state_strictly(method):
    make = lambda: nmgraph.convert(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), method=method)  # noqa: E731
    model, other = make(), make()
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_a_dense_state_dict_loads_under_its_old_keys():
    dense = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)))
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".nm_" in key for key in missing)
    assert unexpected == []
    assert torch.equal(nm(model[0]).raw, dense[0].weight)


def test_the_state_of_another_recipe_is_refused_naming_the_layer_and_both_recipes():
    trained = nmgraph.convert(nn.Sequential(nn.Linear(16, 8)), method="srste", pattern="1:4", decay=0.1)
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 8)), method="lbc", pattern="2:4")
    before = nm(model[0]).raw.detach().clone()
    message = (
        "Error(s) in loading state_dict for Sequential:\n\t"
        "0 was trained as srste 1:4 (decay=0.1), but this model is converted as "
        "lbc 2:4. Convert it the same way before loading."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        model.load_state_dict(trained.state_dict())
    assert torch.equal(nm(model[0]).raw, before)


@both
def test_the_masked_weight_keeps_up_with_the_raw_one(method):
    layer = sparse(nn.Linear(16, 8), method)
    first = layer.weight.detach().clone()
    with torch.no_grad():
        nm(layer).raw.neg_()
    assert torch.equal(layer.weight, -first)


def test_an_empty_buffer_is_not_in_the_state_dict_and_may_be():
    layer = sparse(nn.Linear(16, 8), "bimask")
    state = layer.state_dict()
    assert "nm_salience" not in state
    layer.load_state_dict(state)
    layer.load_state_dict({**state, "nm_salience": torch.empty(0)})
