"""What commands print, pasted into the pages: ``make outputs`` writes it anew, ``make docs`` fails where it is stale.

A page says what is run in a comment, ``[[[cog outputs.console("nmgraph methods") ]]]``, and cog puts the block behind it.
All commands of a page run in one directory of its own, one after the other, in this process.
"""

import contextlib
import io
import re
import runpy
import shlex
import tempfile
from collections import defaultdict
from pathlib import Path

import cog
import torch
from typer.main import get_command
from typer.testing import CliRunner

from nmgraph.cli import app

WIDTH = 92
_PLAIN = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
_VARIES = {  # from one processor to the next, as each rounds in its own way
    r"(?<=error )\d\.\de-\d\d": "X.Xe-07",
    r"(?<=50\.0% │     )\d\d\.\d%": "XX.X%",  # the magnitude that a trained mask keeps
    r"\d%(?= of the held-out)": "X%",
}
_directories = defaultdict(tempfile.TemporaryDirectory)  # by page; they go when this process ends

torch.set_num_threads(1)


def console(*commands: str, code: int = 0) -> None:
    """Paste commands and what they print: ``nmgraph ...``, or ``python NAME`` of a block of the page titled NAME.

    Args:
        commands: as one types them.
        code: what each ``nmgraph`` has to exit with.
    """
    page = Path(cog.inFile).resolve()
    lines = []
    with contextlib.chdir(_directories[page].name):
        for command in commands:
            lines += [f"$ {command}", *_printed(shlex.split(command, comments=True), page, code)]
    cog.outl("\n".join(["```console", *lines, "```"]))


def helps() -> None:
    """Paste the help of every command, each under its heading."""
    for name in get_command(app).commands:
        cog.outl(f"\n## {name}\n")
        console(f"nmgraph {name} --help")
    cog.outl()


def _printed(words: list[str], page: Path, code: int) -> list[str]:
    torch.manual_seed(0)
    program, *arguments = words
    if program == "nmgraph":
        result = CliRunner().invoke(app, arguments, prog_name="nmgraph", env=_PLAIN)
        text = result.output
        if result.exit_code != code:
            raise RuntimeError(f"{page.name}: {shlex.join(words)} exits with {result.exit_code}:\n{text}")
    else:
        text = _run_block(page, *arguments)
    for pattern, stable in _VARIES.items():
        text = re.sub(pattern, stable, text)
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def _run_block(page: Path, name: str) -> str:
    block = re.search(rf'^```python title="{re.escape(name)}"\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)
    if block is None:
        raise LookupError(f"{page.name} has no python block with the title {name}.")
    Path(name).write_text(block[1])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(name, run_name="__main__")
    return printed.getvalue()
