"""What a measurement says of itself: its command, commit, machine and versions; and its JSON file."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nmgraph

ROOT = Path(__file__).resolve().parent.parent


def run(
    about: str, measure: Callable[[bool], dict[str, Any]], report: Callable[[dict[str, Any]], bool], *, seed: int
) -> None:
    """Be the script of a benchmark of promises: exit with 1 if ``report`` says that one does not hold."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of everything")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.quick)
    held = report(found)
    if args.json:
        write(args.json, found, seed=seed)
    sys.exit(0 if held else 1)


def write(path: Path, results: dict[str, Any], *, seed: int) -> None:
    """Write results with where they come from."""
    about = {"command": command(), "commit": commit(), "seed": seed, "machine": machine(), "versions": versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **results}, indent=2) + "\n")
    print(f"wrote {path}")


def command() -> str:
    """Give the command as typed in the repository's root; of paths only what lies in the repository."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", str(name), *words])


def commit() -> str:
    """Give the commit; it ends in -dirty if the code is not that of the commit. Results written before do not count.

    A copy of the files, or a machine without git, knows none.
    """
    if shutil.which("git") is None:
        return "unknown"
    code = ["nmgraph", "benchmarks/*.py", "examples", "tests"]
    answers = [
        subprocess.run(["git", *asked], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for asked in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *code])
    ]
    return f"{answers[0]}{'-dirty' if answers[1] else ''}" or "unknown"


def machine() -> dict[str, Any]:
    found = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "nmgraph": nmgraph.__version__}
