"""What may train on sparse tensor cores, and what is said of it."""

import pickle
from io import StringIO

import pytest
import stand_in
import torch
from rich.console import Console
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError
from nmgraph.layers import probe
from nmgraph.layers.masked import AcceleratedMasked
from nmgraph.layers.probe import Timing
from nmgraph.passes import hardware


@pytest.fixture
def kernels(no_timings, monkeypatch):
    monkeypatch.setattr(hardware, "_FEW", 0)
    with stand_in.kernels() as calls:
        yield calls


def reasons(model):
    return {layer.name: layer.reason for layer in nmgraph.hardware(model).layers}


def train(model, rows=16, **convert):
    model = nmgraph.convert(model, **convert)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    controller = nmgraph.attach(model, optimizer, total_steps=4)
    width = next(model.parameters()).shape[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(rows, width)).sum().backward()
    optimizer.step()
    return model, controller


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is what it is about")
def test_without_a_gpu_layers_are_as_they_were_and_the_report_says_why():
    model = nmgraph.convert(nn.Sequential(nn.Linear(32, 32)), method="tmask")
    assert not isinstance(model[0], AcceleratedMasked)
    assert reasons(model) == {"0": "torch sees no NVIDIA GPU"}


def test_a_layer_that_was_told_so_says_so_on_any_machine():
    model = nmgraph.convert(nn.Sequential(nn.Linear(32, 32)), method="tmask", hardware="off")
    assert not isinstance(model[0], AcceleratedMasked)
    assert reasons(model) == {"0": 'it was converted or loaded with hardware="off"'}


def test_layers_that_are_dense_for_one_reason_are_one_line():
    model = nmgraph.convert(nn.Sequential(*(nn.Linear(32, 32) for _ in range(40))), method="tmask", hardware="off")
    console = Console(width=120, record=True, file=StringIO())
    console.print(nmgraph.hardware(model))
    shown = console.export_text()
    assert "0 and 39 more" in shown
    assert len(shown.splitlines()) < 8


def test_what_is_no_module_is_named():
    with pytest.raises(ConversionError, match="a str is no module"):
        nmgraph.hardware("model.nm.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is what it is about")
def test_force_without_a_gpu_is_refused_and_the_model_left_as_it_was():
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ConversionError, match="torch sees no NVIDIA GPU") as refused:
        nmgraph.convert(model, hardware="force")
    assert '"auto"' in str(refused.value)
    assert type(model[0]) is nn.Linear


def test_a_mode_that_does_not_exist_is_named_and_the_model_left_as_it_was():
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ConversionError, match=r"hardware='on'.*'auto', 'off', 'force'"):
        nmgraph.convert(model, hardware="on")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(("layer", "options", "reason"), [
    (nn.Linear(40, 32), {}, "32x40 are not both multiples of 16"),
    (nn.Linear(32, 24), {}, "24x32 are not both multiples of 16"),
    (nn.Linear(32, 32), {"pattern": "4:8"}, "4:8 may keep more than 2 of 4"),
    (nn.Conv2d(32, 32, 3), {}, "only Linear layers and 1x1 convolutions are products of two matrices"),
    (nn.ConvTranspose2d(32, 32, 1), {}, "only Linear layers and 1x1 convolutions are products of two matrices"),
    (nn.Conv2d(32, 32, 1, padding=1), {}, "its convolution has groups or padding"),
    (nn.Conv2d(64, 32, 1, groups=2), {"include": ["*"]}, "its convolution has groups or padding"),
    (nn.MultiheadAttention(32, 4), {}, "no layer of its own multiplies by it"),
    (nn.Linear(32, 32), {"hardware": "off"}, 'it was converted or loaded with hardware="off"'),
    (nn.Linear(32, 32), {}, "no optimizer is attached"),
    (nn.Linear(32, 32), {"pattern": "1:4"}, "no optimizer is attached"),
    (nn.Conv2d(32, 32, 1, padding="same", stride=1), {}, "no optimizer is attached"),
])  # fmt: skip
def test_every_layer_that_does_not_take_part_has_its_reason(layer, options, reason, kernels):
    model = nmgraph.convert(nn.Sequential(layer), method="srste", **options)
    assert reason in reasons(model).values()


