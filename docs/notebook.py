"""Run ``examples/quickstart.ipynb`` in a new kernel, and keep what it shows: ``python docs/notebook.py``."""

import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def run(notebook: nbformat.NotebookNode) -> None:
    """Run a notebook in place, by this Python and apart from what else is set up for Jupyter on the machine."""
    with tempfile.TemporaryDirectory() as directory:
        settings = dict.fromkeys(("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"), directory)
        with patch.dict(os.environ, settings):
            NotebookClient(
                notebook,
                timeout=120,
                kernel_name="python3",
                record_timing=False,
                resources={"metadata": {"path": directory}},
            ).execute()
    notebook.metadata.pop("language_info", None)  # which Python it was


if __name__ == "__main__":
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run(notebook)
    nbformat.write(notebook, NOTEBOOK)
