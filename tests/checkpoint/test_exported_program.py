"""Exported programs (.pt2): code unless trusted, and trained only where their mode fixed nothing."""

import io
import os
import zipfile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.checkpoint.dense_file import read_dense
from nmgraph.errors import FileError, UntrustedError

TRUST = ["torch.export"]


def export(model, path, *inputs, train=False, dynamic=True):
    shapes = tuple({0: torch.export.Dim("batch", min=1, max=64)} for _ in inputs) if dynamic else None
    torch.export.save(torch.export.export(model.train(train), inputs, dynamic_shapes=shapes), path)


def plain():
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pt2"


@pytest.fixture
def x():
    return torch.randn(4, 16)


def message(path, error=FileError, trust=TRUST):
    with pytest.raises(error) as caught:
        read_dense(path, trust=trust)
    assert type(caught.value) is error
    return str(caught.value)


def test_program_is_code_unless_trusted(path, x):
    export(plain(), path, x)
    assert message(path, UntrustedError, trust=()) == (
        f"{path} is an exported program (torch.export.save). Reading one can run code that it holds, so nothing was "
        "loaded or run. If you made it, allow that with --trust torch.export (in Python: trust=['torch.export'])."
    )


class Exploit:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_program_with_a_pickle_in_it_runs_it_only_if_trusted(path, x, tmp_path):
    """Why trust is asked for: if torch stops doing this, the page on models can be milder."""
    export(plain(), path, x)
    canary, pickle = tmp_path / "canary", io.BytesIO()
    torch.save(Exploit(str(canary)), pickle)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, pickle.getvalue() if "sample_inputs" in name else data)
    message(path, UntrustedError, trust=())
    with pytest.raises(FileError):
        nmgraph.load(path)
    assert not canary.exists()
    message(path)
    assert canary.exists()


def test_program_opens_as_a_module_that_trains(path, x):
    model = plain()
    export(model, path, x)
    dense = read_dense(path, trust=TRUST)
    assert dense.factory == str(path)
    assert torch.equal(dense.model(x[:3]), model(x[:3]))
    assert dense.model.train().training
    assert not dense.model.eval().training
    dense.model(x).sum().backward()
    assert all(p.grad is not None for p in dense.model.parameters())


def test_program_is_known_by_its_content(x, tmp_path):
    export(plain(), tmp_path / "net.pt2", x)
    (tmp_path / "net.pt2").rename(tmp_path / "net.pt")
    assert "is an exported program" in message(tmp_path / "net.pt", UntrustedError, trust=())
    assert isinstance(read_dense(tmp_path / "net.pt", trust=TRUST).model, torch.fx.GraphModule)


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.qkv, self.dropout = nn.Linear(16, 48), dropout

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(-1, 3, 1, 4, 4).unbind(1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x):
        return self.layer(x) + torch.rand_like(x[:, :8])


DROPOUT = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.5))
NORM = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))


@pytest.mark.parametrize(
    ("model", "train", "reason"),
    [
        (DROPOUT, False, "dropout is switched off for good (dropout)"),
        (DROPOUT, True, "dropout is drawn in evaluation, too (dropout)"),
        (NORM, False, "batch norm is fixed to running statistics, which would never move (batch_norm)"),
        (NORM, True, "batch norm is fixed to its batches (batch_norm)"),
        (Attention(0.5), True, "attention's dropout is drawn in evaluation, too (scaled_dot_product_attention)"),
        (Noise(), False, "it draws random numbers in training and evaluation alike (rand_like)"),
    ],
)
def test_program_that_its_mode_fixed_is_refused(model, train, reason, path, x):
    export(model, path, x, train=train)
    assert message(path) == (
        f"{path} can't be trained as the model it was exported from: {reason}. Save the Python model instead: "
        "torch.save(model, ...)."
    )


def test_norm_is_found_after_decomposition_too(path, x):
    torch.export.save(torch.export.export(NORM.eval(), (x,)).run_decompositions(), path)
    assert "batch norm is fixed to running statistics" in message(path)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.0)), Attention(0.5)])
def test_operators_that_drop_nothing_are_fine(model, path, x):
    export(model, path, x)
    assert isinstance(read_dense(path, trust=TRUST).model, torch.fx.GraphModule)


def test_damaged_program_says_so(path, x):
    export(plain(), path, x)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[: len(data) // 2] if name.endswith("model.json") else data)
    text = message(path)
    assert text.startswith(f"{path} can't be read: ")
    assert text.endswith("Export it again with this version of torch.")


def test_program_is_trained_saved_and_read_again(path, x, tmp_path):
    export(plain(), path, x)
    model = nmgraph.convert(read_dense(path, trust=TRUST).model, method="srste")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.attach(model, optimizer, total_steps=2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    file = tmp_path / "net.nm.pt"
    nmgraph.save(model, file, factory=str(path))
    with pytest.raises(FileError) as caught:
        nmgraph.load(file)
    assert str(caught.value) == (
        f"{file} was made with --model {path}. Making the model runs that code, so name it again: --model {path} "
        f"--trust torch.export, or in Python model={str(path)!r}, trust=['torch.export']."
    )
    again = nmgraph.load(file, model=str(path), trust=TRUST)
    assert torch.equal(again(x), model(x))
    finished = nmgraph.finalize(again)
    assert torch.equal(finished(x), model(x))
    assert nmgraph.verify(finished).holds
