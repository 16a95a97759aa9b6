"""Files of other programs are recognised by their content, and said with the remedy; never a traceback."""

import zipfile

import numpy as np
import onnx
import pytest
import torch
from models import mlp
from onnx import TensorProto, helper
from safetensors.torch import save_file

import nmgraph
from nmgraph.checkpoint.dense_file import open_dense, read_dense
from nmgraph.errors import FileError


def message(path, **options):
    with pytest.raises(FileError) as caught:
        open_dense(path, **options)
    assert type(caught.value) is FileError
    return str(caught.value).replace(f"{path} ", "", 1)


def zipped(path, *members):
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, "x")


def onnx_file(path):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, producer_name="pytorch"), path)


ONNX, KERAS, NUMPY = (
    "is an ONNX file, which holds a graph",
    "is a TensorFlow or Keras file. ",
    "holds numpy arrays without",
)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (onnx_file, ONNX),
        (lambda p: p.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40)), "is a GGUF file, whose weights are quantized. "),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40)), KERAS),
        (lambda p: p.write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(40)), KERAS),
        (lambda p: zipped(p, "metadata.json", "config.json", "model.weights.h5"), KERAS),
        (lambda p: np.savez(p.open("wb"), a=np.zeros(3), b=np.ones(2)), NUMPY),
        (lambda p: np.save(p.open("wb"), np.zeros(3)), NUMPY),
        (lambda p: zipped(p, "word/document.xml"), "is a zip archive, but not one of torch.save."),
        (lambda p: torch.jit.save(torch.jit.trace(mlp(), torch.randn(1, 16)), p), "is TorchScript, whose layers can't"),
        (
            lambda p: save_file(mlp().state_dict(), p),
            "holds weights without their model. Say what makes the model: --model",
        ),
    ],
    ids=["onnx", "gguf", "h5", "tflite", "keras", "npz", "npy", "zip", "torchscript", "safetensors"],
)
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_file_of_another_program_is_named(write, said, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    write(path)
    assert message(path).startswith(said)


@pytest.mark.parametrize("suffix", [".pt", ".ts", ".ptl"])
def test_torchscript_under_any_name(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    torch.jit.save(torch.jit.script(mlp()), path)
    assert message(path) == (
        "is TorchScript, whose layers can't be trained sparse. Save the Python model with torch.save(model, ...)."
    )


def test_onnx_file_is_known_by_its_suffix_however_it_begins(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"anything")
    assert message(tmp_path / "m.onnx").startswith(ONNX)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            [".metadata", "__0_0.distcp"],
            "is a distributed checkpoint. Put it into one file, and name its model with --model:\n",
        ),
        (["saved_model.pb"], KERAS),
        (["report.json", "manifest.json"], "is an export of nmgraph. "),
        (["model.safetensors"], "holds weights, but no config.json that names their model. "),
        ([], "is a directory; give a model's file, or a Hugging Face directory with config.json."),
    ],
)
def test_directory_that_is_no_model_is_named(names, said, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    assert message(tmp_path).startswith(said)


def test_the_line_for_a_distributed_checkpoint_works(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    model = mlp()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    lines = [line.strip() for line in message(tmp_path / "dcp").splitlines()[1:]]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {})
    assert torch.equal(open_dense("model.pt", factory="models:mlp")[0].weight, model[0].weight)


def test_safetensors_with_its_model_is_a_state_dict(tmp_path):
    model, path = mlp(), tmp_path / "w.safetensors"
    save_file({f"module.{k}": v for k, v in model.state_dict().items()}, path)
    dense = read_dense(path, factory="models:mlp")
    assert torch.equal(dense.model[0].weight, model[0].weight)
    assert dense.notes == ("All keys of w.safetensors begin with 'module.', which was taken off.",)


def test_compressed_safetensors_open_dense(tmp_path):
    model = nmgraph.convert(mlp(), method="srste")
    nmgraph.export(model, tmp_path / "out", onnx=False, safetensors=True)
    opened = open_dense(tmp_path / "out" / "model.safetensors", factory="models:mlp")
    assert torch.equal(opened[0].weight, nmgraph.finalize(model)[0].weight)


def test_truncated_safetensors_say_so(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(mlp().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "can't be read as safetensors" in message(path, factory="models:mlp")
