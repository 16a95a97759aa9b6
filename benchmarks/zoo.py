"""Any PyTorch model converts, and behaves as it did: checked on every model of torchvision, one of each timm family,
and Hugging Face architectures.

    python benchmarks/zoo.py --json benchmarks/results/zoo.json --page docs/zoo.md

Each model is looked at in a process of its own, with a time limit. Results are written as they come; ``--resume``
goes on with those that are missing, ``--only`` looks at some models again. ``--onnx`` adds the slow way through ONNX
to results that are there. Where ModelOpt is installed, it is tried beside.
"""  # fmt: skip

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import record
import torch
from zoo_checks import METHOD, SAMPLE_METHODS, check_onnx, measure
from zoo_models import LIBRARIES, SEED, Entry
from zoo_page import failures, page

TIME_LIMIT = 240
MEMORY_LIMIT = 12 << 30
# Models that are also trained with a method that starts dense, and with one that has a backward mask.
SAMPLED = [
    "torchvision/resnet18", "torchvision/swin_t", "torchvision/vit_b_16", "torchvision/mobilenet_v3_small",
    "timm/convnext/*", "timm/deit/*", "timm/levit/*", "timm/xcit/*", "timm/nfnet/*", "transformers/bert",
    "transformers/gpt2", "transformers/mixtral", "transformers/t5", "transformers/whisper",
]  # fmt: skip


def look_at(entry: Entry, onnx: bool) -> dict[str, Any]:
    """Look at one model, in this process."""
    torch.set_num_threads(1)
    if onnx:
        return {"model": entry.name, "onnx": check_onnx(entry)}
    sampled = any(fnmatch.fnmatch(entry.name, glob) for glob in SAMPLED)
    return measure(entry, (METHOD, *(SAMPLE_METHODS if sampled else ())))


def in_its_own_process(entry: Entry, onnx: bool, limit: int) -> dict[str, Any]:
    """Look at one model in a fork of this process, which has the libraries loaded already."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            try:
                result = look_at(entry, onnx)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                result = {"model": entry.name, "error": f"{said} ({Path(place.filename).name}:{place.lineno})"}
        theirs.send(result)
        theirs.close()

    began = time.perf_counter()
    process = context.Process(target=work)
    process.start()
    theirs.close()
    result: dict[str, Any] = {"model": entry.name, "error": f"took more than {limit} s"}
    if mine.poll(limit):
        try:
            result = mine.recv()
        except EOFError:
            result["error"] = "its process died"
    else:
        process.kill()
    process.join(10)
    if process.is_alive():
        process.kill()
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def read(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None or not path.exists():
        return {}
    return {result["model"]: result for result in json.loads(path.read_text())["results"]}


def library_commit() -> str:
    """Give the commit that last changed the library; it ends in -dirty if its files are not those of a commit."""

    def git(*asked: str) -> str:
        return subprocess.run(["git", *asked], cwd=record.ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "nmgraph")
    return (git("log", "-1", "--format=%H", "--", "nmgraph") or "unknown") + ("-dirty" if changed else "")


def versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for package in ("torchvision", "timm", "transformers", "nvidia-modelopt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=list(LIBRARIES), nargs="+", default=list(LIBRARIES))
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="models by name, such as timm/*")
    parser.add_argument("--resume", action="store_true", help="leave out models that have a result")
    parser.add_argument("--onnx", action="store_true", help="try the export, and add that to the results")
    parser.add_argument("--limit", type=int, default=TIME_LIMIT, metavar="SECONDS", help="for each model")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--page", type=Path, metavar="PATH", help="also write the table there, as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    everything = [entry for library in LIBRARIES for entry in LIBRARIES[library]()]
    wanted = [e for e in everything if e.library in args.library and any(fnmatch.fnmatch(e.name, g) for g in args.only)]
    results = read(args.json)
    commit = library_commit()
    with contextlib.suppress(ImportError):
        import modelopt.torch.sparsity  # noqa: F401  # once, and not in every fork
    for i, entry in enumerate(wanted):
        known = results.get(entry.name, {})
        if args.resume and ("onnx" in known if args.onnx else "checks" in known):
            continue
        print(f"{i + 1} of {len(wanted)}: {entry.name} ", end="", flush=True)
        result = in_its_own_process(entry, args.onnx, args.limit)
        if args.onnx:
            onnx = result.get("onnx", {"problem": result.get("error")}) | {"seconds": result["seconds"]}
            results[entry.name] = results.get(entry.name, {"model": entry.name}) | {"onnx": onnx}
        else:
            kept = {k: v for k, v in results.get(entry.name, {}).items() if k == "onnx"}
            results[entry.name] = result | {"commit": commit} | kept
        print(f"{result['seconds']} s", "; ".join(failures(results[entry.name])) or "holds", flush=True)
        ordered = [results[e.name] for e in everything if e.name in results]
        if args.json:
            with contextlib.redirect_stdout(None):
                record.write(args.json, {"pattern": "2:4", "method": METHOD, "libraries": versions(), "results": ordered}, seed=SEED)  # fmt: skip
    if args.page and args.json:
        args.page.write_text(page(json.loads(args.json.read_text())))
        print(f"wrote {args.page}")
    sys.exit(0)


if __name__ == "__main__":
    main()
