"""Exported weights hold only what they keep, read back bit for bit, and can be read without torch."""

import ast
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from compressed import TORCH, export, metadata_of, same_bits, same_state
from models import cnn, mlp
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18

import nmgraph
from nmgraph.checkpoint import decompress as reader
from nmgraph.checkpoint.decompress import decompress
from nmgraph.errors import ExportError
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.compression import compress_state
from nmgraph.passes.manifest import Entry, Manifest


def vit_tiny():
    return timm.create_model("vit_tiny_patch16_224", depth=2)


@pytest.mark.parametrize("precision", TORCH)
@pytest.mark.parametrize("make", [resnet18, vit_tiny])
def test_a_real_network_comes_back_bit_for_bit(make, precision, tmp_path):
    converted, report, path = export(make(), tmp_path / "export", precision)
    expected = nmgraph.finalize(converted).to(TORCH[precision])
    loaded = nmgraph.load(path, model=make().to(TORCH[precision]))
    assert type(loaded) is type(expected)
    assert same_state(loaded, expected)
    found = nmgraph.verify(path)
    assert (found.holds, report.holds, nmgraph.verify(loaded).holds) == (True, True, True)
    assert sum(c.expected for c in found.checks) == report.sizes.weights == len(nmgraph.manifest(converted).converted)


def test_every_weight_of_a_real_network_is_stored_as_the_header_says(tmp_path):
    converted, _, path = export(resnet18(), tmp_path / "export", "fp16")
    header = json.loads(metadata_of(path)["nmgraph.compressed"])
    assert (header["format"], header["version"], header["shared"]) == ("nm-compressed", 1, {})
    assert header["weights"].keys() == {f"{entry.name}.weight" for entry in nmgraph.manifest(converted).converted}
    assert header["weights"]["layer2.0.conv1.weight"] == {
        "pattern": "2:4",
        "shape": [128, 64, 3, 3],
        "dtype": "F16",
        "axis": 1,
        "values": "layer2.0.conv1.weight.values",
        "positions": "layer2.0.conv1.weight.positions",
    }
    tensors = load_file(path)
    assert tensors["layer2.0.conv1.weight.values"].shape == (128, 9, 16, 2)
    assert tensors["layer2.0.conv1.weight.positions"].shape == (128 * 9 * 16 * 2 // 4,)
    finished = nmgraph.finalize(converted).half().state_dict()
    assert tensors.keys() - {f"{w}.{part}" for w in header["weights"] for part in ("values", "positions")} == (
        finished.keys() - header["weights"].keys()
    )
    assert all(same_bits(tensors[key], finished[key]) for key in finished.keys() & tensors.keys())


@pytest.mark.parametrize(
    ("pattern", "precision", "ratio"),
    [("2:4", "fp16", 0.5625), ("2:4", "bf16", 0.5625), ("2:4", "fp32", 0.53125), ("1:4", "fp16", 0.28125),
     ("4:8", "fp16", 0.59375), ("1:16", "fp32", 1 / 16 * (1 + 4 / 32))],
)  # fmt: skip
def test_report_says_the_sizes(pattern, precision, ratio, tmp_path):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    _, report, path = export(model, tmp_path / "export", precision, pattern=pattern)
    dense = (64 * 128 + 128 * 32) * TORCH[precision].itemsize
    said = {"weights": 2, "dense_bytes": dense, "compressed_bytes": dense * ratio, "ratio": ratio}
    assert report.to_dict()["compression"] == said
    assert json.loads((path.parent / "report.json").read_text())["compression"] == said
    assert sum(t.nbytes for name, t in load_file(path).items() if "weight" in name) == dense * ratio


def test_table_says_the_sizes(tmp_path):
    _, report, _ = export(nn.Linear(64, 32), tmp_path / "export", "fp16")
    console = Console(width=160, file=io.StringIO())
    console.print(report)
    row = next(line for line in console.file.getvalue().splitlines() if "compressed weights" in line)
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["56.25%", "2,304 bytes in place of 4,096 for 1 weights"]


def test_export_without_safetensors_says_no_sizes(tmp_path):
    report = nmgraph.export(
        nmgraph.convert(mlp(), method="srste"), tmp_path / "export", example_inputs=torch.ones(1, 16)
    )
    assert report.to_dict()["compression"] is None


def test_layers_keep_patterns_of_their_own(tmp_path):
    layers = {"layer3.*": "1:4", "layer4.*": "4:8", "fc": "3:16"}
    converted, _, path = export(resnet18(), tmp_path / "export", layers=layers)
    assert same_state(nmgraph.load(path, model=resnet18()), nmgraph.finalize(converted))
    assert {c.pattern for c in nmgraph.verify(path).checks if c.expected} == {"2:4", "1:4", "4:8", "3:16"}
    assert nmgraph.verify(path).holds


def test_flat_blocks_come_back(tmp_path):
    converted, _, path = export(cnn(), tmp_path / "export", block_axis="flat", pattern="2:4")
    header = json.loads(metadata_of(path)["nmgraph.compressed"])
    assert header["weights"]["3.weight"]["axis"] == "flat"
    assert same_state(nmgraph.load(path, model=cnn()), nmgraph.finalize(converted))
    assert nmgraph.verify(path).holds
    assert all(np.array_equal(v, nmgraph.finalize(converted).state_dict()[k]) for k, v in decompress(path).items())


def test_weights_with_their_reduction_axis_first_come_back(tmp_path):
    dense = torch.randn(8, 6, 3)
    w_OSC = dense.permute(1, 2, 0)
    dense *= magnitude_mask(w_OSC, Pattern(2, 4)).permute(2, 0, 1)
    entry = Entry("up", "ConvTranspose1d", (8, 6, 3), "2:4", True, axis=0)
    tensors, schema, _ = compress_state({"up.weight": dense}, Manifest("srste", (entry,)))
    assert tensors["up.weight.values"].shape == (6, 3, 2, 2)
    assert torch.equal(schema.weights["up.weight"].dense(tensors), dense)  # but for the negative zeros of the mask
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"nmgraph.compressed": schema.to_json()})
    assert np.array_equal(decompress(path)["up.weight"], dense.numpy())


