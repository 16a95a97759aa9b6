"""What all tests share: torchvision made importable, seeds, and a way to run the installed command."""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from nmgraph.layers import probe

collect_ignore = ["site"]
SITE = Path(__file__).parent / "site"
runpy.run_path(str(SITE / "sitecustomize.py"))  # subprocesses find it through PYTHONPATH

torch.set_num_threads(1)
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_timings(tmp_path, monkeypatch):
    """Let no timing of a product be known; gives the directory where new ones are kept."""
    monkeypatch.setenv("NMGRAPH_CACHE", str(tmp_path / "cache"))
    probe._timing_of.cache_clear()
    yield tmp_path / "cache"
    probe._timing_of.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    """Fail where anything is asked of a network."""

    def refused(*arguments, **_):
        raise AssertionError(f"asked the network for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def run_command(tmp_path):
    """Run ``nmgraph ...`` as a person would: a new process, in an empty directory."""

    def run(*arguments, cwd=tmp_path, **environment):
        return subprocess.run(
            [sys.executable, "-m", "nmgraph", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{SITE.parents[1]}", "COLUMNS": "100", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
