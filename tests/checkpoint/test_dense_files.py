"""What people have as a model: whole modules, state_dicts with a factory, and files that are neither."""

import sys
import zipfile

import pytest
import timm
import torch
import torchvision
from models import cnn, mlp
from torch import nn

import nmgraph
from nmgraph.checkpoint.dense_file import open_dense, state_of
from nmgraph.errors import FileError, MissingPackageError


def message(error, path, **options):
    with pytest.raises(error) as caught:
        open_dense(path, **options)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Write a module that factories can be named in."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text, name="made_here"):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    sys.modules.pop("made_here", None)


@pytest.mark.parametrize(
    "make",
    [torchvision.models.resnet18, lambda: timm.create_model("deit_tiny_patch16_224")],
    ids=["torchvision resnet18", "timm deit_tiny"],
)
def test_pickled_module_opens_bit_equal_and_converts(make, path):
    model = make().eval()
    torch.save(model, path)
    opened, x = open_dense(path), torch.randn(1, 3, 224, 224)
    assert type(opened) is type(model)
    with torch.no_grad():
        assert torch.equal(opened(x), model(x))
    assert nmgraph.manifest(nmgraph.convert(opened)).coverage > 0.9


def test_state_dict_opens_with_its_factory(path):
    model = torchvision.models.squeezenet1_1()
    torch.save(model.state_dict(), path)
    opened = open_dense(path, factory="torchvision.models:squeezenet1_1")
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), model.parameters(), strict=True))


def test_state_dict_alone_asks_for_its_factory(path):
    torch.save(mlp().state_dict(), path)
    assert message(FileError, path) == (
        f"{path} holds a state_dict (4 tensors) without its model. Say what makes the model: "
        "--model package.module:function, timm:NAME or torchvision:NAME."
    )


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_state_dict_is_found_in_a_training_checkpoint(key, path):
    model = mlp()
    torch.save({"epoch": 3, key: model.state_dict(), "optimizer": {"state": {}, "param_groups": []}}, path)
    assert torch.equal(open_dense(path, factory="models:mlp")[0].weight, model[0].weight)


def test_tensor_beside_the_state_dict_is_not_taken_for_a_weight(path):
    model = mlp()
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "best_acc1": torch.tensor(71.2)}, path)
    assert torch.equal(open_dense(path, factory="models:mlp")[0].weight, model[0].weight)


def test_state_dict_of_another_model_is_refused_by_name(path):
    torch.save(mlp().state_dict(), path)
    text = message(FileError, path, factory="models:cnn")
    assert text.startswith(f"{path} does not fit Sequential: ")
    assert '"3.weight"' in text


def test_whole_module_needs_no_factory(path):
    torch.save(mlp(), path)
    assert message(FileError, path, factory="models:mlp") == (
        f"{path} holds a whole Sequential; leave --model models:mlp away."
    )


def test_converted_model_is_not_opened_as_a_dense_one(path):
    nmgraph.save(nmgraph.convert(mlp()), path)
    assert message(FileError, path) == (
        f"{path} is converted already. Train it, or export it with `nmgraph export {path}`."
    )


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("models.mlp", "'models.mlp' does not name a function. Write --model package.module:function."),
        ("models:mlp()", "'models:mlp()' does not name a function. Write --model package.module:function."),
        ("models:resnet99", "models:resnet99: models has no resnet99."),
        ("models:torch", "models:torch is a module, not a function that makes the model."),
        (
            "models:WithBranchingPart.forward",
            "models:WithBranchingPart.forward failed when called without arguments: TypeError: "
            "WithBranchingPart.forward() missing 2 required positional arguments: 'self' and 'x'.",
        ),
        ("torch:tensor", None),
        ("builtins:dict", "builtins:dict gave a dict; it must give a torch.nn.Module."),
    ],
)
def test_factory_that_makes_no_model_says_so(factory, text, path):
    torch.save(mlp().state_dict(), path)
    found = message(FileError, path, factory=factory)
    assert found == text or (text is None and found.startswith("torch:tensor failed when called without arguments: "))


def test_factory_whose_module_is_missing_says_so(path):
    torch.save(mlp().state_dict(), path)
    assert message(MissingPackageError, path, factory="no_such_module:make") == (
        "no_such_module:make: no_such_module could not be imported: No module named 'no_such_module'."
    )


def test_factory_whose_module_fails_says_so(path, code):
    torch.save(mlp().state_dict(), path)
    name = code("raise RuntimeError('needs a GPU')")
    assert message(MissingPackageError, path, factory=f"{name}:make") == (
        "made_here:make: made_here could not be imported: needs a GPU."
    )


def test_factory_may_be_an_attribute_of_a_class(path, code):
    torch.save(mlp().state_dict(), path)
    name = code("import models\n\nclass Zoo:\n    small = staticmethod(models.mlp)\n")
    assert isinstance(open_dense(path, factory=f"{name}:Zoo.small"), nn.Sequential)


NOT_A_MODEL = "{path} is not a model file: save one with torch.save(model, ...) or nmgraph.save(model, ...)."
UNREADABLE = "{path} can't be read: "


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "{path} is empty."),
        (b"PK", NOT_A_MODEL),
        (b"hello, I am a text file", NOT_A_MODEL),
        (b"\x89PNG\r\n\x1a\n", NOT_A_MODEL),
    ],
)
def test_file_of_another_kind(content, text, path):
    path.write_bytes(content)
    assert message(FileError, path) == text.format(path=path)


def test_truncated_pickle_says_so(path):
    path.write_bytes(b"\x80\x02}q\x00")
    text = message(FileError, path)
    assert text.startswith(f"{path} is a plain pickle, or in an older format of torch.save. ")


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.999])
def test_truncated_file_says_so(share, path):
    torch.save(cnn(), path)
    content = path.read_bytes()
    path.write_bytes(content[: max(4, int(len(content) * share))])
    assert message(FileError, path) == (
        f"{path} is truncated or damaged: File is not a zip file. Save or copy it again."
    )


def test_damaged_file_says_so(path):
    torch.save(cnn(), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[: len(data) // 2] if name.endswith("data.pkl") else data)
    text = message(FileError, path)
    assert text.startswith(f"{path} can't be read: ")
    assert "\n" not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_told_apart(path):
    torch.jit.save(torch.jit.script(nn.Linear(4, 4)), path)
    assert message(FileError, path) == (
        f"{path} is TorchScript, whose layers can't be trained sparse. Save the Python model with torch.save(model, ...)."
    )


def test_zip_of_something_else(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no model")
    assert message(FileError, path) == f"{path} is a zip archive, but not one of torch.save."


def test_directory(tmp_path):
    assert message(FileError, tmp_path) == (
        f"{tmp_path} is a directory; give a model's file, or a Hugging Face directory with config.json."
    )


def test_missing_file(path):
    assert message(FileError, path) == f"{path} does not exist."


def test_older_format_of_torch_says_how_to_convert_it(path):
    torch.save(mlp(), path, _use_new_zipfile_serialization=False)
    text = message(FileError, path)
    assert "older format" in text
    assert "truncated" not in text


@pytest.mark.parametrize(
    ("content", "kind"), [([1, 2], "list"), (torch.zeros(3), "Tensor"), ({"epoch": 3}, "dict"), ("text", "str")]
)
def test_other_content_is_named(content, kind, path):
    torch.save(content, path)
    assert message(FileError, path) == f"{path} holds a {kind}: neither a module nor a state_dict."


def test_state_dict_keeps_its_order(path):
    state = mlp().state_dict()
    assert list(state_of({"state_dict": state}, path)) == list(state)
