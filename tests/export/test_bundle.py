"""An export is one directory, whole or not at all, with a report that says what was found."""

import contextlib
import io
import json

import onnx
import pytest
import torch
from models import NeverTheSame, cnn, deit, mlp
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import nmgraph
from nmgraph.errors import ConversionError, ExportError, FileError, NMGraphError, UnfinishedError

X = torch.ones(2, 16)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "export"


def sparse(model=None, **options):
    return nmgraph.convert(model or mlp(), method="srste", **options)


def message(error, model, directory, **options):
    with pytest.raises(error) as caught:
        nmgraph.export(model, directory, **options)
    assert type(caught.value) is error
    return str(caught.value)


def names(directory):
    return sorted(p.name for p in directory.iterdir())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    torch.manual_seed(0)
    model = sparse(cnn().eval())
    directory = tmp_path_factory.mktemp("bundle") / "export"
    return model, nmgraph.export(model, directory, example_inputs=torch.randn(1, 3, 8, 8), safetensors=True)


def test_directory_holds_what_was_asked_for(everything):
    _, report = everything
    assert names(report.directory) == ["manifest.json", "model.onnx", "model.safetensors", "report.json"]
    assert {n: (report.directory / n).stat().st_size for n in names(report.directory)} == report.files
    assert names(report.directory.parent) == ["export"]


