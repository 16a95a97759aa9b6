"""ONNX files timed side by side."""

import pytest
import torch
from models import cnn, mlp

import nmgraph
from nmgraph.errors import ExportError, FileError
from nmgraph.export.inputs import parse_inputs
from nmgraph.export.timing import time_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("files"), []
    for name, make, shape in (("small", mlp, (1, 16)), ("large", cnn, (1, 3, 64, 64))):
        model = nmgraph.convert(make(), method="static")
        nmgraph.export(model, folder / name, example_inputs=torch.randn(shape))
        made.append(folder / name / "model.onnx")
    return made


def timed(paths, **options):
    return time_files(paths, rounds=8, progress=lambda stage: None, **options)


def test_the_larger_network_takes_longer_and_the_first_is_the_measure(files):
    found = timed(files)
    small, large = found.files
    assert (found.rounds, small.ratio) == (8, 1.0)
    assert small.median_ms < large.median_ms
    assert large.ratio == pytest.approx(small.median_ms / large.median_ms)
    for each in found.files:
        assert 0 < each.quartiles_ms[0] <= each.median_ms <= each.quartiles_ms[1]
    assert large.inputs.endswith("1x3x64x64")


def test_given_inputs_are_the_ones_it_is_called_with(files):
    assert "1x16" in timed(files[:1], inputs=parse_inputs(["1x16"])).files[0].inputs


@pytest.mark.parametrize("texts", [["1x16", "1x16"], ["other=1x16"]])
def test_inputs_that_do_not_match_name_those_it_takes(files, texts):
    with pytest.raises(ExportError, match=r"^model\.onnx takes \w+; give one --input for each"):
        timed(files[:1], inputs=parse_inputs(texts))


def test_a_shape_it_does_not_run_on_is_said_in_a_line(files):
    with pytest.raises(ExportError, match=r"^ONNX Runtime can't run .*model\.onnx: .*17"):
        timed(files[:1], inputs=parse_inputs(["1x17"]))


def test_what_is_no_onnx_file_is_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "model.pt").write_bytes(b"")
    for name, text in (
        ("gone.onnx", "does not exist"),
        ("bad.onnx", "ONNX Runtime can't read"),
        ("model.pt", "no .onnx"),
    ):
        with pytest.raises(FileError, match=text):
            timed([tmp_path / name])
