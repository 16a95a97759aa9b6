"""What reaches a terminal, a file or a pipe: bars and colours where they belong, readable lines, no tracebacks."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from commands import answer, call
from rich.console import Console
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification
from typer.testing import CliRunner

import nmgraph
from nmgraph.cli import app
from nmgraph.passes.manifest import require_manifest as manifest_of

PATHS = os.pathsep.join(map(str, (Path(__file__).parent / "site", Path(__file__).parents[1])))
LAYER = "distilbert.transformer.layer.0.attention.q_lin"
MODEL = "torchvision:squeezenet1_1"


@pytest.fixture
def bert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DistilBertConfig(dim=32, hidden_dim=64, n_layers=1, n_heads=2, vocab_size=120)
    DistilBertForSequenceClassification(config).save_pretrained("bert")
    return tmp_path


def on_terminal(*arguments, **environment):
    """Run a command with a terminal for stdout and stderr, and give its exit code and what the terminal got."""
    own, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nmgraph", *arguments],
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "PYTHONPATH": PATHS, "COLUMNS": "100", "TERM": "xterm-256color", **environment},
    )
    os.close(its)
    got = b""
    while True:
        try:
            got += os.read(own, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            break
    os.close(own)
    return process.wait(), got.decode()


def without_breaks(text):
    return re.sub(r"\s", "", text)


def test_answer_comes_after_the_bar_is_gone():
    code, got = on_terminal("inspect", MODEL)
    assert code == 0
    assert "reading" in got
    assert "counting operations" in got
    bars, _, rest = got.rpartition("\x1b[2K")
    assert "25 sites converted" not in bars
    assert "25 sites converted, 1 skipped" in rest


def test_quiet_prints_one_line_and_no_bar_on_a_terminal():
    code, got = on_terminal("inspect", MODEL, "--quiet")
    assert (code, got) == (
        0, "25 sites converted, 1 skipped, 99.9% of their weights and 93.9% of their operations\r\n",
    )  # fmt: skip


def test_terminal_that_knows_no_codes_gets_none():
    code, got = on_terminal("inspect", MODEL, TERM="dumb")
    assert code == 0
    assert "\x1b" not in got
    assert "25 sites converted, 1 skipped" in got


def test_colours_can_be_switched_off():
    code, got = on_terminal("methods", NO_COLOR="1")
    assert code == 0
    assert "srste" in got
    colours = {code for codes in re.findall(r"\x1b\[([\d;]*)m", got) for code in codes.split(";")}
    assert colours <= {"", "0", "1", "2", "3"}  # bold, dim and italic are no colours


def lines(width, *arguments):
    """Give the lines of an answer that fit, without the note below it."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": str(width)})
    assert (result.exit_code, result.stderr) == (0, "")
    assert not {"…", "\x1b"} & set(result.stdout)
    shown = [line for line in result.stdout.splitlines() if not line.startswith("Wrote ")]
    assert max(map(len, shown)) <= width
    assert [line for line in shown if line.endswith(" ")] == []
    return shown


@pytest.mark.parametrize("width", [50, 80, 140])
def test_names_and_words_of_a_model_with_attention_stay_whole_in_every_table(width, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    torch.save(nn.Sequential(nn.TransformerEncoder(block, 1), nn.Linear(16, 8)), "net.pt")
    name = "0.layers.0.self_attn.in_proj_weight"
    for arguments, words in {
        ("inspect", "net.pt", "--input", "1x4x16", "--sensitivity"): (
            "48x16",
            "weights",
            "operations",
            "unlikely",
            "published",
        ),
        ("convert", "net.pt", "--method", "srste", "--input", "1x4x16"): ("48x16", "operations", "converted"),
        ("status", "net.nm.pt"): ("magnitude", "holds"),
        ("verify", "net.nm.pt"): ("48x16", "pattern", "holds", "ready"),
    }.items():
        shown = " ".join(lines(width, *arguments)).split()
        assert [word for word in (name, *words) if word not in (w.rstrip(",;") for w in shown)] == [], arguments


def test_class_names_do_not_take_the_room_of_names():
    table = Console(width=200, file=io.StringIO())
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True))
    converted = nmgraph.convert(model, method="srste")
    table.print(manifest_of(converted), nmgraph.verify(converted))
    said = table.file.getvalue()
    assert "0.self_attn.out_proj" in said
    assert "NonDynamicallyQuantizableLinear" not in said
    assert "NonDynamicallyQuantizableLinear" in manifest_of(converted).to_json()


