"""What --help says: readable at every width, and its examples are calls that the command line takes."""

import re
import shlex

import pytest
import typer
from commands import call
from typer.testing import CliRunner

import nmgraph
from nmgraph.cli import app

ROOT = typer.main.get_command(app)
COMMANDS = list(ROOT.commands)


def shown(*command, width=80):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(width), "TERM": "dumb"})
    assert result.exit_code == 0
    return result.stdout


def examples(command):
    return re.findall(r"^ +nmgraph (.*\S)", shown(command, width=80).partition("Examples")[2], re.MULTILINE)


def test_every_example_is_taken_by_the_parser_and_stands_on_one_line():
    for command in COMMANDS:
        assert examples(command), command
        assert re.findall(r"^  nmgraph (.*)", ROOT.commands[command].epilog, re.MULTILINE) == examples(command)
        for example in examples(command):
            name, *words = shlex.split(example.partition("&&")[0])
            assert name == command
            context = ROOT.commands[name].make_context(name, words)
            assert not context.args


def test_an_example_that_the_parser_does_not_take_would_be_noticed():
    with pytest.raises(typer.TyperException, match="--sparsity"):
        ROOT.commands["convert"].make_context("convert", ["model.pt", "--sparsity", "2:4"])


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_loses_no_words_at_any_width(command, width):
    text = shown(*command, width=width)
    assert "…" not in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in (
        ("Reads", "Writes", "--quiet", "Exit codes", "Examples") if command else ("Guides", "convert", "--version")
    ):
        assert word in text


def test_help_groups_the_options():
    text = shown("convert")
    titles = re.findall(r"^╭─ (\w+) ─", text, re.MULTILINE)
    assert titles == ["Arguments", "Options", "Sparsity", "Model", "Output", "Printing"]


def test_first_help_shows_the_path_from_a_model_to_its_export():
    lines = [line.strip() for line in shown().splitlines()]
    assert [line.split()[1] for line in lines if line.startswith("nmgraph ")] == ["convert", "export"]
    assert "(train: nmgraph.load, nmgraph.attach, your loop, nmgraph.save)" in lines


def test_version_is_told():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"nmgraph {nmgraph.__version__}\n")
