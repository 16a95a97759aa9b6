"""What the first people to try nmgraph ran into."""

import os
import threading

import pytest
import torch
from handles import nm
from models import mlp
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

import nmgraph
from nmgraph.cli import app
from nmgraph.errors import ConversionError, ExportError, FileError
from nmgraph.export.inputs import parse_inputs

WIDTH = 16  # of what models.mlp takes


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_weights_that_diverged_are_not_finalized_or_called_sparse():
    model = nmgraph.convert(mlp(), method="srste")
    with torch.no_grad():
        nm(model[0]).raw[0, 0] = torch.nan
    with pytest.raises(ConversionError) as caught:
        nmgraph.finalize(model)
    assert str(caught.value) == (
        "0: the trained weights are NaN or infinite, so there is nothing to finalize. Go back to a checkpoint taken "
        "before training diverged."
    )
    dense = mlp()
    dense.load_state_dict({key: torch.zeros_like(value) * torch.nan for key, value in dense.state_dict().items()})
    found = nmgraph.verify(dense)
    assert not found.holds
    assert {c.finding for c in found.checks} == {"it holds NaN or infinity"}


def test_a_device_is_no_place_for_a_model(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileError) as caught:
        nmgraph.save(nmgraph.convert(mlp()), pipe)
    assert str(caught.value) == f"{pipe} is no regular file, and is kept. Choose another place with -o."
    assert pipe.is_fifo()


def test_a_link_goes_on_leading_to_the_file_that_is_written(tmp_path):
    target, link = tmp_path / "target.nm.pt", tmp_path / "link.nm.pt"
    target.write_bytes(b"old")
    link.symlink_to(target)
    nmgraph.save(nmgraph.convert(mlp()), link)
    assert link.is_symlink()
    assert len(nmgraph.manifest(nmgraph.load(target)).converted) == 2


def test_threads_that_save_to_one_place_do_not_disturb_each_other(tmp_path):
    errors, path = [], tmp_path / "model.nm.pt"
    model = nmgraph.convert(mlp(), method="srste")

    def save():
        try:
            for _ in range(5):
                nmgraph.save(model, path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [p.name for p in tmp_path.iterdir()] == ["model.nm.pt"]
    nmgraph.load(path)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_a_wrapped_model_is_converted_inside_and_saved_without_the_wrapper(wrap, tmp_path):
    with pytest.raises(ConversionError, match=r"Convert the Sequential inside first, and wrap it after\.$"):
        nmgraph.convert(wrap(mlp()))
    wrapped = wrap(nmgraph.convert(mlp(), method="srste"))
    nmgraph.save(wrapped, tmp_path / "model.nm.pt")
    assert type(nmgraph.load(tmp_path / "model.nm.pt")) is nn.Sequential
    assert type(nmgraph.finalize(wrapped)) is nn.Sequential
    assert nmgraph.export(wrapped, tmp_path / "export").holds


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    (tmp_path / "run[").mkdir()
    path, converted = (tmp_path / "run[" / f"x] [red].{end}" for end in ("pt", "nm.pt"))
    torch.save(mlp(), path)
    assert call("convert", path, "--method", "srste").exit_code == 0
    for command in ("status", "export", "verify"):
        assert call(command, converted).exit_code == 0
    assert "run[/x] [red].nm.pt" in call("status", converted).stdout.replace("\n", "")


def test_layers_without_weights_stay_dense():
    model = nmgraph.convert(nn.Sequential(nn.Linear(16, 0), nn.Linear(16, 8)))
    assert [(e.name, e.reason) for e in nmgraph.manifest(model).skipped] == [("0", "it has no weights")]


def test_torchscript_is_refused():
    with pytest.raises(
        ConversionError, match=r"is TorchScript, whose layers can't be changed\. Convert the Python model\.$"
    ):
        nmgraph.convert(torch.jit.trace(mlp(), torch.randn(1, WIDTH)))


@pytest.mark.parametrize("command", ["convert", "export"])
@pytest.mark.parametrize("place", [".", "/"])
def test_a_directory_is_no_model(command, place):
    result = call(command, place)
    assert result.exit_code == 2
    assert f"error: {place} is a directory; give a model's file" in result.stderr


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "model.nm.pt"
    nmgraph.save(nmgraph.convert(mlp()), path)
    content = bytearray(path.read_bytes())
    for place in range(200, len(content), len(content) // 40):
        damaged = bytearray(content)
        damaged[place] ^= 0b100
        path.write_bytes(damaged)
        try:
            loaded = nmgraph.load(path)
        except FileError:
            continue
        # What is no content of a member: padding, or a time in the directory.
        assert len(nmgraph.manifest(loaded).converted) == 2


@pytest.mark.parametrize("text", ["0x16", "1x99999999999999"])
def test_an_impossible_input_is_said(text):
    with pytest.raises(ExportError, match=r"is no input\.|can't be made"):
        parse_inputs([text])


def test_a_layer_that_was_taken_out_is_missed():
    finished = nmgraph.finalize(nmgraph.convert(mlp(), method="srste"))
    finished[0] = nn.Identity()
    found = nmgraph.verify(finished)
    assert not found.holds
    assert found.problems == ("there is no layer 0 any more",)


def test_the_dense_model_is_never_its_own_output(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(mlp(), path)
    result = call("convert", path, "-o", path, "--overwrite")
    assert result.exit_code == 2
    assert "is the dense model itself, and is kept." in result.stderr
    assert isinstance(torch.load(path, weights_only=False), nn.Sequential)


def test_a_parametrization_on_a_converted_layer_is_said():
    model = nmgraph.convert(mlp())
    with pytest.raises(RuntimeError, match=r"^0: its weight was taken away after conversion"):
        nn.utils.parametrizations.weight_norm(model[0])


def test_verify_says_that_training_is_not_finished():
    found = nmgraph.verify(nmgraph.convert(mlp(), method="lbc"))
    assert not found.holds
    assert found.problems == ("training is not finished: 2 layers are not N:M yet",)
