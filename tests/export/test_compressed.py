"""Exported weights hold only what they keep; they read back bit for bit, and damage is found and named."""

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
from models import cnn, mlp
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18

import nmgraph
from nmgraph.checkpoint import decompress as reader
from nmgraph.checkpoint.decompress import decompress
from nmgraph.errors import ExportError, FileError

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def export(model, directory, precision="fp32", **options):
    options = {"method": "srste"} | options
    converted = nmgraph.convert(model, **options)
    report = nmgraph.export(converted, directory, onnx=False, safetensors=True, precision=precision)
    return converted, report, directory / "model.safetensors"


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.view(INTEGERS[one.itemsize]), other.view(INTEGERS[other.itemsize])
    )


def same_state(model, other):
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one)


def metadata_of(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def rewrite(path, change):
    """Write the file again, as ``change`` makes its tensors, header and manifest."""
    tensors, metadata = load_file(path), metadata_of(path)
    header, manifest = (json.loads(metadata[key]) for key in ("nmgraph.compressed", "nmgraph.manifest"))
    change(tensors, header, manifest)
    metadata |= {"nmgraph.compressed": json.dumps(header), "nmgraph.manifest": json.dumps(manifest)}
    save_file(tensors, path, metadata)


TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
    from nmgraph.nm.masks import magnitude_mask
    from nmgraph.nm.pattern import Pattern
    from nmgraph.passes.compression import compress_state
    from nmgraph.passes.manifest import Entry, Manifest

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
    from nmgraph.nm.pattern import Pattern
    from nmgraph.passes.compression import compress_state
    from nmgraph.passes.manifest import Entry, Manifest

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


def refusal(path, model=None):
    with pytest.raises(FileError) as caught:
        nmgraph.load(path, model=model)
    return str(caught.value)


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(1)
    return export(mlp(), tmp_path / "export", layers={"2": "2:8"})[2]


def test_load_without_a_model_says_what_to_give(exported):
    assert refusal(exported) == (
        f"{exported} holds weights without their model. Give the dense model, whose tensors are replaced: "
        "nmgraph.load(path, model=model), or --model package.module:function."
    )


def test_load_into_a_converted_model_is_refused(exported):
    assert refusal(exported, nmgraph.convert(mlp(), method="srste")) == (
        f"{exported} can't be loaded into this Sequential, which is converted already. Give the dense model."
    )


def test_load_into_another_model_is_refused_and_leaves_it_as_it_was(exported):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert refusal(exported, model) == (
        f"{exported} was made from another model than this Sequential:\n"
        "  2.weight is 8x16 in the file, 4x16 in the model\n  2.bias is 8 in the file, 4 in the model"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_load_of_weights_with_their_zeros_says_how_to_load_them(tmp_path):
    path = tmp_path / "dense.safetensors"
    save_file(mlp().state_dict(), path)
    assert refusal(path, mlp()) == (
        f"{path} holds no compressed weights. Load it with safetensors.torch.load_model(model, {str(path)!r})."
    )


DAMAGES = {
    "2, 2 of 4": (lambda t: t["0.weight.positions"].__setitem__(3, 0b10_10_01_00), "0.weight",
                  "block 3 of output 1, position 0 stores the positions 2, 2; they must ascend and be below 4"),
    "descending": (lambda t: t["2.weight.positions"].__setitem__(slice(0, 3), torch.tensor([0o07, 0, 0])), "2.weight",
                   "block 0 of output 0, position 0 stores the positions 7, 0; they must ascend and be below 8"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_positions_fail_verification_with_the_weight_and_the_block(exported, damage):
    change, name, finding = DAMAGES[damage]
    rewrite(exported, lambda tensors, *_: change(tensors))
    found = nmgraph.verify(exported)
    assert not found.holds
    assert [(c.name, c.finding) for c in found.failures] == [(name, finding)]
    assert str(found) == "1 of 2 weights hold; 1 ready for 2:4 sparse tactics"
    assert refusal(exported, mlp()) == f"{exported} is damaged: {name}: {finding}. Copy it again, or export again."
    with pytest.raises(ValueError, match=f"{name}.positions is damaged: the positions of a block do not ascend below"):
        decompress(exported)


def test_positions_beyond_the_block_are_found(tmp_path):
    _, _, path = export(nn.Linear(18, 8), tmp_path / "export", pattern="2:6")
    rewrite(path, lambda tensors, *_: tensors["weight.positions"].__setitem__(slice(0, 3), 255))
    finding = "block 0 of output 0, position 0 stores the positions 7, 7; they must ascend and be below 6"
    assert [c.finding for c in nmgraph.verify(path).failures] == [finding]
    assert str(nmgraph.verify(path)) == "0 of 1 weights hold; 0 ready for 2:4 sparse tactics"
    assert refusal(path, nn.Linear(18, 8)) == f"{path} is damaged: weight: {finding}. Copy it again, or export again."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_value_fails_verification_with_the_weight(exported, value):
    rewrite(exported, lambda tensors, *_: tensors["0.weight.values"].view(-1).__setitem__(5, value))
    assert [(c.name, c.finding) for c in nmgraph.verify(exported).failures] == [
        ("0.weight", "it holds NaN or infinity")
    ]


def weight(header):
    return header["weights"]["0.weight"]


HUGE = 2**40
HOSTILE = {
    "no positions": (lambda t, h, m: t.pop("0.weight.positions"),
                     "it has no tensor '0.weight.positions', which '0.weight' is stored in"),
    "no values": (lambda t, h, m: t.pop("0.weight.values"), "it has no tensor '0.weight.values', which '0.weight' is stored in"),
    "no weight": (lambda t, h, m: h["weights"].pop("0.weight"),
                  "it has no tensor 0.weight, which its manifest says was converted"),
    "short positions": (lambda t, h, m: t.update({"0.weight.positions": t["0.weight.positions"][:-1].clone()}),
                        "0.weight.positions is U8 [31]; a weight [16, 16] at 2:4 needs U8 [32]"),
    "wide positions": (lambda t, h, m: t.update({"0.weight.positions": t["0.weight.positions"].short()}),
                       "0.weight.positions is I16 [32]; a weight [16, 16] at 2:4 needs U8 [32]"),
    "long values": (lambda t, h, m: t.update({"0.weight.values": torch.zeros(16, 1, 5, 2)}),
                    "0.weight.values is F32 [16, 1, 5, 2]; a weight [16, 16] at 2:4 needs F32 [16, 1, 4, 2]"),
    "other values": (lambda t, h, m: t.update({"0.weight.values": t["0.weight.values"].half()}),
                     "0.weight.values is F16 [16, 1, 4, 2]; a weight [16, 16] at 2:4 needs F32 [16, 1, 4, 2]"),
    "huge": (lambda t, h, m: weight(h).update(shape=[HUGE, HUGE]),
             f"0.weight.values is F32 [16, 1, 4, 2]; a weight [{HUGE}, {HUGE}] at 2:4 needs F32 [{HUGE}, 1, {HUGE // 4}, 2]"),
    "no size": (lambda t, h, m: weight(h).update(shape=[0, 16]),
                "its header says of '0.weight' what can't be: [0, 16] is no weight's shape"),
    "half sizes": (lambda t, h, m: weight(h).update(shape=[16, 16.0]),
                   "its header says of '0.weight' what can't be: [16, 16.0] is no weight's shape"),
    "many axes": (lambda t, h, m: weight(h).update(shape=[1] * 1000),
                  f"its header says of '0.weight' what can't be: {[1] * 8} is no weight's shape"),
    "no shape": (lambda t, h, m: weight(h).pop("shape"), "its header does not describe '0.weight' by pattern, shape, dtype, axis, values, positions"),
    "misfit": (lambda t, h, m: weight(h).update(shape=[16, 18]),
               "its header says of '0.weight' what can't be: 18 input channels are not a multiple of 4"),
    "axis": (lambda t, h, m: weight(h).update(axis=2), "its header says of '0.weight' what can't be: there is no reduction axis 2"),
    "axis list": (lambda t, h, m: weight(h).update(axis=[1]),
                  "its header says of '0.weight' what can't be: there is no reduction axis [1]"),
    "dtype": (lambda t, h, m: weight(h).update(dtype="I8"),
              "its header says of '0.weight' what can't be: there is no weight of dtype 'I8'"),
    "pattern": (lambda t, h, m: weight(h).update(pattern="4:4"),
                "its header says of '0.weight' what can't be: pattern 4:4 keeps 4 of every 4 weights, which removes "
                "nothing. Use for example 2:4"),
    "list": (lambda t, h, m: h.update(weights=[]), "its header nmgraph.compressed does not list weights and shared tensors"),
    "null": (lambda t, h, m: h["weights"].update({"0.weight": None}),
             "its header does not describe '0.weight' by pattern, shape, dtype, axis, values, positions"),
    "names": (lambda t, h, m: weight(h).update(values=3),
              "its header says of '0.weight' what can't be: values and positions are not named"),
    "version": (lambda t, h, m: h.update(version=2), "it has format version 2, and this nmgraph reads version 1"),
    "format": (lambda t, h, m: h.update(format="zip"), "its header nmgraph.compressed is not of the format nm-compressed"),
    "twice": (lambda t, h, m: h["weights"].update({"x.weight": weight(h)}), "two of its weights are stored in the same tensor"),
    "both": (lambda t, h, m: t.update({"0.weight": torch.zeros(16, 16)}), "it holds '0.weight' twice, compressed and dense"),
    "shared": (lambda t, h, m: h["shared"].update({"x": "y"}), "it says that 'x' is the same as 'y', which can't be"),
    "shared list": (lambda t, h, m: h["shared"].update({"x": []}), "it says that 'x' is the same as [], which can't be"),
    "manifest axis": (lambda t, h, m: m["entries"][0].update(axis=9), "its manifest gives 0 the reduction axis 9"),
    "manifest truth": (lambda t, h, m: m["entries"][0].update(axis=True), "its manifest gives 0 the reduction axis True"),
    "manifest pattern": (lambda t, h, m: m["entries"][0].update(pattern="1:4"),
                         "its manifest and its header nmgraph.compressed say different things of '0.weight'"),
    "manifest entry": (lambda t, h, m: m["entries"].pop(0),
                       "its manifest and its header nmgraph.compressed say different things of '0.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_contradicts_itself_is_refused_in_plain_words(exported, case):
    change, reason = HOSTILE[case]
    rewrite(exported, change)
    message = f"{exported} can't be read as safetensors: {reason}. Copy it again, or export again."
    assert refusal(exported, mlp()) == message
    with pytest.raises(FileError) as caught:
        nmgraph.verify(exported)
    assert str(caught.value) == message


@pytest.mark.parametrize("case", [case for case in HOSTILE if "manifest" not in case and case != "no weight"])
def test_the_reader_without_torch_refuses_such_files_with_a_value_error(exported, case):
    rewrite(exported, HOSTILE[case][0])
    with pytest.raises(ValueError, match=str(exported)):
        decompress(exported)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000])
@pytest.mark.parametrize("key", ["nmgraph.compressed", "nmgraph.manifest"])
def test_metadata_that_are_not_ours_are_refused(exported, key, text):
    save_file(load_file(exported), exported, metadata_of(exported) | {key: text})
    for read in (nmgraph.verify, lambda path: nmgraph.load(path, model=mlp())):
        with pytest.raises(FileError, match="can't be read as safetensors"):
            read(exported)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(exported, keep):
    exported.write_bytes(exported.read_bytes()[:keep])
    with pytest.raises(FileError, match=f"^{exported} can't be read as safetensors: "):
        nmgraph.verify(exported)
    with pytest.raises(ValueError, match=str(exported)):
        decompress(exported)


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
    import ast

    tree = ast.parse(Path(reader.__file__).read_text())
    roots = {a.name.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    roots |= {n.module.partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert roots - sys.stdlib_module_names == {"numpy"}


def test_the_reader_refuses_sizes_no_machine_has(tmp_path):
    header = json.dumps({"x": {"dtype": "F16", "shape": [0, 2**80], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "huge.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=str(path)):
        decompress(path)


def test_a_weight_times_its_mask_compresses_although_that_leaves_negative_zeros(tmp_path):
    converted = nmgraph.convert(mlp(), method="srste")
    model = nmgraph.finalize(converted)
    with torch.no_grad():
        model[0].weight.copy_(torch.where(model[0].weight == 0, -0.0, model[0].weight))
    report = nmgraph.export(model, tmp_path / "export", onnx=False, safetensors=True)
    assert report.sizes.weights == 2
    loaded = nmgraph.load(tmp_path / "export" / "model.safetensors", model=mlp())
    assert torch.equal(loaded[0].weight, model[0].weight)