def test_report_is_written_as_it_was_returned(everything):
    _, report = everything
    written = json.loads((report.directory / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["holds"] is True
    assert written["precision"] == "fp32"
    assert written["inputs"] == "1x3x8x8 (given)"


def test_manifest_is_written_beside_the_model(everything):
    model, report = everything
    written = json.loads((report.directory / "manifest.json").read_text())
    assert written == json.loads(nmgraph.manifest(model).to_json())


def test_safetensors_hold_the_finalized_weights_and_verify(everything):
    model, report = everything
    path = report.directory / "model.safetensors"
    finished = nmgraph.finalize(model).state_dict()
    written = nmgraph.load(path, model=cnn()).state_dict()
    assert sorted(written) == sorted(finished)
    assert all(torch.equal(written[key], value) for key, value in finished.items())
    assert nmgraph.verify(path).holds


def test_table_names_every_check_and_file(everything):
    _, report = everything
    console = Console(width=160, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    for part in (
        "every check holds: ",
        "finalized weights",
        "ONNX file",
        "ONNX Runtime",
        "model.safetensors",
        "1x3x8x8",
    ):
        assert part in text


def test_model_itself_is_not_changed(directory):
    model = sparse().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nmgraph.export(model, directory, onnx=False, safetensors=True, precision="fp16")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_finalized_model_exports_as_it_is(directory):
    report = nmgraph.export(nmgraph.finalize(sparse()), directory, example_inputs=X)
    assert report.holds


def test_model_in_a_wrapper_exports(directory):
    report = nmgraph.export(nn.Sequential(sparse(), nn.Linear(8, 8)), directory, example_inputs=X)
    assert report.holds
    assert [c.name for c in report.onnx.checks if c.expected] == ["0.0", "0.2"]


def test_graph_exports(directory):
    graph = sparse(cnn().eval(), mode="graph")
    assert nmgraph.export(graph, directory, example_inputs=torch.randn(1, 3, 8, 8)).holds


def test_tied_weights_are_written_once(directory):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    nmgraph.export(sparse(model), directory, onnx=False, safetensors=True)
    assert [c.name for c in nmgraph.verify(directory / "model.safetensors").checks if c.holds] == ["1.weight"]
    stored = [key for key in load_file(directory / "model.safetensors") if "weight" in key]
    assert sorted(stored) == ["0.weight", "1.weight.positions", "1.weight.values"]


def test_safetensors_of_a_model_with_dense_layers_hold_what_its_manifest_says(directory):
    model = sparse(nn.Sequential(nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 8)), skip=["2"])
    report = nmgraph.export(model, directory, onnx=False, safetensors=True)
    found = nmgraph.verify(directory / "model.safetensors")
    assert report.holds
    assert found.holds
    assert [c.name.removesuffix(".weight") for c in found.checks if c.expected] == ["1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_model_trained_in_another_precision_exports_without_being_told_its_inputs(dtype, directory):
    report = nmgraph.export(sparse(mlp().to(dtype)), directory)
    assert report.holds
    assert report.inputs == "1x16 (guessed from the first layer)"


def test_force_removes_no_files_that_no_export_wrote(directory):
    directory.mkdir()
    (directory / "mine.txt").write_text("mine")
    with contextlib.suppress(NMGraphError):
        nmgraph.export(sparse(), directory, onnx=False, safetensors=True, overwrite=True)
    assert (directory / "mine.txt").read_text() == "mine"


def test_half_precision_is_written_proved_and_compared(directory):
    report = nmgraph.export(
        sparse(cnn().eval()), directory, example_inputs=torch.randn(1, 3, 8, 8), precision="fp16", safetensors=True
    )
    assert report.holds
    assert report.inputs == "1x3x8x8:float16 (given)"
    assert report.parity.tolerance == 2e-2
    kinds = {t.data_type for t in onnx.load(directory / "model.onnx").graph.initializer if len(t.dims) > 1}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert {t.dtype for t in load_file(directory / "model.safetensors").values() if t.is_floating_point()} == {
        torch.float16
    }


def test_bfloat16_weights_are_written_and_verify(directory):
    report = nmgraph.export(sparse(), directory, onnx=False, safetensors=True, precision="bf16")
    assert (report.holds, report.onnx, report.parity, report.inputs) == (True, None, None, "")
    assert names(directory) == ["manifest.json", "model.safetensors", "report.json"]
    written = load_file(directory / "model.safetensors")
    assert {t.dtype for name, t in written.items() if not name.endswith(".positions")} == {torch.bfloat16}
    assert nmgraph.verify(directory / "model.safetensors").holds


def test_bfloat16_onnx_is_refused(directory):
    assert message(ExportError, sparse(), directory, example_inputs=X, precision="bf16") == (
        "ONNX Runtime has no bfloat16 kernels on the CPU, so a bf16 ONNX file could not be compared. Choose fp16 or "
        "fp32, or write only the weights with --no-onnx --safetensors."
    )
    assert not directory.exists()


def test_unknown_precision_is_refused(directory):
    assert message(ExportError, sparse(), directory, example_inputs=X, precision="int8") == (
        "there is no precision 'int8'. Choose one of fp32, fp16, bf16."
    )


def test_nothing_to_write_is_refused(directory):
    assert message(ExportError, sparse(), directory, onnx=False) == (
        "there is nothing to export: leave onnx on, or ask for safetensors."
    )


def test_dense_model_is_refused(directory):
    assert message(ConversionError, mlp(), directory, example_inputs=X) == (
        "Sequential is not a converted model. Make it one with nmgraph.convert(model, method=...)."
    )


def test_unfinished_model_is_refused_with_what_is_missing(directory):
    text = message(UnfinishedError, nmgraph.convert(mlp(), method="lbc"), directory, example_inputs=X)
    assert text.startswith("2 layers are not N:M yet (lbc 2:4; ")
    assert "0: 64 of 64 blocks still keep more than 2 of 4" in text
    assert not directory.exists()


def test_force_prunes_an_unfinished_model_by_score(directory):
    report = nmgraph.export(nmgraph.convert(mlp(), method="lbc"), directory, example_inputs=X, force=True)
    assert report.pruned == ("0", "2")
    assert report.holds


def test_existing_directory_is_kept_unless_forced(directory):
    directory.mkdir()
    (directory / "mine.txt").write_text("mine")
    assert message(FileError, sparse(), directory, example_inputs=X) == (
        f"{directory} exists and is kept. Choose another place with -o, or replace it with --overwrite (overwrite=True)."
    )
    assert names(directory) == ["mine.txt"]


def test_force_replaces_an_earlier_export(directory):
    nmgraph.export(sparse(), directory, onnx=False, safetensors=True)
    nmgraph.export(sparse(), directory, example_inputs=X, overwrite=True)
    assert names(directory) == ["manifest.json", "model.onnx", "report.json"]
    assert names(directory.parent) == ["export"]


def test_failed_export_keeps_the_earlier_one(directory):
    nmgraph.export(sparse(), directory, onnx=False, safetensors=True)

    class Unexportable(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    message(ExportError, sparse(Unexportable(nn.Linear(16, 8))), directory, example_inputs=X, overwrite=True)
    assert names(directory) == ["manifest.json", "model.safetensors", "report.json"]
    assert names(directory.parent) == ["export"]


def test_missing_parent_is_named_before_any_work(tmp_path):
    stages, directory = [], tmp_path / "none" / "export"
    assert message(FileError, sparse(), directory, example_inputs=X, progress=stages.append) == (
        f"{directory} can't be written: there is no directory {directory.parent}. Make it first."
    )
    assert stages == []


def test_stages_are_told_in_order(directory):
    stages = []
    nmgraph.export(sparse(), directory, example_inputs=X, safetensors=True, progress=stages.append)
    assert stages == [
        "finalizing",
        "checking weights",
        "writing ONNX",
        "proving N:M on the ONNX file",
        "comparing with ONNX Runtime",
        "writing safetensors",
    ]


def test_file_that_answers_otherwise_fails_the_report_and_is_still_written(directory):
    report = nmgraph.export(sparse(NeverTheSame()), directory, example_inputs=torch.ones(4, 16))
    assert report.weights.holds
    assert report.onnx.holds
    assert not report.parity.holds
    assert not report.holds
    assert json.loads((directory / "report.json").read_text())["holds"] is False
    assert "model.onnx" in names(directory)


def test_vision_transformer_exports_with_guessed_inputs(directory):
    report = nmgraph.export(sparse(deit().eval()), directory)
    assert report.holds
    assert report.inputs == "1x3x32x32 (guessed from the first layer)"