def test_double_precision_and_odd_positions_come_back(tmp_path):
    dense = torch.zeros(3, 7 * 5, dtype=torch.float64)
    dense[:, 6::7] = torch.randn(3, 5, dtype=torch.float64)
    tensors, schema, _ = compress_state(
        {"weight": dense}, Manifest("srste", (Entry("", "Linear", (3, 35), "2:7", True),))
    )
    assert same_bits(schema.weights["weight"].dense(tensors), dense)
    assert schema.weights["weight"].pattern == Pattern(2, 7)


def tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    return model


class Shared(nn.Module):
    """One layer under two names, of which the second comes first in the alphabet."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Linear(16, 16)
        self.inner = self.outer

    def forward(self, x):
        return self.inner(self.outer(x))


@pytest.mark.parametrize("make", [tied, Shared])
def test_tied_weights_are_stored_once_and_come_back_under_all_their_names(make, tmp_path):
    converted, _, path = export(make(), tmp_path / "export")
    header = json.loads(metadata_of(path)["nmgraph.compressed"])
    assert header["shared"]
    assert not header["shared"].keys() & (load_file(path).keys() | header["weights"].keys())
    assert same_state(nmgraph.load(path, model=make()), nmgraph.finalize(converted))
    assert nmgraph.verify(path).holds
    assert decompress(path).keys() == converted.state_dict().keys() - {k for k in converted.state_dict() if ".nm_" in k}


class Views(nn.Module):
    """Buffers that are parts, and another shape, of one memory; none of them contiguous or whole by chance."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)
        whole = torch.arange(12.0)
        self.register_buffer("whole", whole)
        self.register_buffer("table", whole.view(3, 4))
        self.register_buffer("part", whole[2:5])
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("number", torch.tensor(3))

    def forward(self, x):
        return self.linear(x)


def test_buffers_that_share_memory_are_stored(tmp_path):
    converted, _, path = export(Views(), tmp_path / "export")
    loaded = nmgraph.load(path, model=Views())
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in nmgraph.finalize(converted).state_dict().items())


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


