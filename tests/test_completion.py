"""What shells complete: commands, options, and the values that nmgraph knows."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from nmgraph import METHODS, suggestions
from nmgraph.cli import app
from nmgraph.export.bundle import PRECISIONS
from nmgraph.methods import make_method
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.rewrite import Selection

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands


def suggested(command, option, *before, incomplete=""):
    """Give what is suggested for the value of an option, or of an argument, after other words."""
    context = COMMANDS[command].make_context(command, list(before), resilient_parsing=True)
    parameter = next(p for p in COMMANDS[command].params if option in (*p.opts, p.metavar))
    return [item.value for item in parameter.shell_complete(context, incomplete)]


def test_what_is_suggested_is_what_the_options_take():
    assert suggested("convert", "--method") == list(METHODS)
    assert suggested("inspect", "--method", incomplete="s") == ["srste", "sste", "static"]
    assert suggested("export", "--precision") == list(PRECISIONS)
    for command in ("inspect", "convert", "verify"):
        assert [str(Pattern.parse(p)) for p in suggested(command, "--pattern")][:2] == ["2:4", "1:4"]
    for axis in suggested("convert", "--block-axis"):
        assert Selection(block_axis=axis)
    for ends in suggested("convert", "--keep-dense"):
        assert Selection(keep_dense=tuple(ends.split(",")))


def test_options_and_presets_are_those_of_the_chosen_method():
    assert suggested("convert", "--set") == suggested("convert", "--set", "--method", "lbc")
    assert suggested("convert", "--set", "--method", "srste", incomplete="d") == ["decay=0.0002"]
    for name, method in METHODS.items():
        assert suggested("convert", "--preset", "--method", name) == list(method.presets)
        for text in suggested("convert", "--set", "--method", name):
            key, _, value = text.partition("=")
            kind = type(make_method(name).options()[key])
            make_method(name, {key: value == "true" if kind is bool else kind(value)})
    assert suggested("convert", "--preset", "--method", "none-such") == list(METHODS["lbc"].presets)


def test_model_is_a_file_unless_a_library_is_begun():
    assert suggested("convert", "MODEL") == []
    assert suggested("convert", "MODEL", incomplete="tim") == ["timm:"]
    assert suggested("inspect", "--model", incomplete="t") == ["timm:", "torchvision:"]


def test_every_list_filters_by_what_is_begun():
    for suggest in (suggestions.methods, suggestions.patterns, suggestions.precisions, suggestions.axes):
        assert suggest(None, "no such") == []


@pytest.fixture
def shell(tmp_path):
    """Run lines in a shell that knows the command nmgraph."""
    command = tmp_path / "nmgraph"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nmgraph "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)

    def run(name, *lines, **environment):
        if not shutil.which(name):
            pytest.skip(f"there is no {name} here")
        paths = {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        result = subprocess.run(
            [name, "-c", "\n".join(lines)],
            env={**os.environ, **paths, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.split("\n")

    return run


def test_bash_completes_with_the_script_it_is_shown(shell):
    found = shell(
        "bash",
        "eval \"$(nmgraph --show-completion bash)\"",
        "complete -p nmgraph",
        "COMP_WORDS=(nmgraph convert m.pt --method srste --set d) COMP_CWORD=6",
        "_nmgraph_completion nmgraph; echo ${COMPREPLY[@]}",
    )  # fmt: skip
    assert found == ["complete -o default -F _nmgraph_completion nmgraph", "decay=0.0002", ""]


@pytest.mark.slow
def test_fish_completes_with_the_script_it_is_shown(shell, tmp_path):
    found = shell(
        "fish",
        "nmgraph --show-completion fish | source",
        "complete -C 'nmgraph convert m.pt --method l'",
        "complete -C 'nmgraph exp'",
        HOME=str(tmp_path),
    )
    assert [line.partition("\t")[0] for line in found] == ["lbc", "export", ""]


@pytest.mark.slow
def test_zsh_completes_with_the_script_it_is_shown(shell):
    found = shell(
        "zsh",
        "compdef() { echo compdef $@ }",
        "_arguments() { echo $@ }",
        'eval "$(nmgraph --show-completion zsh)"',
        "words=(nmgraph convert m.pt --method l) CURRENT=5",
        "_nmgraph_completion",
    )
    assert found[0] == "compdef _nmgraph_completion nmgraph"
    assert '"lbc"' in found[1]
