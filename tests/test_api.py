"""The front door from end to end: convert, train, save, load, finalize, export, verify."""

import pytest
import torch
from handles import nm
from models import Encoder, TiedLanguageModel, cnn, resnet
from torch import nn
from torch.nn import functional as F

import nmgraph

METHODS = sorted(nmgraph.METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_whole_way_from_a_dense_model_to_a_proved_file(method, tmp_path):
    model = nmgraph.convert(cnn(), method=method, example_inputs=torch.randn(2, 3, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = nmgraph.attach(model, optimizer, total_steps=6)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert controller.progress == 1.0

    nmgraph.save(model, tmp_path / "model.nm.pt")
    report = nmgraph.export(nmgraph.load(tmp_path / "model.nm.pt"), tmp_path / "export", safetensors=True)
    assert report.holds
    assert report.inputs == "2x3x8x8 (as at conversion)"
    for name in ("model.onnx", "model.safetensors"):
        assert nmgraph.verify(tmp_path / "export" / name).holds

    plain = cnn().eval()
    plain.load_state_dict(nmgraph.finalize(model).state_dict())
    assert torch.equal(plain(x), model.eval()(x))


@pytest.mark.parametrize("method", METHODS)
def test_two_models_train_beside_each_other(method):
    models = [nmgraph.convert(resnet(), method=method, pattern=pattern) for pattern in ("2:4", "1:4")]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        nmgraph.attach(model, optimizer, total_steps=2)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 32, 32)).square().mean().backward()
            optimizer.step()
    for model, pattern in zip(models, ("2:4", "1:4"), strict=True):
        found = nmgraph.verify(nmgraph.finalize(model))
        assert found.holds
        assert {c.pattern for c in found.checks if c.expected} == {pattern}


def test_configured_method_is_taken_as_it_is():
    method = nmgraph.METHODS["srste"](decay=0.0)
    model = nmgraph.convert(Encoder(), method=method)
    assert nm(model.head).told.method is method


def test_pattern_object_is_taken_as_it_is():
    model = nmgraph.convert(Encoder(), pattern=nmgraph.Pattern(1, 4), layers={"head": nmgraph.Pattern(4, 8)})
    assert {e.name: e.pattern for e in nmgraph.manifest(model).converted}["head"] == "4:8"


def test_models_of_tokens_train_with_a_dense_tied_head():
    model = nmgraph.convert(TiedLanguageModel(), method="srste", example_inputs=torch.randint(24, (2, 5)))
    tokens = torch.randint(24, (4, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.attach(model, optimizer, total_steps=1)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    assert nmgraph.verify(nmgraph.finalize(model)).holds
    assert model.head.weight is model.embedding.weight


def test_verify_reads_modules_paths_and_text(tmp_path):
    model = nmgraph.finalize(nmgraph.convert(nn.Linear(16, 8), method="srste"))
    torch.save(model, tmp_path / "model.pt")
    for subject in (model, tmp_path / "model.pt", str(tmp_path / "model.pt")):
        assert nmgraph.verify(subject).holds


def test_verify_takes_a_model_or_its_factory_for_files_without_one(tmp_path):
    nmgraph.save(nmgraph.convert(cnn(), method="srste"), tmp_path / "model.nm.pt", factory="models:cnn")
    assert nmgraph.verify(tmp_path / "model.nm.pt", model="models:cnn").holds
    assert nmgraph.verify(tmp_path / "model.nm.pt", model=cnn()).holds


def test_verify_of_a_state_dict_asks_the_model_which_tensors_are_weights(tmp_path):
    def make():
        return nn.Sequential(nn.Embedding(24, 16), nn.Linear(16, 8))

    finished = nmgraph.finalize(nmgraph.convert(make(), method="srste"))
    torch.save(finished.state_dict(), tmp_path / "state.pt")
    found = nmgraph.verify(tmp_path / "state.pt", model=make())
    assert [c.name for c in found.checks] == ["1"]
    assert found.holds


def test_every_error_of_ours_is_an_nmgraph_error():
    from nmgraph import errors

    kinds = [e for e in vars(errors).values() if isinstance(e, type)]
    assert len(kinds) == 10
    assert all(issubclass(kind, nmgraph.NMGraphError) for kind in kinds)
