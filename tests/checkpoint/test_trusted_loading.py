"""A pickle is code: what is not trusted is neither imported nor run."""

import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import pytest
import timm
import torch
import torchvision
from models import cnn
from torch import nn

import nmgraph
from nmgraph.checkpoint.trusted import load_trusted
from nmgraph.errors import FileError, MissingPackageError, UntrustedError


def message(error, path, **options):
    with pytest.raises(error) as caught:
        load_trusted(path, "model.pt", **options)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.mark.parametrize(
    "make",
    [
        torchvision.models.resnet18,
        lambda: timm.create_model("deit_tiny_patch16_224", drop_path_rate=0.1),
        torchvision.models.convnext_tiny,
        lambda: timm.create_model("efficientnet_b0"),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True), 2),
        lambda: nn.LSTM(8, 8),
    ],
    ids=["resnet18", "deit_tiny", "convnext_tiny", "efficientnet_b0", "TransformerEncoder", "LSTM"],
)
def test_pickled_library_models_load_bit_equal(make, path):
    model = make()
    torch.save(model, path)
    loaded = load_trusted(path, "model.pt")
    assert type(loaded) is type(model)
    before, after = model.state_dict(), loaded.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickle_that_runs_a_command_is_refused_and_not_run(path, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"state_dict": Exploit(f"touch {canary}")}, path)
    assert message(UntrustedError, path) == (
        "model.pt names code outside the trusted packages, so nothing was loaded or run:\n  posix.system\n"
        "That can run any code. Don't load it unless you made it; save the model's state_dict() instead."
    )
    assert not canary.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(S'%s'\nios\nsystem\n.",
        b"(cos\nsystem\nS'%s'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x00S'%s'\n\x85R.",
        b"cos\nsystem\n(S'%s'\ntR.",
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'%s'\ntR.",
    ],
    ids=["INST", "OBJ", "STACK_GLOBAL", "REDUCE", "getattr"],
)
def test_no_opcode_of_a_pickle_runs_a_command(opcodes, path, tmp_path):
    canary = tmp_path / "canary"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", opcodes % f"touch {canary}".encode())
        archive.writestr("model/version", "3\n")
        archive.writestr("model/byteorder", "little")
    with pytest.raises(FileError):
        load_trusted(path, "model.pt")
    assert not canary.exists()


def test_all_foreign_names_are_listed(path):
    torch.save([nn.ReLU(), Exploit("true"), shutil.rmtree, shutil.copy, partial(print)], path)
    assert message(UntrustedError, path) == (
        "model.pt names code outside the trusted packages, so nothing was loaded or run:\n"
        "  builtins.print\n  posix.system\n  shutil.copy\n  shutil.rmtree\n"
        "That can run any code. Don't load it unless you made it; save the model's state_dict() instead."
    )


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A model whose package leaves a canary when it is imported."""
    package = tmp_path / "site" / "foreign_package"
    package.mkdir(parents=True)
    canary = tmp_path / "canary"
    (package / "__init__.py").write_text(f"open({str(canary)!r}, 'a').write('imported')\n")
    (package / "nets.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    pass\n\ndef helper(x):\n    return x\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    from foreign_package.nets import Net

    path = tmp_path / "foreign.pt"
    torch.save(Net(nn.Linear(4, 4)), path)
    for name in ("foreign_package", "foreign_package.nets"):
        del sys.modules[name]
    canary.unlink()
    yield path, canary
    for name in ("foreign_package", "foreign_package.nets"):
        sys.modules.pop(name, None)


def test_foreign_package_is_not_even_imported(foreign):
    path, canary = foreign
    assert message(UntrustedError, path) == (
        "model.pt names code outside the trusted packages, so nothing was loaded or run:\n  foreign_package.nets.Net\n"
        "If you know where it comes from, import and run that code with --trust foreign_package "
        "(in Python: trust=['foreign_package'])."
    )
    assert not canary.exists()
    assert "foreign_package" not in sys.modules


def test_trusted_package_is_imported_and_loaded(foreign):
    path, canary = foreign
    model = load_trusted(path, "model.pt", trust=["foreign_package"])
    assert type(model).__name__ == "Net"
    assert canary.read_text() == "imported"


def test_trust_is_for_whole_package_names(foreign):
    path, canary = foreign
    assert "foreign_package.nets.Net" in message(UntrustedError, path, trust=["foreign", "foreign_pack", "nets"])
    assert not canary.exists()


def test_trust_of_one_load_does_not_outlive_it(foreign):
    path, _ = foreign
    load_trusted(path, "model.pt", trust=["foreign_package"])
    assert "foreign_package.nets.Net" in message(UntrustedError, path)


class Named:
    """Pickles as a reference to any name, called with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.init.zeros_, "torch.nn.init.zeros_"),
        (torchvision.models.get_model, "torchvision.models._api.get_model"),
        (timm.create_model, "timm.models._factory.create_model"),
    ],
)
def test_functions_of_trusted_packages_are_no_layer_classes(function, name, path):
    torch.save(Named(function, "resnet18"), path)
    assert message(UntrustedError, path) == (
        f"model.pt names {name}, which is no layer class, so nothing was loaded or run. If you know where the file "
        f"comes from, allow it with --trust {name.partition('.')[0]}."
    )


def save_linear_under(name, path):
    """Write a pickled nn.Linear whose class has another name."""
    torch.save(nn.Linear(2, 2), path)
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data.replace(b"torch.nn.modules.linear\nLinear\n", name))


def test_what_a_trusted_module_imports_is_not_reached_through_it(path):
    save_linear_under(b"torch.nn.modules.module\nwarnings\n", path)
    assert message(UntrustedError, path) == (
        "model.pt names torch.nn.modules.module.warnings, which is no layer class, so nothing was loaded or run. "
        "If you know where the file comes from, allow it with --trust torch."
    )


def test_package_that_is_not_installed_is_named(path):
    save_linear_under(b"transformers.models.gone\nLinear\n", path)
    assert message(MissingPackageError, path) == (
        "the model needs the package transformers, which could not be imported: No module named 'transformers.models.gone'. "
        "Install it, in a version that fits your torch."
    )


def test_class_that_the_installed_version_does_not_have_is_named(path):
    save_linear_under(b"torch.nn.modules.linear\nNextYearsLinear\n", path)
    assert message(FileError, path) == (
        "model.pt needs torch.nn.modules.linear.NextYearsLinear, which the installed torch does not have. "
        "Install the version it was saved with."
    )


def test_model_of_a_script_says_why_it_cannot_be_found_again(path, tmp_path):
    script = f"import torch\nclass Net(torch.nn.Linear):\n    pass\ntorch.save(Net(4, 4), {str(path)!r})\n"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert message(UntrustedError, path) == (
        "model.pt names code outside the trusted packages, so nothing was loaded or run:\n  __main__.Net\n"
        "Classes of __main__ belong to the script that saved them, and can't be found again. Move them to a module, "
        "or save model.state_dict() and say what makes the model: --model package.module:function."
    )


def test_converted_model_pickled_whole_is_told_to_be_saved(path):
    torch.save(nmgraph.convert(cnn()), path)
    assert message(UntrustedError, path).endswith(
        "It seems to be a converted model, pickled whole: write it with nmgraph.save(model, path) instead."
    )
