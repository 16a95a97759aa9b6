"""What the machine is."""

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import record
import torch
from bench import Bench, Piece, answer

PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxscript", "triton", "nvidia-cusparselt-cu13", "nvidia-cublas")


def pieces(bench: Bench) -> Iterator[Piece]:
    yield "cuda", torch.cuda.is_available
    yield "machine", record.machine
    yield "versions", versions
    if torch.cuda.is_available():
        yield "gpu", gpu


def versions() -> dict[str, Any]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    found = {"cuda": torch.version.cuda, "cusparselt": answer(torch.backends.cusparselt.version)}
    return record.versions() | found | {package: version(package) for package in PACKAGES}


def gpu() -> dict[str, Any]:
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
    }