def test_layers_too_small_to_pay_are_left_alone_unless_forced(kernels, monkeypatch):
    monkeypatch.undo()
    for mode, reason in (
        ("auto", "its 1,024 weights are too few to pay for the call"),
        ("force", "no optimizer is attached"),
    ):
        model = nmgraph.convert(nn.Sequential(nn.Linear(32, 32)), method="srste", hardware=mode)
        assert reasons(model) == {"0": reason}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_keeps_it(kernels):
    model = nmgraph.convert(nn.Sequential(Doubled(32, 32)), method="srste", hardware="force")
    assert reasons(model) == {"0": "Doubled has a forward of its own"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is what it is about")
def test_a_model_from_a_gpu_that_is_trained_without_one_says_so():
    with stand_in.kernels():
        pickled = pickle.dumps(nmgraph.convert(nn.Sequential(nn.Linear(32, 32)), method="tmask", hardware="force"))
    model = pickle.loads(pickled)
    nmgraph.attach(model, torch.optim.SGD(model.parameters(), 0.01), total_steps=4)
    assert reasons(model) == {"0": "torch sees no NVIDIA GPU"}


def test_masks_that_are_not_2_4_yet_are_said(kernels):
    model, _ = train(nn.Sequential(nn.Linear(32, 32)), method="lbc")
    assert reasons(model) == {"0": "its masks are not 2:4 yet"}


def test_the_report_shows_what_was_chosen_and_what_it_gains(kernels, monkeypatch):
    def measure(product, device):
        return Timing(2.0, 1.0, gather=0.9 if product.gathers else 0.0, prepare=0.25)

    monkeypatch.setattr(probe, "measure", measure)
    model, _ = train(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 48)), method="bimask", rows=20)
    report = nmgraph.hardware(model)
    assert str(report) == "2 of 2 sparse layers train on sparse tensor cores"
    first = report.layers[0]
    assert (first.name, first.shape, first.rows, first.dtype) == ("0", (32, 64), 32, "bfloat16")
    assert (first.forward.sparse, first.input_gradient.sparse) == (True, False)
    assert "permute=False, or tmask" in first.input_gradient.reason
    assert first.gain == pytest.approx(4.0 / 3.25)
    assert report.to_dict()["layers"][0]["gain"] == first.gain
    for width in (60, 200):
        console = Console(width=width, record=True, file=StringIO())
        console.print(report)
        shown = console.export_text()
        assert "1.23x" in shown
        assert max(map(len, shown.splitlines())) <= width


def test_a_loaded_model_may_use_them_again(kernels, tmp_path):
    model, _ = train(nn.Sequential(nn.Linear(32, 32)), method="tmask", hardware="off")
    assert not isinstance(model[0], AcceleratedMasked)
    nmgraph.save(model, tmp_path / "model.nm.pt")
    for mode, able in (("auto", True), ("force", True), ("off", False)):
        again = nmgraph.load(tmp_path / "model.nm.pt", hardware=mode)
        assert isinstance(again[0], AcceleratedMasked) == able
    with pytest.raises(ConversionError, match="hardware='on'"):
        nmgraph.load(tmp_path / "model.nm.pt", hardware="on")


def test_a_trained_model_is_finalized_and_exported_as_ever(kernels, tmp_path):
    model, _ = train(nn.Sequential(nn.Linear(32, 32)), method="tmask", hardware="force")
    finished = nmgraph.finalize(model)
    assert type(finished[0]) is nn.Linear
    assert nmgraph.export(model, tmp_path / "out", example_inputs=torch.randn(4, 32)).parity.holds


def test_the_report_looks_through_wrappers_and_asks_for_a_converted_model(kernels):
    model, _ = train(nn.Sequential(nn.Linear(32, 32)), method="tmask", hardware="force")
    assert len(nmgraph.hardware(torch.compile(model, backend="eager")).sparse) == 1
    with pytest.raises(ConversionError):
        nmgraph.hardware(nn.Linear(4, 4))
