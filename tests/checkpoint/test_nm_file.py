"""A .nm.pt file gives the converted model back, and never runs code that is not trusted."""

import pytest
import torch
import torchvision
from handles import nm
from models import Encoder, TiedLanguageModel, WithExtraState, WithTables, cnn, convnext, deit, mlp, resnet
from torch import nn

import nmgraph
from nmgraph.errors import FileError, UntrustedError
from nmgraph.layers.masked import masked_weights

METHODS = sorted(nmgraph.METHODS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.nm.pt"


def saved_and_loaded(model, path, **options):
    nmgraph.save(model, path)
    return nmgraph.load(path, trust=["models"], **options)


def message(error, function, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error
    return str(caught.value)


def assert_same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert (a[key].dtype, a[key].stride()) == (b[key].dtype, b[key].stride()), key
        assert torch.equal(a[key], b[key]), key


def trained(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    nmgraph.attach(model, optimizer, total_steps=10)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "shape"),
    [(mlp, (4, 16)), (cnn, (2, 3, 8, 8)), (resnet, (2, 3, 32, 32)), (convnext, (2, 3, 32, 32)), (Encoder, (2, 5, 32))],
)
def test_trained_model_comes_back_bit_equal(make, shape, method, path):
    x = torch.randn(shape)
    model = trained(nmgraph.convert(make(), method=method, layers={"*": "1:4"}), x).eval()
    loaded = saved_and_loaded(model, path)
    assert type(loaded) is type(model)
    assert_same_state(loaded, model)
    assert nmgraph.manifest(loaded) == nmgraph.manifest(model)
    assert not any(m.training for m in loaded.modules())
    assert torch.equal(loaded(x), model(x))


def test_progress_recipes_and_masks_come_back(path):
    model = trained(nmgraph.convert(mlp(), method="lbc", layers={"2": "1:4"}, momentum=0.5), torch.randn(4, 16))
    loaded = saved_and_loaded(model, path)
    for name, layer in masked_weights(model).items():
        again = masked_weights(loaded)[name]
        assert nm(again).told == nm(layer).told
        assert nm(again).clock.tolist() == [3, 10]
        assert torch.equal(nm(again).mask(), nm(layer).mask())


def test_tied_weights_come_back_tied(path):
    loaded = saved_and_loaded(nmgraph.convert(TiedLanguageModel()), path)
    assert loaded.head.weight is loaded.embedding.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_comes_back(dtype, path):
    model = nmgraph.convert(cnn().to(dtype), method="lbc")
    loaded = saved_and_loaded(model, path)
    assert_same_state(loaded, model)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_dtype_that_was_changed_after_the_conversion_comes_back(path):
    model = nmgraph.convert(cnn(), method="lbc").to(torch.bfloat16)
    loaded = saved_and_loaded(model, path)
    assert_same_state(loaded, model)


def test_memory_format_comes_back(path):
    model = nmgraph.convert(cnn().to(memory_format=torch.channels_last), method="srste")
    loaded = saved_and_loaded(model, path)
    assert_same_state(loaded, model)
    assert loaded[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_frozen_parameters_come_back_frozen(path):
    model = cnn()
    model[0].requires_grad_(False)
    loaded = saved_and_loaded(nmgraph.convert(model), path)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_loaded_parameters_have_memory_of_their_own(path):
    loaded = saved_and_loaded(nmgraph.convert(resnet()), path)
    for name, p in loaded.named_parameters():
        assert p.untyped_storage().nbytes() >= p.numel() * p.element_size(), name


def test_tensors_that_no_state_dict_has_come_back(path):
    model = WithTables()
    model.seen += 1
    loaded = saved_and_loaded(nmgraph.convert(model, method="srste"), path)
    x = torch.randn(2, 16)
    assert torch.equal(loaded(x), model(x))
    assert "table" not in loaded.state_dict()
    assert loaded.seen == 8


def test_extra_state_comes_back(path):
    model = WithExtraState()
    model.scale = 3.0
    nmgraph.save(nmgraph.convert(model, method="srste"), path)
    assert nmgraph.load(path, trust=["models"]).scale == 3.0
    assert nmgraph.load(path, model=WithExtraState()).scale == 3.0


def test_file_holds_nothing_but_plain_values_and_tensors(path):
    nmgraph.save(nmgraph.convert(mlp()), path)
    content = torch.load(path, weights_only=True)  # no class is allowed here
    assert sorted(content) == ["factory", "format", "manifest", "module", "recipes", "state", "version"]
    assert (content["format"], content["version"], content["factory"]) == ("nmgraph", 1, None)
    assert content["recipes"]["0"] == {
        "method": "lbc",
        "options": {"t_i": 0.0, "t_f": 0.5, "momentum": 0.9, "score_decay": 5e-4, "criterion": "score"},
        "pattern": "2:4",
        "reduction_axis": 1,
    }


def test_stored_module_costs_little_beside_the_weights(path):
    model = nmgraph.convert(torchvision.models.resnet18(), method="srste")
    nmgraph.save(model, path)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert path.stat().st_size < 1.02 * weights


def test_saving_changes_nothing_in_the_model(path):
    model = nmgraph.convert(resnet(), method="lbc")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    nmgraph.save(model, path)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_part_of_a_model_may_be_the_converted_one(path):
    model = nn.Sequential(nmgraph.convert(mlp(), method="srste"), nn.Linear(8, 8))
    loaded = saved_and_loaded(model, path)
    assert_same_state(loaded, model)
    assert nmgraph.manifest(loaded).entries == nmgraph.manifest(model).entries


def test_class_inside_a_function_cannot_be_stored(path):
    class Local(nn.Sequential):
        pass

    model = nmgraph.convert(Local(nn.Linear(16, 8)))
    text = message(FileError, nmgraph.save, model, path)
    assert text.startswith("Local can't be pickled: ")
    assert text.endswith(
        ". Put its classes and functions at the top of a module, or save with "
        'factory="package.module:function" naming a function that makes the dense model.'
    )
    assert not path.exists()


def test_model_with_a_lambda_cannot_be_stored(path):
    model = mlp()
    model.register_forward_hook(lambda *_: None)
    text = message(FileError, nmgraph.save, nmgraph.convert(model), path)
    assert text.startswith("Sequential can't be pickled: ")


def test_factory_stands_for_classes_that_cannot_be_stored(path):
    class Local(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(16, 16), nn.Linear(16, 8))

    model = trained(nmgraph.convert(Local(), method="lbc"), torch.randn(4, 16))
    nmgraph.save(model, path, factory="my_package.nets:local")
    assert message(FileError, nmgraph.load, path) == (
        f"{path} was made with --model my_package.nets:local. Making the model runs that code, so name it again: "
        "--model my_package.nets:local, or in Python model=my_package.nets.local()."
    )
    assert_same_state(nmgraph.load(path, model=Local()), model)


def test_model_that_is_given_takes_the_place_of_the_stored_one(path):
    model = nmgraph.convert(resnet(), method="srste")
    nmgraph.save(model, path)
    given = resnet()
    loaded = nmgraph.load(path, model=given)  # no trust: the stored classes are not looked at
    assert loaded is given
    assert_same_state(loaded, model)


def test_module_of_a_foreign_package_is_not_loaded(path):
    nmgraph.save(nmgraph.convert(Encoder()), path)
    assert message(UntrustedError, nmgraph.load, path) == (
        f"the module in {path} names code outside the trusted packages, so nothing was loaded or run:\n  models.Encoder\n"
        "If you know where it comes from, import and run that code with --trust models (in Python: trust=['models'])."
    )


def test_model_with_other_layers_is_refused_with_the_differences(path):
    nmgraph.save(nmgraph.convert(mlp()), path)
    other = nn.Sequential(nn.Linear(18, 16), nn.Linear(16, 16, bias=False))
    assert message(FileError, nmgraph.load, path, model=other) == (
        f"{path} was made from another model than this Sequential:\n"
        "  1.weight is missing in the file\n"
        "  2.weight is not in the model\n"
        "  2.bias is not in the model\n"
        "  0.weight is 16x16 in the file, 16x18 in the model"
    )


def test_model_that_is_refused_stays_as_it_was(path):
    nmgraph.save(nmgraph.convert(mlp()), path)
    other = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    message(FileError, nmgraph.load, path, model=other)
    assert [type(m) for m in other] == [nn.Linear, nn.ReLU, nn.Linear]
    assert list(other.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_converted_model_is_not_loaded_into(path):
    nmgraph.save(nmgraph.convert(mlp()), path)
    text = message(FileError, nmgraph.load, path, model=nmgraph.convert(mlp()))
    assert "converted already" in text


def test_state_of_another_recipe_is_refused_by_name():
    state = nmgraph.convert(mlp(), method="lbc", pattern="1:4").state_dict()
    model = nmgraph.convert(mlp(), method="lbc", pattern="2:4")
    text = message(RuntimeError, model.load_state_dict, state)
    assert (
        "0 was trained as lbc 1:4, but this model is converted as lbc 2:4. Convert it the same way before loading."
    ) in text


def edited(path, **changes):
    nmgraph.save(nmgraph.convert(mlp()), path)
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save({key: value for key, value in content.items() if value is not ...}, path)
    return message(FileError, nmgraph.load, path)


def test_file_of_another_version_is_refused(path):
    assert edited(path, version=2) == (
        f"{path} has format version 2; this nmgraph reads version 1. Install the one that wrote it."
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"state": ...},
        {"recipes": ...},
        {"manifest": "no JSON"},
        {"manifest": "[]"},
        {"recipes": {"0": {}}},
        {"recipes": {"0": {"method": "gone", "options": {}, "pattern": "2:4", "reduction_axis": 1}}},
        {"recipes": {"0": {"method": "lbc", "options": {}, "pattern": "9:4", "reduction_axis": 1}}},
        {"recipes": 3},
        {"state": 3},
        {"module": 3},
        {"module": "text"},
        {"module": torch.zeros(8, dtype=torch.uint8)},
    ],
    ids=repr,
)
def test_file_with_a_damaged_part_is_refused(changes, path):
    text = edited(path, **changes)
    assert str(path) in text
    assert "damaged" in text or "can't be read" in text


def test_state_that_lacks_a_tensor_is_refused_by_name(path):
    nmgraph.save(nmgraph.convert(mlp()), path)
    content = torch.load(path, weights_only=True)
    del content["state"]["2.nm_mask"]
    torch.save(content, path)
    text = message(FileError, nmgraph.load, path)
    assert text.startswith(f"{path} does not fit Sequential: ")
    assert '"2.nm_mask"' in text


def test_pickled_module_is_no_nm_file(path):
    torch.save(mlp(), path)
    assert message(FileError, nmgraph.load, path) == (
        f"{path} is no converted model. Make one with nmgraph.convert and nmgraph.save, or `nmgraph convert {path}`."
    )


@pytest.mark.parametrize("finalized", [False, True])
def test_only_converted_models_are_saved(finalized, path):
    model = nmgraph.finalize(nmgraph.convert(mlp(), method="srste")) if finalized else mlp()
    assert message(FileError, nmgraph.save, model, path) == (
        "Sequential is not a converted model; save it with torch.save."
    )


def test_graph_is_not_stored(path):
    graph = nmgraph.convert(cnn(), mode="graph")
    assert message(FileError, nmgraph.save, graph, path) == (
        'a model converted with mode="graph" has no class to store. Save its state_dict(), and load that into a model '
        'converted in the same way; or convert with mode="auto".'
    )


def test_state_dict_of_a_graph_loads_into_a_graph_converted_in_the_same_way():
    x = torch.randn(2, 3, 8, 8)
    one = trained(nmgraph.convert(cnn(), mode="graph"), x)
    other = nmgraph.convert(cnn(), mode="graph")
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_interrupted_saving_keeps_the_file_that_was_there(path, monkeypatch):
    model = nmgraph.convert(mlp(), method="srste")
    nmgraph.save(model, path)
    before, write = path.read_bytes(), torch.save

    def interrupted(content, file):
        if isinstance(content, dict):
            write(content["state"]["0.weight"], file)
            raise KeyboardInterrupt
        write(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nmgraph.save(trained(model, torch.randn(4, 16)), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_again_replaces_the_file(path):
    model = nmgraph.convert(mlp(), method="srste")
    nmgraph.save(model, path)
    trained(model, torch.randn(4, 16))
    assert_same_state(saved_and_loaded(model, path), model)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_where_no_directory_is_says_so(tmp_path):
    path = tmp_path / "none" / "model.nm.pt"
    assert message(FileError, nmgraph.save, nmgraph.convert(mlp()), path) == (
        f"{path} can't be written: there is no directory {path.parent}. Make it first."
    )


def test_finalized_weights_of_a_loaded_model_verify(path):
    model = saved_and_loaded(nmgraph.convert(deit(), method="srste"), path)
    torch.save(nmgraph.finalize(model), path.with_name("final.pt"))
    assert nmgraph.verify(path.with_name("final.pt")).holds
    assert nmgraph.verify(path).holds
