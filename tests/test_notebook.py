"""The notebook runs, and shows what is written in it."""

import copy
import re
import runpy
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def shown(notebook):
    """What each cell prints, and of pictures that they are there: their bytes differ between processors."""
    return [
        [output.get("text") or sorted(output["data"]) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_running_the_notebook_shows_what_is_written_in_it():
    written = nbformat.read(NOTEBOOK, as_version=4)
    again = copy.deepcopy(written)
    for cell in again.cells:
        cell.outputs = []
    runpy.run_path(str(ROOT / "docs" / "notebook.py"))["run"](again)
    assert shown(again) == shown(written)
    assert sum("image/png" in kinds for outputs in shown(again) for kinds in outputs) == 2


def test_the_notebook_names_no_machine():
    assert not re.search(r"/(home|root|tmp|work|usr)/|\d\d:\d\d:\d\d", NOTEBOOK.read_text())
