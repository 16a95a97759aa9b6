"""Every command: what it answers, as JSON and for people, and its exit code: 0 fine, 1 a check failed, 2 misused."""

import dataclasses
import json

import pytest
import torch
from commands import answer, call
from handles import nm
from models import Encoder, NeverTheSame, cnn, mlp
from torch import nn

import nmgraph
from nmgraph import cli


def words(result):
    """Give what was shown, without the line breaks of tables."""
    return " ".join(result.stdout.split())


def complaint(*arguments):
    """Call with a mistake, and give the one message on stderr."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert answer(*arguments, code=2) == {"error": result.stderr.removeprefix("error: ").rstrip("\n")}
    return result.stderr.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def dense(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(mlp(), path)
    return path


@pytest.fixture
def converted(tmp_path):
    path = tmp_path / "net.nm.pt"
    nmgraph.save(nmgraph.convert(mlp(), method="srste"), path)
    return path


def test_methods_lists_every_method_with_its_options():
    methods = answer("methods")
    assert [m["name"] for m in methods] == list(nmgraph.METHODS)
    for method in methods:
        fields = dataclasses.fields(nmgraph.METHODS[method["name"]])
        assert method["options"] == {f.name: f.default for f in fields}
        assert all(method[key] for key in ("title", "paper", "gradient", "state_cost", "time_cost"))


def test_methods_shows_a_table():
    result = call("methods")
    assert result.exit_code == 0
    for text in ("lbc", "srste", "Zhou et al., ICLR 2021", "t_f=0.5"):
        assert text in result.stdout


def test_inspect_shows_what_convert_would_do_and_writes_nothing(dense):
    found = answer("inspect", dense, "--pattern", "4:8", "--method", "srste", "--input", "2x16")
    assert found["method"] == "srste"
    assert [(e["name"], e["pattern"], e["converted"], e["calls"]) for e in found["entries"]] == [
        ("0", "4:8", True, 1),
        ("2", "4:8", True, 1),
    ]
    assert [p.name for p in dense.parent.iterdir()] == ["net.pt"]
    assert "lbc: 2 sites converted, 0 skipped" in words(call("inspect", dense))


def test_convert_writes_beside_the_model(dense):
    found = answer("convert", dense)
    assert found["output"] == str(dense.with_name("net.nm.pt"))
    assert [e["name"] for e in found["entries"] if e["converted"]] == ["0", "2"]
    assert nmgraph.manifest(nmgraph.load(dense.with_name("net.nm.pt"))).method == "lbc"


def test_convert_shows_the_manifest_and_what_to_do_next(dense):
    result = call("convert", dense, "--method", "srste")
    out = dense.with_name("net.nm.pt")
    assert result.exit_code == 0
    assert "srste: 2 sites converted, 0 skipped, 100.0% of their weights" in words(result)
    assert result.stdout.endswith(f"Wrote {out}. Train it, then: nmgraph export {out}\n")


def test_convert_takes_every_option(tmp_path):
    torch.save(cnn().state_dict(), tmp_path / "state.pt")
    found = answer(
        "convert", tmp_path / "state.pt", "--model", "models:cnn", "--method", "lbc", "--pattern", "1:4",
        "--set", "momentum=0.5", "--set", "t_f=0.25", "--layer", "3=4:8", "--skip", "7", "--input", "1x3x8x8",
        "-o", tmp_path / "other.nm.pt",
    )  # fmt: skip
    assert found["output"] == str(tmp_path / "other.nm.pt")
    assert found["inputs"] == [[[1, 3, 8, 8], "float32", ""]]
    assert {e["name"]: (e["pattern"], e["reason"]) for e in found["entries"]} == {
        "0": ("1:4", "3 input channels are not a multiple of 4"),
        "3": ("4:8", ""),
        "7": ("1:4", "left dense on request"),
    }
    model = nmgraph.load(tmp_path / "other.nm.pt", model=cnn())
    assert (nm(model[3]).told.method.momentum, nm(model[3]).told.method.t_f) == (0.5, 0.25)


def test_convert_tells_the_factory_to_name_again(tmp_path):
    torch.save(mlp().state_dict(), tmp_path / "state.pt")
    result = call("convert", tmp_path / "state.pt", "--model", "models:mlp")
    out = tmp_path / "state.nm.pt"
    assert f"Train it, then: nmgraph export {out} --model models:mlp" in result.stdout
    assert answer("status", out, "--model", "models:mlp")["layers"][0]["site"] == "0"
    assert complaint("status", out) == (
        f"{out} was made with --model models:mlp. Making the model runs that code, so name it again: "
        "--model models:mlp, or in Python model=models.mlp()."
    )


def test_convert_loads_classes_of_trusted_packages_only(tmp_path):
    torch.save(Encoder(), tmp_path / "net.pt")
    assert "models.Encoder" in complaint("convert", tmp_path / "net.pt")
    assert len(answer("convert", tmp_path / "net.pt", "--trust", "models")["entries"]) == 9


@pytest.mark.parametrize("command", ["convert", "export"])
def test_existing_output_is_kept_unless_forced(command, dense, converted):
    source, out = (dense, converted) if command == "convert" else (converted, converted.with_name("net-export"))
    if command == "export":
        out.mkdir()
    before = out.read_bytes() if out.is_file() else list(out.iterdir())
    assert complaint(command, source) == (
        f"{out} exists and is kept. Choose another place with -o, or replace it with --overwrite (overwrite=True)."
    )
    assert (out.read_bytes() if out.is_file() else list(out.iterdir())) == before
    assert answer(command, source, "--overwrite")


@pytest.mark.parametrize("command", ["convert", "export"])
def test_output_that_cannot_be_written_is_named_before_any_work(command, tmp_path):
    out = tmp_path / "none" / "output"
    assert complaint(command, tmp_path / "no-such-model.pt", "-o", out) == (
        f"{out} can't be written: there is no directory {out.parent}. Make it first."
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "sr-ste"], "there is no method 'sr-ste'. Did you mean srste or sste? See `nmgraph methods`."),
        (["--set", "momentun=1"], "lbc has no option 'momentun'. Did you mean momentum?"),
        (["--set", "momentum=high"], "--set momentum=high: 'high' is no float."),
        (["--set", "momentum"], "--set 'momentum' has another form than KEY=VALUE."),
        (["--set", "momentum=2"], "lbc: momentum=2.0 must lie in [0, 1); the paper's is 0.9."),
        (["--pattern", "2-4"], "'2-4' is not a pattern. Write N:M, for example 2:4 (keep 2 of every 4)."),
        (["--layer", "0"], "--layer '0' has another form than GLOB=N:M."),
        (["--layer", "5=1:4"], "no layer is named '5'. Near: 0, 2"),
        (["--skip", "fc"], "no layer is named 'fc'. Near: 0, 2"),
        (
            ["--input", "2x5"],
            "Sequential does not take the inputs 2x5 (values made up): "
            "mat1 and mat2 shapes cannot be multiplied (2x5 and 16x16)",
        ),
        (
            ["--input", "2xN"],
            "'2xN' is no input. Write [NAME=]SHAPE[:DTYPE], for example 1x3x224x224 or input_ids=1x16:int64; "
            "dtypes are float32, float16, bfloat16, float64, int64, int32, bool.",
        ),
        (["--model", "models"], "'models' does not name a function. Write --model package.module:function."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_convert_explains_a_mistake_and_writes_nothing(options, text, dense):
    if "--model" in options:
        torch.save(mlp().state_dict(), dense)
    assert complaint("convert", dense, *options) == text
    assert [p.name for p in dense.parent.iterdir()] == ["net.pt"]


def test_debug_shows_the_traceback(dense):
    result = call("convert", dense, "--method", "sr-ste", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "MethodError: there is no method 'sr-ste'." in result.stderr


def test_brackets_in_a_message_are_printed_as_they_are(tmp_path):
    assert complaint("convert", tmp_path / "[bold]net.pt") == f"{tmp_path}/[bold]net.pt does not exist."


def test_bug_of_ours_is_told_apart_from_a_mistake(dense, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cli, "read_dense", broken)
    assert complaint("convert", dense) == (
        "internal error: ZeroDivisionError: division by zero\nPlease report it, with what --debug shows."
    )


def test_interruption_writes_nothing(dense, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    assert complaint("convert", dense) == "interrupted; nothing was written."
    assert [p.name for p in dense.parent.iterdir()] == ["net.pt"]


def test_status_of_a_new_conversion(dense):
    call("convert", dense)
    rows = answer("status", dense.with_name("net.nm.pt"))["layers"]
    assert rows[0] == {
        "site": "0",
        "method": "lbc",
        "pattern": "2:4",
        "step": 0,
        "total_steps": 0,
        "phase": "training has not begun",
        "kept": 1.0,
        "magnitude": 1.0,
        "gauges": {"live_combinations": 6.0},
        "unfinished": "64 of 64 blocks still keep more than 2 of 4",
    }
    assert "not attached yet" in call("status", dense.with_name("net.nm.pt")).stdout


def test_status_follows_the_training(tmp_path):
    model = nmgraph.convert(mlp(), method="lbc")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nmgraph.attach(model, optimizer, total_steps=4)
    for _ in range(2):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    nmgraph.save(model, tmp_path / "net.nm.pt")
    rows = answer("status", tmp_path / "net.nm.pt")["layers"]
    assert [(r["site"], r["step"], r["total_steps"], r["kept"], r["unfinished"]) for r in rows] == [
        ("0", 2, 4, 0.5, ""),
        ("2", 2, 4, 0.5, ""),
    ]
    assert "2 of 4" in call("status", tmp_path / "net.nm.pt").stdout


def test_status_of_a_dense_model_is_a_mistake(dense):
    assert complaint("status", dense) == (
        f"{dense} is no converted model. Make one with nmgraph.convert and nmgraph.save, or `nmgraph convert {dense}`."
    )


def test_export_writes_beside_the_model(converted):
    found = answer("export", converted)
    directory = converted.with_name("net-export")
    assert found["holds"] is True
    assert found["directory"] == str(directory)
    assert sorted(p.name for p in directory.iterdir()) == ["manifest.json", "model.onnx", "report.json"]
    assert json.loads((directory / "report.json").read_text()) == found


def test_export_shows_what_was_checked(converted):
    result = call(
        "export", converted, "--no-onnx", "--safetensors", "--precision", "bf16", "-o", converted.with_name("out")
    )
    assert result.exit_code == 0
    assert "every check holds: " in words(result)
    assert sorted(p.name for p in converted.with_name("out").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "report.json",
    ]


def test_export_takes_inputs(converted):
    assert answer("export", converted, "--input", "3x16")["inputs"] == "3x16 (values made up)"
    assert complaint("export", converted, "--input", "3x5", "--overwrite") == (
        "Sequential does not take the inputs 3x5 (values made up): "
        "mat1 and mat2 shapes cannot be multiplied (3x5 and 16x16)"
    )


def test_export_of_an_unfinished_model_needs_force(dense):
    call("convert", dense)
    path = dense.with_name("net.nm.pt")
    text = complaint("export", path)
    assert text.startswith("2 layers are not N:M yet (lbc 2:4; ")
    assert "use --force" in text
    assert not dense.with_name("net-export").exists()
    assert answer("export", path, "--force")["holds"] is True


def test_export_that_does_not_agree_exits_with_1(tmp_path):
    nmgraph.save(nmgraph.convert(NeverTheSame(), method="srste"), tmp_path / "net.nm.pt")
    arguments = ("export", tmp_path / "net.nm.pt", "--trust", "models", "--input", "8x16", "--overwrite")
    found = answer(*arguments, code=1)
    assert (found["holds"], found["weights"]["holds"], found["onnx"]["holds"], found["parity"]["holds"]) == (
        False,
        True,
        True,
        False,
    )
    assert "A CHECK DID NOT HOLD" in words(call(*arguments))


def test_export_of_an_engine_without_tensorrt_fails_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = complaint("export", tmp_path / "no-such-model.nm.pt", "--trt")
    assert text.startswith("--trt needs TensorRT, which is not installed: pip install tensorrt")
    assert "--trt-command" in text


def test_export_prints_the_command_for_another_machine(converted):
    out = converted.with_name("net-export")
    line = "trtexec --onnx=model.onnx --saveEngine=model.plan --stronglyTyped --sparsity=enable "
    result = call("export", converted, "--trt-command")
    assert result.exit_code == 0
    note = f"To build the engine on another machine, in a copy of {out}:\n{line}"
    assert note in result.stdout
    assert "Export with --precision fp16." in words(result)
    assert answer("export", converted, "--trt-command", "--overwrite")["trtexec"].startswith(line)
    assert answer("export", converted, "--overwrite")["trtexec"] == ""


def test_export_projects_what_sparse_tactics_could_not_take(tmp_path):
    nmgraph.save(nmgraph.convert(mlp(), method="srste", pattern="4:8"), tmp_path / "net.nm.pt")
    assert complaint("export", tmp_path / "net.nm.pt", "--trt-command").startswith(
        "no sparse layer (0, 2) could use TensorRT's sparse tactics"
    )
    assert not (tmp_path / "net-export").exists()
    found = answer("export", tmp_path / "net.nm.pt", "--trt-command", "--project", "2:4")
    assert [(p["name"], p["before"], p["after"]) for p in found["projected"]] == [
        ("0", "4:8", "2:4"),
        ("2", "4:8", "2:4"),
    ]
    assert all(0.5 < p["kept_magnitude"] < 1 for p in found["projected"])


def test_bar_moves_once_a_stage_and_tells_how_far_it_is(monkeypatch):
    from nmgraph import console

    updates = []
    monkeypatch.setattr(console.Progress, "update", lambda self, task, **values: updates.append(values))
    with console.progress_bar(True, 3) as progress:
        for stage in ("writing", "building", "building: 50 %", "building: 100 %", "running"):
            progress(stage)
    assert [(u["description"], int(u["advance"])) for u in updates] == [
        ("writing", 1), ("building", 1), ("building: 50 %", 0), ("building: 100 %", 0), ("running", 1),
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """One finalized model in every kind of file."""
    model = nmgraph.finalize(nmgraph.convert(mlp(), method="srste"))
    nmgraph.export(model, tmp_path / "export", example_inputs=torch.zeros(1, 16), safetensors=True)
    torch.save(model, tmp_path / "module.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    nmgraph.save(nmgraph.convert(mlp(), method="srste"), tmp_path / "net.nm.pt")
    return {
        "module.pt": tmp_path / "module.pt",
        "state.pt": tmp_path / "state.pt",
        "net.nm.pt": tmp_path / "net.nm.pt",
        "model.onnx": tmp_path / "export" / "model.onnx",
        "model.safetensors": tmp_path / "export" / "model.safetensors",
    }


def test_verify_reads_every_kind_of_file(files):
    for path in files.values():
        found = answer("verify", path)
        assert found["holds"] is True
        assert [(c["pattern"], c["density"], c["tensorrt"]) for c in found["checks"]] == [("2:4", 0.5, "")] * 2
        failed = answer("verify", path, "--pattern", "1:4", code=1)
        assert failed["holds"] is False
        assert {c["pattern"] for c in failed["checks"]} == {"1:4"}


@pytest.fixture
def compressed(converted):
    answer("export", converted, "--no-onnx", "--safetensors", "--precision", "fp16")
    return converted.with_name("net-export") / "model.safetensors"


def test_export_says_the_sizes_of_compressed_weights(converted):
    found = answer("export", converted, "--no-onnx", "--safetensors", "--precision", "fp16")
    assert found["compression"] == {"weights": 2, "dense_bytes": 768, "compressed_bytes": 432, "ratio": 0.5625}
    shown = call("export", converted, "--no-onnx", "--safetensors", "--precision", "fp16", "--overwrite")
    assert "56.25%" in words(shown)
    assert "432 bytes in place of 768 for 2 weights" in words(shown)


def test_verify_of_a_damaged_compressed_file_exits_with_1_and_names_the_weight(compressed):
    content = bytearray(compressed.read_bytes())
    content[-1] = 0  # the last tensor is 2.weight.positions
    compressed.write_bytes(content)
    found = answer("verify", compressed, code=1)
    assert [(c["name"], c["finding"]) for c in found["checks"] if not c["holds"]] == [
        ("2.weight", "block 2 of output 7, position 0 stores the positions 0, 0; they must ascend and be below 4")
    ]
    assert "2:4 fails: block 2 of output 7" in words(call("verify", compressed))


def test_verify_of_a_truncated_compressed_file_is_a_mistake(compressed):
    compressed.write_bytes(compressed.read_bytes()[:-1])
    assert complaint("verify", compressed).startswith(f"{compressed} can't be read as safetensors: ")


def test_compressed_weights_without_their_model_are_a_mistake(compressed):
    assert complaint("export", compressed, "-o", compressed.with_name("out")) == (
        f"{compressed} holds weights without their model. Give the dense model, whose tensors are replaced: "
        "nmgraph.load(path, model=model), or --model package.module:function."
    )


def test_compressed_weights_and_their_model_export_again(compressed):
    found = answer("export", compressed, "--model", "models:mlp", "-o", compressed.with_name("out"))
    assert (found["holds"], found["weights"]["holds"], found["onnx"]["holds"]) == (True, True, True)


def test_verify_of_a_dense_model_exits_with_1(dense):
    assert answer("verify", dense, code=1)["holds"] is False
    result = call("verify", dense)
    assert result.exit_code == 1
    assert "0 of 2 weights hold; 0 ready for 2:4 sparse tactics" in words(result)


def test_verify_of_a_changed_onnx_file_exits_with_1(files):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(files["model.onnx"])
    tensor = next(t for t in model.graph.initializer if t.name == "2.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[5, 8:12] = 1.0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, files["model.onnx"])
    found = answer("verify", files["model.onnx"], code=1)
    assert [(c["name"], c["finding"]) for c in found["checks"] if not c["holds"]] == [
        ("2", "block 2 of output 5, position 0 keeps 4 of 4")
    ]


@pytest.mark.parametrize("name", ["none.pt", "none.onnx", "none.safetensors", "none.nm.pt"])
def test_verify_of_a_missing_file_is_a_mistake(name, tmp_path):
    assert str(tmp_path / name) in complaint("verify", tmp_path / name)


def test_verify_of_a_factory_model(tmp_path):
    nmgraph.save(nmgraph.convert(mlp(), method="srste"), tmp_path / "net.nm.pt", factory="models:mlp")
    assert answer("verify", tmp_path / "net.nm.pt", "--model", "models:mlp")["holds"] is True


def test_single_layer_goes_through_every_command(tmp_path):
    torch.save(nn.Linear(16, 8), tmp_path / "layer.pt")
    assert answer("convert", tmp_path / "layer.pt", "--method", "srste")["entries"][0]["converted"] is True
    assert len(answer("status", tmp_path / "layer.nm.pt")["layers"]) == 1
    assert answer("export", tmp_path / "layer.nm.pt")["holds"] is True
    assert answer("verify", tmp_path / "layer-export" / "model.onnx")["holds"] is True


def test_what_is_set_beside_a_preset_is_said_with_it(dense):
    arguments = (
        "convert",
        dense,
        "--preset",
        "code",
        "--set",
        "score_decay=0.01",
        "--set",
        "momentum=0.5",
        "--keep-dense",
        "stem",
    )
    shown = call(*arguments).stdout
    assert "Preset code: t_i=0.0, t_f=0.5, momentum=0.9, score_decay=0.0001; layers kept dense: stem, head" in shown
    assert "Set otherwise here: momentum=0.5; score_decay=0.01; layers kept dense: stem." in shown
    found = answer(*arguments, "--overwrite")
    assert (found["options"]["score_decay"], found["preset"]["name"]) == (0.01, "code")


def test_every_exported_file_may_be_read_by_whom_a_new_file_may(converted, tmp_path):
    (tmp_path / "new").touch()
    call("export", converted, "--safetensors", "-o", tmp_path / "out")
    assert {f.stat().st_mode for f in (tmp_path / "out").iterdir()} == {(tmp_path / "new").stat().st_mode}
