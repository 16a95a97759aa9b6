"""A state_dict of another method, pattern, model or shape is refused by name, in words that say what to do."""

import pytest
import torch
from models import mlp
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils.prune import l1_unstructured

import nmgraph
from nmgraph.checkpoint.dense_file import open_dense
from nmgraph.errors import FileError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.pt"


def wide():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def converted(make=mlp, method="lbc", **options):
    return nmgraph.convert(make(), method=method, **options)


def through_a_file(model, path):
    torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def refusal(model, state):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "nm_" in key)
    return str(caught.value)


@pytest.mark.parametrize("method", sorted(nmgraph.METHODS))
def test_state_dict_of_the_same_conversion_loads(method, path):
    model, other = converted(method=method), converted(method=method)
    other.load_state_dict(through_a_file(model, path))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "srste"}, "srste 2:4"),
        ({"pattern": "1:4"}, "lbc 1:4"),
        ({"momentum": 0.5}, "lbc 2:4 (momentum=0.5)"),
    ],
)
def test_state_dict_of_another_conversion_is_refused_by_name(options, told, path):
    text = refusal(converted(), through_a_file(converted(**options), path))
    for site in ("0", "2"):
        line = f"{site} was trained as {told}, but this model is converted as lbc 2:4. Convert it the same way before loading."
        assert line in text


@pytest.mark.parametrize("make", [mlp, lambda: nmgraph.finalize(converted(), force=True)], ids=["dense", "finalized"])
def test_state_dict_of_a_dense_model_lists_the_state_it_lacks(make, path):
    text = refusal(converted(), through_a_file(make(), path))
    assert '"0.nm_mask", "0.nm_clock", "0.nm_recipe", "2.nm_alive"' in text


def test_dense_state_loads_where_that_is_asked_for(path):
    missing, unexpected = converted().load_state_dict(through_a_file(mlp(), path), strict=False)
    assert all("nm_" in key for key in missing)
    assert unexpected == []


def test_state_dict_of_other_shapes_names_each(path):
    with pytest.raises(RuntimeError) as caught:
        converted().load_state_dict(through_a_file(converted(wide), path))
    for key, theirs, ours in (("0.weight", [32, 16], [16, 16]), ("0.nm_mask", [32, 1, 16], [16, 1, 16])):
        assert f"size mismatch for {key}: copying a param with shape torch.Size({theirs})" in str(caught.value)
        assert f"the shape in current model is torch.Size({ours})" in str(caught.value)


@pytest.mark.parametrize("method", ["bimask", "lbc", "srste"])
def test_state_of_a_wrong_shape_alone_is_named(method, path):
    state = through_a_file(converted(method=method), path)
    key = {"bimask": "0.nm_permutation", "lbc": "0.nm_mask", "srste": "0.nm_keep"}[method]
    state[key] = torch.zeros(3, dtype=state[key].dtype)
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}: copying a param with shape torch.Size"):
        converted(method=method).load_state_dict(state)


@pytest.mark.parametrize("recipe", ["text", torch.zeros(3), torch.zeros(3, dtype=torch.uint8)])
def test_damaged_recipe_is_refused(recipe, path):
    state = through_a_file(converted(), path)
    state["0.nm_recipe"] = recipe
    with pytest.raises(RuntimeError, match=r"0 was trained as something unreadable|0\.nm_recipe"):
        converted().load_state_dict(state)


@pytest.mark.parametrize("take_away", [["2.bias"], ["0.nm_mask", "2.nm_clock"]])
def test_missing_and_extra_entries_are_listed(take_away, path):
    state = through_a_file(converted(), path)
    for key in take_away:
        del state[key]
    state["9.weight"] = torch.zeros(2)
    text = refusal(converted(), state)
    assert "Missing key(s) in state_dict: " + ", ".join(f'"{key}"' for key in take_away) in text
    assert 'Unexpected key(s) in state_dict: "9.weight"' in text


def test_state_dict_of_a_converted_model_is_no_dense_one_and_says_so(path):
    through_a_file(converted(), path)
    hint = (
        "\nThe file holds the state_dict of a converted model: convert the dense model in the same way, and call "
        "load_state_dict. A file of nmgraph.save says by itself what it is."
    )
    with pytest.raises(FileError) as caught:
        open_dense(path, factory="models:mlp")
    assert str(caught.value).startswith(f"{path} does not fit Sequential: ")
    assert str(caught.value).endswith(hint)
    with pytest.raises(FileError) as caught:
        nmgraph.verify(path, model=mlp())
    assert str(caught.value).endswith(hint)


def _like_asp(model):
    for layer in (model[0], model[2]):
        layer.register_buffer("__weight_mma_mask", layer.weight.detach() > 0)
    return "0.__weight_mma_mask"


def _like_modelopt(model):
    for layer in (model[0], model[2]):
        layer.register_buffer("_weight_mask", layer.weight.detach() > 0)
    return "0._weight_mask"


def _by_torch_ao(model):
    sparsifier = WeightNormSparsifier(sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    return "0.parametrizations.weight.original"


def _by_torch_prune(model):
    for layer in (model[0], model[2]):
        l1_unstructured(layer, "weight", 0.5)
    return "0.weight_mask"


@pytest.mark.parametrize("sparsify", [_like_asp, _like_modelopt, _by_torch_ao, _by_torch_prune])
def test_masks_of_another_program_are_named_with_what_to_do(sparsify, path):
    model = mlp()
    mask = sparsify(model)
    torch.save(model.state_dict(), path)
    with pytest.raises(FileError) as caught:
        open_dense(path, factory="models:mlp")
    assert str(caught.value).endswith(
        f"\nThe file holds masks of another program ({mask}). Let that program fold them into the weights and save "
        "those, or multiply each weight by its mask and leave the masks out; then load it."
    )
