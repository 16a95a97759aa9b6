"""An export with an engine, driven against ``fake_tensorrt``: what is asked of TensorRT, and what is made of its answers.

Nothing here shows that TensorRT builds anything; see test_tensorrt_real.py for that.
"""

import io
import json
import sys
from types import SimpleNamespace

import fake_tensorrt
import onnx
import pytest
import torch
from models import cnn, mlp
from rich.console import Console
from torch import nn

import nmgraph
from nmgraph.errors import ExportError, FileError, MissingPackageError
from nmgraph.export import trt_build, trt_machine, trt_run
from nmgraph.export.inputs import make_inputs
from nmgraph.export.timing import time_files
from nmgraph.export.trt_machine import Machine, require_same_machine, write_machine

X = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
INSTEAD = (
    "Or leave --trt away: --trt-command (trt_command=True) writes the ONNX file and prints the trtexec line that "
    "builds the engine on the machine that will run it."
)


class FakeCuda:
    """Stands in for torch.cuda in trt_machine."""

    available = True

    def is_available(self):
        return self.available

    def get_device_capability(self):
        return (9, 0)

    def get_device_name(self):
        return "Fake H200"


@pytest.fixture
def world(monkeypatch):
    """TensorRT and a GPU, both faked."""
    world, cuda = fake_tensorrt.FakeWorld(), FakeCuda()
    world.cuda = cuda
    monkeypatch.setattr(fake_tensorrt, "fake_world", world)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(trt_machine, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(trt_run, "DEVICE", "cpu")
    monkeypatch.setattr(trt_run, "_event", fake_tensorrt.FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", fake_tensorrt.FakeStream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield world
    trt_build.logger_of.cache_clear()


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "export"


def sparse(model=None, **options):
    return nmgraph.convert(model or net(), method="srste", **options)


def net():
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 8)).eval()


def export(directory, model=None, **options):
    return nmgraph.export(model or sparse(), directory, **{"example_inputs": X, "trt": True, **options})


def message(error, directory, model=None, **options):
    with pytest.raises(error) as caught:
        export(directory, model, **options)
    assert type(caught.value) is error
    assert not directory.exists()
    return str(caught.value)


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def shown(report):
    console = Console(width=200, file=io.StringIO())
    console.print(report)
    return " ".join(console.file.getvalue().split())


