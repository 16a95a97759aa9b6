"""What the exporter writes for real networks, proved on the file and compared in ONNX Runtime and with Polygraphy."""

import copy
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import Branching, Encoder, Recorder, cnn, convnext, mlp, swin
from onnx import numpy_helper
from polygraphy.tools.sparse import SparsityPruner
from torch import nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

import nmgraph
from nmgraph.errors import ExportError
from nmgraph.export import onnx_file
from nmgraph.export.bundle import ExportReport
from nmgraph.export.inputs import Inputs, make_inputs
from nmgraph.export.parity import compare
from nmgraph.export.proof import load_onnx, verify_onnx

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in cast:RuntimeWarning", "ignore::FutureWarning:copyreg"
)


class EveryProduct(nn.Module):
    """One layer per way a weight is written: Conv with a norm to fold, MatMul (3-D input, large), Gemm (2-D input)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.wide, self.narrow = nn.Linear(768, 1024), nn.Linear(1024, 16)
        self.classes, self.boxes = nn.Linear(12 * 16, 8), nn.Linear(12 * 16, 4)

    def forward(self, x):
        x = self.norm(self.conv(torch.relu(self.stem(x)))).relu()
        x = self.narrow(self.wide(x.flatten(2).repeat(1, 1, 12)).relu()).flatten(1)
        return {"classes": self.classes(x), "boxes": self.boxes(x)}


@dataclass
class Exported:
    report: ExportReport
    finished: nn.Module
    inputs: Inputs

    @property
    def path(self):
        return self.report.directory / "model.onnx"


def export(model, directory, example_inputs, **options):
    torch.manual_seed(0)
    converted = nmgraph.convert(model.eval(), method="srste", **options)
    report = nmgraph.export(converted, directory, example_inputs=example_inputs)
    return Exported(report, nmgraph.finalize(converted).eval(), make_inputs(example_inputs))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    return export(EveryProduct(), tmp_path_factory.mktemp("every") / "export", torch.randn(2, 3, 8, 8))


def tampered(path, initializer, position, value, to):
    """Change one weight of an ONNX file."""
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == initializer)
    values = numpy_helper.to_array(tensor).copy()
    values[position] = value
    tensor.CopyFrom(numpy_helper.from_array(values, initializer))
    onnx.save(model, to)
    return to


def initializer_of(path, site):
    """Find the initializer of a site by its content, straight or transposed."""
    weight = site.weight.detach().numpy()
    for tensor in onnx.load(path).graph.initializer:
        values = numpy_helper.to_array(tensor)
        if any(np.array_equal(values, w) for w in (weight, weight.T)):
            return tensor.name
    raise LookupError


def test_every_kind_of_product_is_proved_on_its_axis(exported):
    found = {
        c.name: (c.kind, c.shape, c.holds, c.density, c.tensorrt) for c in exported.report.onnx.checks if c.expected
    }
    assert found == {
        "conv": ("Conv", (12, 16, 3, 3), True, 0.5, ""),
        "wide": ("MatMul", (768, 1024), True, 0.5, ""),
        "narrow": ("MatMul", (1024, 16), True, 0.5, ""),
        "classes": ("Gemm", (8, 192), True, 0.5, ""),
        "boxes": ("Gemm", (4, 192), True, 0.5, ""),
    }
    assert exported.report.holds


def test_layer_left_dense_is_listed_with_the_reason(exported):
    dense = [(c.name, c.kind, c.finding) for c in exported.report.onnx.checks if not c.expected]
    assert dense == [("stem.weight", "Conv", "3 input channels are not a multiple of 4")]


def test_norm_was_folded_and_no_mask_is_left_in_the_graph(exported):
    operators = {node.op_type for node in onnx.load(exported.path).graph.node}
    assert operators.isdisjoint({"BatchNormalization", "Mul", "Where", "TopK", "Transpose"})


def test_onnx_runtime_agrees_with_the_finalized_model(exported):
    assert exported.report.parity.tolerance == 1e-4
    assert [o.name for o in exported.report.parity.outputs] == [o.name for o in onnx.load(exported.path).graph.output]
    assert 0 < exported.report.parity.worst < 1e-5


def test_file_carries_its_manifest_and_verifies_alone(exported):
    found = nmgraph.verify(exported.path)
    assert found.holds
    assert found.checks == exported.report.onnx.checks
    assert str(found) == "5 of 5 weights hold; 5 ready for 2:4 sparse tactics"


def test_file_verifies_without_its_manifest(exported):
    model = load_onnx(exported.path)
    del model.metadata_props[:]
    found = verify_onnx(model, "bare")
    assert found.holds
    assert sum(c.expected for c in found.checks) == 5


def test_file_does_not_hold_a_pattern_it_was_not_pruned_to(exported):
    found = nmgraph.verify(exported.path, "1:4")
    assert {c.name for c in found.failures} == {"conv", "wide", "narrow", "classes", "boxes"}


@pytest.mark.parametrize("site", ["conv", "wide", "narrow", "classes", "boxes"])
def test_single_weight_changed_in_the_file_is_found_by_the_proof(exported, site, tmp_path):
    layer = exported.finished.get_submodule(site)
    if site == "conv":
        name = "conv.weight"
        values = numpy_helper.to_array(next(t for t in onnx.load(exported.path).graph.initializer if t.name == name))
    else:
        name = initializer_of(exported.path, layer)
        values = numpy_helper.to_array(next(t for t in onnx.load(exported.path).graph.initializer if t.name == name))
    position = tuple(np.argwhere(values == 0)[7])
    found = nmgraph.verify(tampered(exported.path, name, position, 0.5, tmp_path / "model.onnx"))
    assert [c.name for c in found.failures] == [site]
    assert found.failures[0].finding.endswith("keeps 3 of 4")


@pytest.mark.parametrize(("site", "first"), [("classes", 0), ("boxes", 1), ("wide", 0)])
def test_first_diverging_output_of_a_changed_file_is_named(exported, site, first, tmp_path):
    name = initializer_of(exported.path, exported.finished.get_submodule(site))
    values = numpy_helper.to_array(next(t for t in onnx.load(exported.path).graph.initializer if t.name == name))
    position = tuple(np.argwhere(values != 0)[3])
    path = tampered(exported.path, name, position, 9.0, tmp_path / "model.onnx")
    parity = compare(exported.finished, path, exported.inputs, torch.float32)
    assert not parity.holds
    assert parity.diverging is parity.outputs[first]
    assert str(parity).startswith(f"output {parity.outputs[first].name} is off by ")
    assert str(parity).endswith("(accepted: 1e-04)")


def test_report_does_not_hold_when_its_parity_does_not(exported, tmp_path):
    name = initializer_of(exported.path, exported.finished.boxes)
    path = tampered(exported.path, name, (0, 0), 9.0, tmp_path / "model.onnx")
    parity = compare(exported.finished, path, exported.inputs, torch.float32)
    report = replace(exported.report, parity=parity)
    assert not report.holds
    assert str(report) == f"A CHECK DID NOT HOLD: {exported.report.directory}"
    assert report.to_dict()["holds"] is False


def polygraphy_sparse(path):
    """Ask Polygraphy which initializers are 2:4 along the axis that it finds."""
    pruner = SparsityPruner(onnx.load(path))
    pruner.check()
    return pruner.sparse_tensors


def nmgraph_sparse(path):
    """Ask nmgraph which initializers are ready for sparse tactics, with their own names."""
    model = load_onnx(path)
    del model.metadata_props[:]
    return {c.name for c in verify_onnx(model, "bare").checks if not c.tensorrt}


def test_polygraphy_command_lists_the_same_sparse_tensors(exported):
    command = str(Path(sys.executable).with_name("polygraphy"))
    ran = subprocess.run([command, "inspect", "sparsity", exported.path], capture_output=True, text=True, check=True)
    listed = {line.rpartition(": ")[2].strip() for line in ran.stdout.splitlines() if "Found sparse tensor" in line}
    assert listed == nmgraph_sparse(exported.path)
    assert len(listed) == 5


def test_polygraphy_agrees_that_a_dense_model_is_dense(tmp_path):
    torch.onnx.export(cnn().eval(), (torch.randn(1, 3, 8, 8),), tmp_path / "dense.onnx", dynamo=True, verbose=False)
    assert nmgraph_sparse(tmp_path / "dense.onnx") == polygraphy_sparse(tmp_path / "dense.onnx") == set()
    assert not nmgraph.verify(tmp_path / "dense.onnx").holds


def test_polygraphy_agrees_on_a_partly_sparse_transformer(tmp_path):
    exported = export(Encoder(), tmp_path / "export", torch.randn(2, 5, 32), skip=["encoder.layers.0.*"])
    found = nmgraph_sparse(exported.path)
    assert found == polygraphy_sparse(exported.path)
    assert len(found) == 5


def swin_v2():
    return swin(depths=[1, 1], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (convnext, (1, 3, 32, 32)),
        (swin_v2, (1, 3, 32, 32)),
        (Encoder, (2, 5, 32)),
        (Recorder, (2, 16)),
    ],
    ids=["ConvNeXt", "SwinV2", "TransformerEncoder", "writes on itself"],
)
def test_real_networks_export_and_hold(make, shape, tmp_path):
    torch.manual_seed(0)
    report = export(make(), tmp_path / "export", torch.randn(shape)).report
    assert report.onnx.problems == ()
    assert report.holds
    assert sum(c.expected for c in report.onnx.checks) == sum(c.expected for c in report.weights.checks)


def test_layers_with_equal_weights_are_told_apart(tmp_path):
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer), nn.ReLU(), copy.deepcopy(layer))
    report = export(model, tmp_path / "export", torch.randn(2, 3, 16)).report
    assert report.onnx.problems == ()
    assert report.holds


@pytest.mark.parametrize("skip", [[], ["*in_proj_weight"]], ids=["sparse", "left dense"])
def test_packed_projection_that_is_split_in_the_graph_is_proved(tmp_path, skip):
    model = nn.TransformerDecoderLayer(256, 4, 64, batch_first=True)
    report = export(model, tmp_path / "export", (torch.randn(1, 3, 256), torch.randn(1, 4, 256)), skip=skip).report
    assert len([c for c in report.onnx.checks if "in_proj" in c.name and c.expected]) == 2 * (not skip)
    assert report.onnx.problems == ()
    assert report.holds


def test_unconverted_weight_that_is_scaled_in_the_graph_is_no_problem(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.head = nn.Parameter(torch.randn(256, 256)), nn.Linear(256, 8)

        def forward(self, x):
            return self.head(nn.functional.linear(x, self.matrix * 0.0625))

    report = export(Scaled(), tmp_path / "export", torch.randn(2, 256)).report
    assert report.onnx.problems == ()
    assert report.holds


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_of_every_dimension_are_proved(kind, tmp_path):
    spatial = int(kind.__name__[4])
    report = export(kind(8, 8, 3), tmp_path / "export", torch.randn(1, 8, *[5] * spatial)).report
    assert [(c.kind, c.holds) for c in report.onnx.checks] == [("Conv", True)]
    assert report.holds


def test_every_layer_is_proved_against_its_own_pattern(tmp_path):
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    report = export(model, tmp_path / "export", torch.randn(1, 2, 16), layers={"0": "1:4", "1": "4:8"}).report
    assert [(c.name, c.pattern) for c in report.onnx.checks] == [("0", "1:4"), ("1", "4:8"), ("2", "2:4")]
    assert report.holds


def test_large_weights_go_to_a_file_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 0)
    exported = export(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), tmp_path / "export", torch.randn(1, 3, 64))
    assert "model.onnx.data" in exported.report.files
    assert exported.report.holds
    moved = exported.report.directory.rename(tmp_path / "moved")
    assert nmgraph.verify(moved / "model.onnx").holds
    assert compare(exported.finished, moved / "model.onnx", exported.inputs, torch.float32).holds


def test_inputs_by_name_are_the_names_in_the_file(tmp_path):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 8)

        def forward(self, image, *, mask, scale=2.0):
            return self.two(self.one(image) * mask) * scale

    inputs = {"mask": torch.rand(2, 8), "image": torch.randn(2, 16)}
    exported = export(TwoInputs(), tmp_path / "export", inputs)
    assert {i.name for i in onnx.load(exported.path).graph.input} == {"image", "mask"}
    assert exported.report.holds


def test_model_that_torch_cannot_export_says_so_and_writes_nothing(tmp_path):
    with pytest.raises(ExportError) as caught:
        export(Branching(), tmp_path / "export", torch.randn(2, 16))
    text = str(caught.value)
    assert text.startswith("Branching can't be exported to ONNX: ")
    assert text.endswith("The dense model has to export with torch.onnx.export(dynamo=True) first.")
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []


def test_file_that_onnx_runtime_cannot_run_says_so(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[2, 16] x) => (float[2, 8] y) { y = NoSuchOperator(x) }'
    )
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match=r"^ONNX Runtime can't run broken\.onnx: .*NoSuchOperator"):
        compare(mlp(), tmp_path / "broken.onnx", make_inputs(torch.randn(2, 16)), torch.float32)


def identity(tmp_path, body="y = Identity(x)"):
    path = tmp_path / "written.onnx"
    outputs = "(float[N] y)" if "z" not in body else "(float[N] y, float[N] z)"
    onnx.save(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g (float[N] x) => {outputs} {{ {body} }}'),
        path,
    )
    return path


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda x: x, 0.0),
        (lambda x: x * 1.5, 1 / 3),
        (lambda x: x[:2], float("inf")),
        (lambda x: torch.where(x > 2, torch.nan, x), float("inf")),
        (lambda x: torch.where(x > 2, torch.inf, x), float("inf")),
        (lambda x: x * 0, 3.0),
    ],
    ids=["equal", "scaled", "another shape", "NaN", "infinite", "zero"],
)
def test_error_is_relative_to_the_largest_value(function, error, tmp_path):
    inputs = make_inputs(torch.tensor([1.0, 2.0, 3.0]))
    parity = compare(Function(function), identity(tmp_path), inputs, torch.float32)
    assert parity.worst == pytest.approx(error)
    assert parity.holds is (error == 0)


def test_other_number_of_outputs_is_an_error(tmp_path):
    path = identity(tmp_path, "y = Identity(x) z = Identity(x)")
    with pytest.raises(ExportError) as caught:
        compare(Function(lambda x: x), path, make_inputs(torch.ones(3)), torch.float32)
    assert str(caught.value) == "written.onnx has 2 outputs, the model 1."


def test_polygraphy_looks_at_no_transposed_convolution_and_so_finds_one_weight_less(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(8, 8, 1))
    exported = export(model, tmp_path / "export", torch.randn(1, 8, 6, 6))
    assert nmgraph_sparse(exported.path) - polygraphy_sparse(exported.path) == {"1.weight"}


def test_a_file_names_no_path_of_the_machine_it_was_written_on(tmp_path):
    model = nmgraph.convert(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8)), method="asp"
    )
    nmgraph.export(model, tmp_path / "export", example_inputs=torch.randn(1, 8, 4, 4))
    written = (tmp_path / "export" / "model.onnx").read_bytes()
    for path in (str(Path(torch.__file__).parent), str(Path(__file__).parent), str(tmp_path)):
        assert path.encode() not in written
