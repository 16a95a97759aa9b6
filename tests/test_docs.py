"""What the documentation tells people to type, works."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from nmgraph.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
GENERATED = re.compile(r"<!-- \[\[\[cog (.*?) \]\]\] -->\n(.*?)<!-- \[\[\[end\]\]\] -->", re.DOTALL)
NOT_RUN = {  # pages with blocks that are only shown, how many, and why
    "README.md": (1, "loads the file that a command wrote"),
    "docs/guides/from-modelopt.md": (1, "needs nvidia-modelopt, which is not installed here"),
    "docs/scale.md": (3, "several processes, or names that are the reader's: tests/training has what they show"),
}
OTHER_PROGRAMS = ("python", "pip", ".")


def pages():
    return [(str(page.relative_to(ROOT)), page.read_text()) for page in PAGES]


def blocks(text, language):
    """The blocks of a language, and what stands behind its name."""
    return re.findall(rf"^```{language}\b ?(.*)\n((?:.*\n)*?)```", text, re.MULTILINE)


def parse(name, *arguments):
    """Let a command read its arguments, and do nothing; ``--help`` is one of them."""
    try:
        get_command(app).commands[name].make_context(name, list(arguments))
    except typer.Exit:
        assert "--help" in arguments


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs_and_prints_what_its_comments_say(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "documentation", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^print\(.*\)  # (.+)$", block, re.MULTILINE)
    assert printed == said


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_method_has_a_card_with_its_options():
    from dataclasses import fields

    from nmgraph import METHODS

    for name, cls in METHODS.items():
        card = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        for field in fields(cls):
            assert f"| `{field.name}` |" in card, f"{name}.md does not list {field.name}"


@pytest.mark.parametrize(("page", "text"), pages())
def test_every_python_block_is_run_somewhere(page, text):
    heads = [head for head, _ in blocks(text, "python")]
    assert heads.count("no-run") == NOT_RUN.get(page, (0,))[0]
    for head in set(heads) - {"", "no-run"}:
        name = re.fullmatch(r'title="([\w.]+)"', head)[1]
        assert any(f"python {name}" in call for call, _ in GENERATED.findall(text)), (
            f"{page} shows {name}, and never runs it"
        )


@pytest.mark.parametrize(("page", "text"), pages())
def test_commands_that_are_shown_exist(page, text):
    assert not blocks(text, "(?:bash|sh|shell)"), "commands stand in blocks called console"
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for _, block in blocks(text, "console"):
        for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
            program, *arguments = shlex.split(line, comments=True)
            if program == "nmgraph":
                parse(*arguments)
            elif program == "make":
                assert arguments[0] in targets, f"{page}: {line}"
            else:
                assert program in OTHER_PROGRAMS, f"{page}: {line}"


@pytest.mark.parametrize(("page", "text"), pages())
def test_commands_that_are_named_have_the_options_beside_them(page, text):
    commands = get_command(app).commands
    for name, rest in re.findall(r"`nmgraph ([a-z]+)\b([^`]*)`", text):
        known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
        assert set(re.findall(r"(?<!\w)--?[a-z][a-z-]*", rest)) <= known, f"{page}: nmgraph {name}{rest}"


@pytest.mark.parametrize(("page", "text"), pages())
def test_what_a_command_prints_is_pasted_by_the_command(page, text):
    for _, block in blocks(GENERATED.sub("", text), "console"):
        for line in block.splitlines():
            assert re.match(r"\$ |  \.\.\. ", line), f"{page} shows {line!r}: let docs/outputs.py paste it"


@pytest.mark.parametrize(("page", "text"), pages())
def test_scripts_that_are_named_exist(page, text):
    for script in re.findall(r"\b((?:benchmarks|examples|tests)/[\w/]+\.(?:py|ipynb|json))", text):
        assert (ROOT / script).exists(), f"{page} names {script}"