def test_state_that_is_no_tensor_is_refused_with_its_name(tmp_path):
    with pytest.raises(ExportError) as caught:
        export(nn.Sequential(Extra(16, 8)), tmp_path / "export")
    assert str(caught.value) == (
        "0._extra_state is a dict, and a safetensors file holds tensors only. Export without --safetensors."
    )
    assert not (tmp_path / "export").exists()


def test_a_weight_that_lost_its_pattern_is_stored_dense_and_found(tmp_path):
    model = nmgraph.finalize(nmgraph.convert(mlp(), method="srste"))
    with torch.no_grad():
        model[2].weight[5, 8:12] = 1.0
    report = nmgraph.export(model, tmp_path / "export", onnx=False, safetensors=True)
    path = tmp_path / "export" / "model.safetensors"
    assert not report.holds
    assert report.sizes.weights == 1
    assert [(c.name, c.finding) for c in nmgraph.verify(path).failures] == [
        ("2.weight", "block 2 of output 5, position 0 keeps 4 of 4")
    ]
    assert same_state(nmgraph.load(path, model=mlp()), model)


def test_load_keeps_the_dtype_of_the_model_and_gives_it_the_manifest(tmp_path):
    converted, _, path = export(mlp(), tmp_path / "export", "fp16", layers={"2": "1:4"})
    model = mlp()
    loaded = nmgraph.load(path, model=model)
    assert loaded is model
    assert loaded[0].weight.dtype == torch.float32
    assert same_state(loaded.half(), nmgraph.finalize(converted).half())
    assert [c.pattern for c in nmgraph.verify(loaded).checks] == ["2:4", "1:4"]
    assert nmgraph.export(loaded, tmp_path / "again", example_inputs=torch.ones(1, 16)).holds


def test_load_takes_the_name_of_a_factory(tmp_path):
    converted, _, path = export(mlp(), tmp_path / "export")
    assert same_state(nmgraph.load(path, model="models:mlp"), nmgraph.finalize(converted))


def test_manifest_and_pattern_are_what_verify_checks_against(tmp_path):
    _, _, path = export(mlp(), tmp_path / "export")
    assert not nmgraph.verify(path, "1:4").holds


def test_a_weight_times_its_mask_compresses_although_that_leaves_negative_zeros(tmp_path):
    converted = nmgraph.convert(mlp(), method="srste")
    model = nmgraph.finalize(converted)
    with torch.no_grad():
        model[0].weight.copy_(torch.where(model[0].weight == 0, -0.0, model[0].weight))
    report = nmgraph.export(model, tmp_path / "export", onnx=False, safetensors=True)
    assert report.sizes.weights == 2
    loaded = nmgraph.load(tmp_path / "export" / "model.safetensors", model=mlp())
    assert torch.equal(loaded[0].weight, model[0].weight)


READER = """
import sys
for name in ("torch", "nmgraph", "safetensors"):
    sys.modules[name] = None  # importing it fails
import numpy as np
from decompress import decompress
np.savez(sys.argv[2], **decompress(sys.argv[1]))
assert not any(name == "torch" or name.startswith("torch.") for name in sys.modules if sys.modules[name])
"""


@pytest.mark.parametrize("precision", TORCH)
def test_the_reader_needs_neither_torch_nor_nmgraph(precision, tmp_path):
    converted, _, path = export(cnn(), tmp_path / "export", precision, layers={"3": "3:8", "7": "1:16"})
    shutil.copy(reader.__file__, tmp_path)
    (tmp_path / "read.py").write_text(READER)
    command = [sys.executable, "read.py", str(path), "out.npz"]
    ran = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    found, expected = np.load(tmp_path / "out.npz"), nmgraph.finalize(converted).to(TORCH[precision]).state_dict()
    assert set(found) == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert same_bits(torch.from_numpy(found[name]), wanted), name


def test_the_reader_imports_numpy_and_the_standard_library_only():
    tree = ast.parse(Path(reader.__file__).read_text())
    roots = {a.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    roots |= {n.module.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert roots - sys.stdlib_module_names == {"numpy"}
