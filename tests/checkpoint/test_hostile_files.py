"""Damaged and hostile files in numbers, and single ones that once got through; benchmarks/faults_files.py has more."""

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from commands import call
from models import mlp
from torch import nn

import nmgraph
from nmgraph.errors import FileError, UntrustedError

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))
import faults_files

RUN_WITHOUT_PROTECTION = (
    "os.system", "in a state_dict", "eval", "exec", "open", "subprocess", "module attribute", "in a module", "import",
    "GraphModule", "getattr", "older torch.save", "numpy in torch.save",
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def refusal(error, function, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize("name", faults_files.HOSTILE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hostile_file_is_refused_and_runs_nothing(name, tmp_path):
    assert faults_files.attacked(name, tmp_path) == []


@pytest.mark.parametrize("name", faults_files.HOSTILE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hostile_file_is_one_line_of_the_command(name, path):
    canary = path.parent / "canary"
    faults_files.HOSTILE[name](path, canary)
    sys.modules.pop("faults_imported", None)
    canary.unlink(missing_ok=True)
    for command in ("convert", "inspect", "status", "export", "verify"):
        result = call(command, path)
        assert (result.exit_code, result.stdout) == (2, ""), (command, result.output)
        assert result.stderr.startswith("error: ")
        assert isinstance(result.exception, SystemExit)
        assert not canary.exists()


@pytest.mark.parametrize("name", RUN_WITHOUT_PROTECTION)
def test_hostile_file_would_run(name, path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    canary = path.parent / "canary"
    faults_files.HOSTILE[name](path, canary)
    sys.modules.pop("faults_imported", None)
    canary.unlink(missing_ok=True)
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_damaged_files_are_refused_or_read_as_they_were():
    found = faults_files.mutations(600)
    assert found["wrong"] == []
    assert found["outcomes"]["refused"] > found["outcomes"]["read"] > 0


@pytest.mark.slow
def test_damaged_files_in_numbers():
    assert faults_files.mutations(20_000)["wrong"] == []


def test_constructor_of_a_layer_is_not_called(path, monkeypatch):
    made = []
    monkeypatch.setattr(nn.Linear, "__init__", lambda *arguments: made.append(arguments))
    for hostile in (
        faults_files.Runs(nn.Linear, 4, 4),
        faults_files.Runs(torch._tensor._rebuild_from_type_v2, nn.Linear, nn.Linear, (4, 4), {}),
    ):
        torch.save(hostile, path)
        assert refusal(UntrustedError, nmgraph.verify, path) == (
            f"{path} calls torch.nn.modules.linear.Linear as no saved model does, so nothing was loaded or run. Don't "
            "load it unless you made it; save the model's state_dict() instead."
        )
    assert made == []


def test_call_of_what_the_file_made_itself_is_refused(path):
    opcodes = b"cfunctools\npartial\n(ctorch.nn.modules.linear\nLinear\ntR(I4\nI4\ntR."
    faults_files.save_opcodes(opcodes.replace(b"I4\n", b"K\x04"))(path, path)
    assert "calls ? as no saved model does" in refusal(UntrustedError, nmgraph.verify, path)


def test_trusted_package_may_be_called(path, tmp_path, monkeypatch):
    (tmp_path / "called_here.py").write_text(
        "def build(size):\n    import torch\n    return torch.nn.Linear(size, 8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from called_here import build

    torch.save(faults_files.Runs(build, 16), path)
    assert nmgraph.verify(path, trust=["called_here"]).subject == "Linear"


def test_tensor_larger_than_its_file_is_refused(path):
    torch.save({"weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
    for read in (nmgraph.verify, lambda path: nmgraph.verify(path, model=nn.Linear(4, 4))):
        assert refusal(FileError, read, path) == (
            f"{path} can't be read: a tensor of the shape [1048576, 1048576] is more than the whole file holds. It may be "
            "truncated, or no file of torch.save."
        )


def test_members_larger_than_their_file_are_refused_before_they_are_read(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("model/data/0", bytes(1 << 24))
    assert refusal(FileError, nmgraph.verify, path) == (
        f"{path} is truncated or damaged: its members claim to be larger than the file. Save or copy it again."
    )


def test_member_that_claims_to_be_a_directory_is_refused(path):
    nmgraph.save(nmgraph.convert(mlp(), method="srste"), path)
    members = faults_files.members_of(path.read_bytes())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            told = zipfile.ZipInfo(name)
            told.external_attr = 0x10 if name.endswith("data/0") else 0
            archive.writestr(told, content)
    name = next(name for name in members if name.endswith("data/0"))
    assert refusal(FileError, nmgraph.load, path) == (
        f"{path} is truncated or damaged: {name} claims to be a directory. Save or copy it again."
    )


def edited(path, change, method="bimask"):
    """Save a converted model, and again with something changed in the content."""
    nmgraph.save(nmgraph.convert(mlp(), method=method), path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return refusal(FileError, nmgraph.load, path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["state"]["0.nm_permutation"].fill_(99), "is damaged: ValueError: the permutation of 0 is none."),
        (lambda c: c["recipes"]["0"].update(reduction_axis=7), "is damaged: ValueError: there is no reduction axis 7."),
        (lambda c: c["recipes"]["0"].update(pattern="2:5"), "does not fit Sequential: Error(s) in loading"),
        (
            lambda c: c["recipes"].update({"x.y.z": c["recipes"]["0"]}),
            "is damaged: x.y.z holds no weight to make sparse.",
        ),
        (lambda c: c.update(manifest="[" * 100_000), "is damaged: RecursionError: "),
        (
            lambda c: c["state"].update({"0.bias": "text"}),
            "was made from another model than this Sequential:\n  0.bias",
        ),
    ],
    ids=["permutation", "axis", "pattern", "site", "manifest", "state"],
)
def test_content_that_cannot_be_is_refused_by_name(change, reason, path):
    assert edited(path, change).startswith(f"{path} {reason}")


def test_module_that_lacks_its_parts_is_refused(path):
    for part in ("_buffers", "training"):
        model = nn.Sequential(nn.Linear(4, 4))
        del model[0].__dict__[part]
        torch.save(model, path)
        assert refusal(FileError, nmgraph.verify, path) == (
            f"{path} can't be read: 'Linear' object has no attribute '{part}'. It may be truncated, or no file of torch.save."
        )


ODD = {
    "no rows": (torch.zeros(0, 16), "it holds no values"),
    "no columns": (torch.zeros(16, 0), "it holds no values"),
    "large and empty": (torch.zeros(0, 1 << 40), "it holds no values"),
    "no place in the kernel": (torch.zeros(4, 4, 0, 3), "it holds no values"),
    "meta": (torch.zeros(8, 8, device="meta"), "it holds no values"),
    "scalar": (torch.tensor(1.0), "it has 0 axes"),
    "sparse": (torch.eye(8).to_sparse(), "it is stored as sparse_coo"),
}


@pytest.mark.parametrize("case", ODD)
def test_weight_that_cannot_be_checked_is_a_finding(case, path):
    weight, finding = ODD[case]
    layer = nn.Linear(8, 8)
    layer._parameters["weight"] = weight
    torch.save(layer, path)
    found = nmgraph.verify(path)
    assert not found.holds
    assert [check.finding for check in found.checks] == [finding]
    assert found.to_dict()["checks"][0]["little_gain"] == ""
    torch.save({"a.weight": weight}, path)
    assert not nmgraph.verify(path).holds


def test_weight_of_8_bits_is_checked(path):
    torch.save({"a.weight": torch.eye(8).to(torch.float8_e4m3fn)}, path)
    assert nmgraph.verify(path).holds


@pytest.mark.parametrize("case", ODD)
def test_state_that_cannot_be_loaded_is_refused(case, path):
    assert edited(path, lambda content: content["state"].update({"0.weight": ODD[case][0]})).startswith(f"{path} ")


def test_nested_tensor_is_refused(path):
    torch.save({"a.weight": torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)])}, path)
    assert "calls torch._utils._rebuild_nested_tensor" in refusal(UntrustedError, nmgraph.verify, path)


def test_member_that_claims_to_begin_beyond_the_file_is_refused(path):
    nmgraph.save(nmgraph.convert(mlp()), path)
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\x03\x04") + 29] |= 0xC0  # the length of what precedes the last member
    path.write_bytes(data)
    for function in (nmgraph.load, nmgraph.verify):
        assert "model.pt is truncated or damaged: EOFError. Save" in refusal(FileError, function, path)