def test_engine_log_layers_and_timing_cache_appear_with_the_export(world, directory):
    report = export(directory)
    assert names(directory) == [
        "manifest.json", "model.onnx", "model.plan", "model.plan.json", "model.plan.layers.json", "model.plan.log",
        "model.timing-cache", "report.json",
    ]  # fmt: skip
    assert report.holds
    assert json.loads((directory / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert json.loads((directory / "model.plan.json").read_text()) == {
        "gpu": "Fake H200", "compute_capability": "9.0", "tensorrt": "11.4.0.106",
    }  # fmt: skip
    assert "(Sparsity) Layers eligible" in (directory / "model.plan.log").read_text()
    assert "a thousand lines" not in (directory / "model.plan.log").read_text()


def test_sparse_engine_and_dense_twin_differ_in_the_flag_alone(world, directory):
    export(directory)
    sparse_build, dense_build = world.builds
    assert (sparse_build.pop("sparse"), dense_build.pop("sparse")) == (True, False)
    assert sparse_build == dense_build
    assert sparse_build["verbosity"] is fake_tensorrt.ProfilingVerbosity.DETAILED


def test_report_tells_which_layers_run_sparse_and_what_they_gain(world, directory):
    report = export(directory, precision="fp16").engine
    assert [(t.sites, t.operator, t.eligible, t.runs, t.said_by) for t in report.layers] == [
        (("0",), "Conv", True, "sparse", "tactic"),
        (("3",), "Gemm", True, "dense", "build log"),
    ]
    assert (report.sparse.median_ms, report.dense.median_ms, report.speedup) == (1.0, 1.25, 1.25)
    assert report.sparse.runs == trt_run.ROUNDS * trt_run.RUNS
    assert report.precision == "fp16"
    assert str(report).startswith(
        "1 of 2 products on sparse kernels, 1 dense; 1.000 ms; the dense twin 1.250 ms (1.25x); "
    )


def test_table_shows_every_layer(world, directory):
    text = shown(export(directory, precision="fp16"))
    assert "TensorRT engine in fp16 for Fake H200 (compute capability 9.0) with TensorRT 11.4.0.106" in text
    assert "sm90_fprop_sparse_conv_sptensor" in text
    assert "every check holds" in text


def test_log_that_says_nothing_leaves_hidden_layers_not_visible(world, directory):
    world.silent = True
    report = export(directory).engine
    assert [(t.eligible, t.runs) for t in report.layers] == [(None, "sparse"), (None, "not visible")]
    assert "The build log says nothing of sparsity, so eligible is not known." in report.notes


def test_faster_dense_twin_is_said(world, directory):
    world.dense_ms = 0.5
    report = export(directory)
    assert report.holds
    assert report.engine.notes == ("The dense twin is faster: build without --sparsity=enable for use.",)


def test_gpu_without_sparse_tensor_cores_is_said(world, directory, monkeypatch):
    monkeypatch.setattr(world.cuda, "get_device_capability", lambda: (7, 5))
    assert export(directory).engine.notes == (
        "Fake H200 has no sparse tensor cores; they begin with compute capability 8.0 (Ampere).",
    )


def test_no_compare_builds_no_twin(world, directory):
    report = export(directory, compare=False).engine
    assert [b["sparse"] for b in world.builds] == [True]
    assert (report.dense, report.speedup) == (None, None)
    assert "twin" not in str(report)


def test_engine_that_answers_otherwise_fails_the_report(world, directory):
    world.wrong = True
    report = export(directory)
    assert report.parity.holds
    assert not report.engine.holds
    assert not report.holds
    assert "A CHECK DID NOT HOLD" in shown(report)


def test_several_inputs_reach_the_engine_by_name(world, directory):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x, tokens):
            return self.layer(x) + tokens, self.layer(x)

    inputs = {"tokens": torch.arange(8), "x": torch.randn(2, 16)}
    report = export(directory, sparse(Sum()), example_inputs=inputs)
    assert report.holds
    assert len(report.engine.parity.outputs) == 2


def test_open_sizes_get_a_profile_up_to_the_example(world, directory, tmp_path):
    export(directory)
    assert world.builds[0]["profiles"] == []
    file = onnx.load(directory / "model.onnx")
    for value in (*file.graph.input, *file.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(file, tmp_path / "open.onnx")
    name = file.graph.input[0].name
    for broken in (set(), {"profile"}):
        world.broken = broken
        shapes = {name: (4, 8, 8, 8)}
        if broken:
            with pytest.raises(ExportError, match=f"TensorRT refuses the sizes .* for the inputs {name}"):
                trt_build.build_engine(fake_tensorrt, tmp_path / "open.onnx", shapes, sparse=True, progress=str)
        else:
            trt_build.build_engine(fake_tensorrt, tmp_path / "open.onnx", shapes, sparse=True, progress=str)
            assert world.builds[-1]["profiles"] == [{name: ((1, 8, 8, 8), (4, 8, 8, 8), (4, 8, 8, 8))}]


def test_timing_cache_of_an_earlier_export_is_used_for_the_sparse_engine_alone(world, directory):
    export(directory)
    export(directory, overwrite=True)
    assert [b["timing_cache"] for b in world.builds] == [b"", b"", b"timed;", b""]
    assert (directory / "model.timing-cache").read_bytes() == b"timed;timed;"


def test_timing_cache_of_another_machine_is_left_away(world, directory):
    export(directory)
    world.broken = {"cache"}
    export(directory, overwrite=True)
    assert world.builds[2]["timing_cache"] == b""


def test_export_without_engine_removes_an_old_one(world, directory):
    export(directory)
    export(directory, overwrite=True, trt=False)
    assert names(directory) == ["manifest.json", "model.onnx", "report.json"]


def test_stages_are_told_with_how_far_the_build_is(world, directory):
    stages = []
    export(directory, progress=stages.append)
    assert stages[5:] == [
        *(f"building the {kind} engine{how}" for kind in ("sparse", "dense")
          for how in ("", ": Building 20 %", ": Building 50 %", ": Building 70 %", ": Building 100 %")),
        "running both engines",
    ]  # fmt: skip


def test_interruption_stops_the_build_and_writes_nothing(world, directory):
    def impatient(stage):
        if "50 %" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(directory, progress=impatient)
    assert [build["stopped"] for build in world.builds] == [True]
    assert not directory.exists()
    assert names(directory.parent) == []


@pytest.mark.parametrize(
    ("broken", "error", "text"),
    [
        (
            "start",
            ExportError,
            "TensorRT can't start: pybind11::init(): factory function returned nullptr. Check the GPU with nvidia-smi.",
        ),
        ("parse", ExportError, "TensorRT can't parse model.onnx: no importer registered for op: Whistle"),
        (
            "build",
            ExportError,
            "TensorRT can't build an engine of model.onnx: [ERROR] Could not find any implementation for node node_conv2d.",
        ),
        (
            "load",
            FileError,
            "model.plan can't be loaded as a TensorRT engine: [ERROR] Serialization assertion failed",
        ),
        ("run", ExportError, "TensorRT could not run the engine it built; its log says why."),
    ],
)  # fmt: skip
def test_what_tensorrt_refuses_is_said_in_its_words_and_nothing_is_written(broken, error, text, world, directory):
    world.broken = {broken}
    assert message(error, directory) == text


def test_kind_of_tensor_that_torch_cannot_hold_is_named(world, directory, monkeypatch):
    monkeypatch.setitem(fake_tensorrt._DTYPES, 1, fake_tensorrt.DataType.FP8)
    assert message(ExportError, directory).endswith("is FP8 in the engine, which torch can't hold.")


def test_tensorrt_that_is_not_installed_is_refused_before_any_work(directory, monkeypatch):
    monkeypatch.setattr(trt_machine.importlib.util, "find_spec", lambda name: None)
    stages = []
    assert message(MissingPackageError, directory, progress=stages.append) == (
        "--trt needs TensorRT, which is not installed: pip install tensorrt (Linux or Windows with an NVIDIA GPU). "
        + INSTEAD
    )
    assert stages == []


def test_machine_without_gpu_is_refused_before_any_work(world, directory):
    world.cuda.available = False
    stages = []
    assert message(ExportError, directory, progress=stages.append) == (
        "--trt needs an NVIDIA GPU that torch can use, and torch.cuda.is_available() is False: install a CUDA "
        f"build of torch, on a machine with a GPU. {INSTEAD}"
    )
    assert stages == []


def test_old_tensorrt_is_refused_before_any_work(world, directory, monkeypatch):
    monkeypatch.setattr(fake_tensorrt, "__version__", "10.9.0.34")
    assert message(MissingPackageError, directory) == (
        f"--trt needs TensorRT 10.13 or newer, and 10.9.0.34 is installed: pip install --upgrade tensorrt. {INSTEAD}"
    )


def test_tensorrt_without_its_libraries_is_refused_before_any_work(world, directory, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert message(MissingPackageError, directory) == (
        "TensorRT is installed but can't be imported: libnvinfer.so.11: cannot open shared object file. "
        f"Install it again: pip install tensorrt. {INSTEAD}"
    )


def test_engine_without_onnx_is_refused(world, directory):
    for wanted in ({"trt": True}, {"trt": False, "trt_command": True}):
        assert message(ExportError, directory, onnx=False, safetensors=True, **wanted) == (
            "a TensorRT engine is built from the ONNX file: leave onnx on (no --no-onnx)."
        )


def test_no_compare_without_engine_is_refused(directory):
    assert message(ExportError, directory, trt=False, compare=False) == (
        "there is no engine to compare: --no-compare (compare=False) goes with --trt."
    )


HERE = Machine("NVIDIA A100", "8.0", "11.4.0.106")


@pytest.mark.parametrize(
    "other",
    [
        Machine("NVIDIA H200", "9.0", "11.4.0.106"),
        Machine("NVIDIA A30", "8.0", "11.4.0.106"),
        Machine("NVIDIA A100", "8.0", "11.3.0.99"),
    ],
)
def test_engine_of_another_gpu_or_version_is_not_loaded(other, tmp_path):
    plan = tmp_path / "model.plan"
    write_machine(plan, HERE)
    require_same_machine(plan, HERE)
    with pytest.raises(FileError) as caught:
        require_same_machine(plan, other)
    assert str(caught.value) == (
        f"{plan} was built for NVIDIA A100 (compute capability 8.0) with TensorRT 11.4.0.106, and this is {other}. An "
        "engine runs where it was built: build it again here from the ONNX file beside it, with `nmgraph export --trt` "
        "or trtexec."
    )


@pytest.mark.parametrize("content", [None, "", "[]", '{"gpu": "x"}'])
def test_engine_without_word_of_its_machine_is_not_loaded(content, tmp_path, world):
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"engine")
    if content is not None:
        (tmp_path / "model.plan.json").write_text(content)
    with pytest.raises(FileError) as caught:
        trt_build.load_engine(fake_tensorrt, plan)
    assert str(caught.value) == (
        f"{plan} can't be loaded: model.plan.json beside it, which says what it was built for, is missing or damaged. "
        "Build the engine again with `nmgraph export --trt`."
    )


COMMAND = (
    "trtexec --onnx=model.onnx --saveEngine=model.plan --stronglyTyped --sparsity=enable "
    "--timingCacheFile=model.timing-cache --profilingVerbosity=detailed --exportLayerInfo=model.plan.layers.json --verbose"
)


def test_command_for_another_machine_needs_no_tensorrt(directory):
    report = export(directory, trt=False, trt_command=True, precision="fp16")
    assert report.trtexec == COMMAND
    assert report.engine is None
    assert json.loads((directory / "report.json").read_text())["trtexec"] == COMMAND
    assert report.notes == (
        "TensorRT keeps the precision of the ONNX file, fp16; its builder has no switch for another in strongly typed "
        "networks.",
    )


def test_command_gives_the_sizes_that_the_file_leaves_open(directory):
    from nmgraph.export.inputs import make_inputs
    from nmgraph.export.trt_command import trtexec_line

    export(directory, trt=False)
    file = onnx.load(directory / "model.onnx")
    name = file.graph.input[0].name
    file.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    line = trtexec_line(file, make_inputs(torch.zeros(4, 8, 8, 8)))
    assert f"--minShapes={name}:1x8x8x8 --optShapes={name}:4x8x8x8 --maxShapes={name}:4x8x8x8" in line


def test_report_of_an_ordinary_export_says_nothing_of_tensorrt(directory):
    report = export(directory, trt=False)
    assert (report.engine, report.trtexec, report.notes, report.projected) == (None, "", (), ())


def test_fp32_file_comes_with_a_hint(world, directory):
    hint = (
        "Sparse tactics are documented for fp16 and int8; whether an fp32 engine gets any is not known. Export with "
        "--precision fp16."
    )
    assert hint in export(directory).notes
    assert hint in shown(export(directory, overwrite=True))
    assert hint not in export(directory, precision="fp16", overwrite=True).notes


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:16"])
def test_sparser_patterns_are_said_to_run_as_2_of_4(pattern, directory):
    report = export(
        directory, sparse(mlp(), pattern=pattern), example_inputs=torch.ones(1, 16), trt=False, trt_command=True
    )
    assert f"{pattern} runs as 2:4, and no faster: tensor cores skip two of four, never more." in report.notes


def test_patterns_that_never_fit_are_refused_before_any_work(directory):
    stages = []
    text = message(
        ExportError, directory, sparse(mlp(), pattern="4:8"), trt=False, trt_command=True, progress=stages.append
    )
    assert text == (
        "no sparse layer (0, 2) could use TensorRT's sparse tactics, which take at most 2 of every 4 input "
        "channels: 4:8 may keep more than 2 of 4. Train at 2:4, 1:4, 2:8 or 1:16 along the channels, or prune further "
        "now with --project 2:4, which the report tells the cost of."
    )
    assert stages == []


def test_flat_blocks_are_refused_with_their_reason(directory):
    text = message(ExportError, directory, sparse(net()[:1], block_axis="flat"), trt=False, trt_command=True)
    assert "flat blocks of 2:4 run along the kernel window, not along the channels" in text


def test_channels_that_are_no_multiple_of_4_are_refused_with_their_reason_even_projected(directory):
    model = sparse(nn.Sequential(nn.Linear(6, 8)), pattern="1:2")
    text = message(ExportError, directory, model, trt=False, trt_command=True, project="2:4")
    assert text == (
        "no sparse layer (0) could use TensorRT's sparse tactics, which take at most 2 of every 4 input "
        "channels: 6 input channels are not a multiple of 4. Train at 2:4, 1:4, 2:8 or 1:16 along the channels."
    )


def test_report_names_the_layers_that_will_not_be_sparse(directory):
    model = sparse(cnn().eval(), layers={"7": "4:8"})
    report = export(directory, model, example_inputs=torch.randn(1, 3, 8, 8), trt=False, trt_command=True)
    assert "Sparse, and yet dense in TensorRT: 7 (4:8: more than 2 of 4 are non-zero)." in report.notes


def test_projection_makes_them_fit_and_says_what_it_cost(directory):
    model = sparse(cnn().eval(), layers={"7": "4:8"})
    before = nmgraph.finalize(model)[7].weight.detach()
    options = {"example_inputs": torch.randn(1, 3, 8, 8), "trt": False, "trt_command": True, "safetensors": True}
    report = export(directory, model, project="2:4", **options)
    assert report.holds
    (cost,) = report.projected
    blocks = before.abs().unflatten(1, (-1, 4)).sort(dim=-1, descending=True).values[..., :2]
    assert (cost.name, cost.before, cost.after) == ("7", "4:8", "2:4")
    assert cost.kept_magnitude == pytest.approx(float(blocks.sum() / before.abs().sum()))
    assert cost.kept_weights == pytest.approx(int((blocks != 0).sum()) / int((before != 0).sum()))
    assert not [note for note in report.notes if "dense in" in note]
    assert {c.name: c.pattern for c in report.onnx.checks if c.expected} == {"3": "2:4", "7": "2:4"}
    assert nmgraph.verify(directory / "model.safetensors", "2:4").holds
    assert "7: 4:8 to 2:4; " in shown(report)
    assert json.loads((directory / "report.json").read_text())["projected"][0]["kept_magnitude"] == cost.kept_magnitude
    assert nmgraph.manifest(model).patterns["7"] == nmgraph.Pattern(4, 8)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("4:8", "--project 4:8: sparse tensor cores know 2:4 alone. Use --project 2:4."),
        ("half", "--project: 'half' is not a pattern. Write N:M, for example 2:4 (keep 2 of every 4)."),
    ],
)
def test_projection_on_another_pattern_is_refused(value, text, directory):
    assert message(ExportError, directory, trt=False, project=value) == text


