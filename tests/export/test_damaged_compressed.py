"""Damaged and hostile files of compressed weights: what is found is named, and nothing shows a traceback."""

import json

import pytest
import torch
from compressed import export, metadata_of, rewrite
from models import mlp
from safetensors.torch import load_file, save_file
from torch import nn

import nmgraph
from nmgraph.checkpoint.decompress import decompress
from nmgraph.errors import FileError


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


def test_the_reader_refuses_sizes_no_machine_has(tmp_path):
    header = json.dumps({"x": {"dtype": "F16", "shape": [0, 2**80], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "huge.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=str(path)):
        decompress(path)
