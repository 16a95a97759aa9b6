"""The command line's names are frozen: a change here is a change for every user's scripts."""

import pytest
import typer
from typer.testing import CliRunner

from nmgraph.cli import app

COMMANDS = {
    "methods": ["-q --quiet", "--json", "--debug"],
    "inspect": [
        "MODEL", "--model", "--trust", "--method", "--pattern", "--set", "--skip", "--include", "--layer", "--keep-dense",
        "--block-axis", "--preset", "--input", "--sensitivity", "--data", "--budget", "--recipe", "--overwrite", "-q --quiet",
        "--json", "--debug",
    ],
    "convert": [
        "MODEL", "--method", "--pattern", "--recipe", "--set", "--skip", "--include", "--layer", "--keep-dense", "--block-axis", "--preset",
        "--permute-channels", "--model", "--trust", "--input", "-o --output", "--overwrite", "-q --quiet", "--json", "--debug",
    ],
    "status": ["CONVERTED", "--model", "--trust", "-q --quiet", "--json", "--debug"],
    "export": [
        "CONVERTED", "--trt", "--no-compare", "--trt-command", "--project", "--no-onnx", "--safetensors", "--hf", "--precision", "--dynamic-batch", "--fold-batchnorm", "--input", "--model", "--trust",
        "-o --output", "--overwrite", "--force", "-q --quiet", "--json", "--debug",
    ],
    "bench": ["FILE...", "--input", "--rounds", "-q --quiet", "--json", "--debug"],
    "report": [
        "CONVERTED", "--log", "--export", "--model", "--trust", "-o --output", "--overwrite", "-q --quiet", "--json", "--debug",
    ],
    "verify": ["FILE", "--pattern", "--model", "--trust", "-q --quiet", "--json", "--debug"],
}  # fmt: skip


def names(parameter):
    return parameter.metavar if parameter.param_type_name == "argument" else " ".join(parameter.opts)


def test_commands_and_their_options_are_what_the_design_names():
    commands = typer.main.get_command(app).commands
    assert {name: [names(p) for p in command.params] for name, command in commands.items()} == COMMANDS


def test_options_have_no_hidden_opposites():
    commands = typer.main.get_command(app).commands
    assert [p.secondary_opts for command in commands.values() for p in command.params if p.secondary_opts] == []


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_explains_every_option(command):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    for option in COMMANDS.get(command[0], []) if command else COMMANDS:
        assert option.split()[-1] in result.stdout


@pytest.mark.parametrize(
    "arguments", [["prune"], ["convert"], ["convert", "a.pt", "--sparsity", "2:4"], ["methods", "x"]]
)
def test_misspelt_calls_exit_with_2(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