def test_engines_are_timed_among_themselves(world, directory, tmp_path):
    for name in ("one", "two"):
        export(tmp_path / name)
    plans = [tmp_path / name / "model.plan" for name in ("one", "two")]
    found = time_files(plans, inputs=make_inputs(X), progress=lambda stage: None)
    assert [t.file for t in found.files] == [str(p) for p in plans]
    assert found.files[0].ratio == 1.0
    assert found.runner.startswith("TensorRT on ")
    with pytest.raises(ExportError, match=r"model.plan takes \w+; give one --input for each"):
        time_files(plans, progress=lambda stage: None)
    with pytest.raises(FileError, match=r"is no .onnx file"):
        time_files([tmp_path / "one" / "model.onnx", plans[0]], progress=lambda stage: None)


def test_engine_of_another_machine_is_not_timed(world, tmp_path):
    export(tmp_path / "one")
    sidecar = tmp_path / "one" / "model.plan.json"
    machine = json.loads(sidecar.read_text()) | {"gpu": "another"}
    sidecar.write_text(json.dumps(machine))
    with pytest.raises(FileError, match="was built for another"):
        time_files([tmp_path / "one" / "model.plan"], inputs=make_inputs(X), progress=lambda stage: None)


def test_engines_need_tensorrt(tmp_path):
    (tmp_path / "a.plan").write_bytes(b"engine")
    with pytest.raises(MissingPackageError, match="TensorRT"):
        time_files([tmp_path / "a.plan"], progress=lambda stage: None)