@pytest.mark.parametrize("width", [40, 60])
def test_every_answer_is_readable_in_short_lines(width, bert):
    assert "srste" in " ".join(lines(width, "methods")).split()
    converted = ("convert", "bert", "--method", "srste")
    for arguments, words in {
        ("inspect", "bert"): ("MACs12.2%", "shape32x32"),
        converted: ("shape32x32", "decisionconverted"),
        ("status", "bert.nm.pt"): ("srste", "kept50.0%"),
        ("export", "bert.nm.pt", "--no-onnx", "--safetensors"): ("finalizedweights", "everycheckholds"),
        ("verify", "bert.nm.pt"): ("2:4holds", "shape32x32"),
    }.items():
        shown = without_breaks("".join(lines(width, *arguments)))
        for word in (*words, *([LAYER] if arguments[0] != "export" else [])):
            assert word in shown, (arguments, word)


@pytest.mark.slow
def test_every_answer_of_a_resnet_is_readable_in_processes_of_its_own(tmp_path, run_command):
    torch.save(torchvision.models.resnet18(), tmp_path / "r18.pt")
    for arguments in (
        ("methods",),
        ("inspect", "r18.pt"),
        ("convert", "r18.pt", "--method", "srste", "--overwrite"),
        ("status", "r18.nm.pt"),
        ("export", "r18.nm.pt", "--overwrite"),
        ("verify", "r18-export/model.onnx"),
    ):
        for width in (40, 60, 80):
            result = run_command(*arguments, COLUMNS=str(width))
            assert (result.returncode, result.stderr) == (0, "")
            assert not {"…", "\x1b"} & set(result.stdout)
            table = [line for line in result.stdout.splitlines() if not line.startswith("Wrote ")]
            assert max(map(len, table)) <= width
            if arguments[0] not in ("methods", "export"):
                assert "layer1.0.conv1" in result.stdout


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--quiet"]], ids=" ".join)
def test_reader_that_has_left_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        result = subprocess.run(
            [sys.executable, "-m", "nmgraph", *arguments],
            stdout=gone,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": PATHS},
            text=True,
        )
    assert (result.returncode, result.stderr) == (1, "")


def test_quiet_prints_what_a_script_needs(bert):
    def quiet(*arguments, code=0):
        result = call(*arguments, "--quiet")
        assert (result.exit_code, result.stderr) == (code, "")
        return result.stdout

    assert quiet("methods").split()[-1] == "tmask"
    assert quiet("convert", "bert", "--method", "srste") == "bert.nm.pt\n"
    assert quiet("status", "bert.nm.pt") == "8 of 8 layers are N:M\n"
    assert quiet("export", "bert.nm.pt", "-o", "out") == "out\n"
    assert quiet("verify", "out/model.onnx").startswith("8 of 8 weights hold; ")
    assert quiet("verify", "bert", code=1).startswith("0 of 8 weights hold; ")
    assert re.fullmatch(r"\d+\.\d\d ms  out/model.onnx\n", quiet("bench", "out/model.onnx", "--rounds", "2"))
    assert json.loads(quiet("methods", "--json"))[0]["name"] == "asp"


def test_quiet_still_says_what_is_wrong(bert):
    result = call("convert", "gone.pt", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "error: gone.pt does not exist.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert"], "Missing argument 'MODEL'."),
        (["convert", "a.pt", "--sparsity", "2:4"], "No such option: --sparsity"),
        (["bench", "a.onnx", "--rounds", "many"], "Invalid value for '--rounds'"),
        (["prune"], "No such command 'prune'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_call_that_cannot_be_understood_is_said_in_json(arguments, said):
    assert said in answer(*arguments, code=2)["error"]
