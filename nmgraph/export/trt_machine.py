"""Which TensorRT and GPU are here, and which an engine was built for."""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nmgraph.errors import ExportError, FileError, MissingPackageError, first_line

OLDEST = (10, 13)
"""Before 10.13 and in 8.x the API differs; strongly typed networks need 10.0."""
SPARSE_CAPABILITY = (8, 0)  # Ampere: the first with sparse tensor cores
_INSTEAD = (
    "Or leave --trt away: --trt-command (trt_command=True) writes the ONNX file and prints the trtexec line that "
    "builds the engine on the machine that will run it."
)


@dataclass(frozen=True)
class Machine:
    """What an engine is bound to: it runs on this GPU and TensorRT, and is not promised to on any other.

    Attributes:
        gpu: name of the device.
        compute_capability: such as ``9.0``.
        tensorrt: full version.
    """

    gpu: str
    compute_capability: str
    tensorrt: str

    def __str__(self) -> str:
        return f"{self.gpu} (compute capability {self.compute_capability}) with TensorRT {self.tensorrt}"


def require_tensorrt() -> Any:
    """Find TensorRT and a GPU before any work, and give the ``tensorrt`` module.

    Raises:
        MissingPackageError: if TensorRT is not installed, too old or cannot be imported.
        ExportError: if torch sees no GPU.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingPackageError(
            "--trt needs TensorRT, which is not installed: pip install tensorrt (Linux or Windows with an NVIDIA GPU). "
            + _INSTEAD
        )
    if not torch.cuda.is_available():
        raise ExportError(
            "--trt needs an NVIDIA GPU that torch can use, and torch.cuda.is_available() is False: install a CUDA "
            f"build of torch, on a machine with a GPU. {_INSTEAD}"
        )
    try:
        trt = importlib.import_module("tensorrt")
    except Exception as error:
        # A missing shared library is an ImportError or an OSError, a missing driver anything.
        raise MissingPackageError(
            f"TensorRT is installed but can't be imported: {first_line(error)}. Install it again: "
            f"pip install tensorrt. {_INSTEAD}"
        ) from error
    version = trt.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise MissingPackageError(
            f"--trt needs TensorRT {OLDEST[0]}.{OLDEST[1]} or newer, and {version} is installed: "
            f"pip install --upgrade tensorrt. {_INSTEAD}"
        )
    return trt


def this_machine(trt: Any) -> Machine:
    """Describe the current CUDA device and the TensorRT in use."""
    major, minor = torch.cuda.get_device_capability()
    return Machine(torch.cuda.get_device_name(), f"{major}.{minor}", trt.__version__)


def sidecar(plan: Path) -> Path:
    """Give the path of the small file beside an engine that says what it was built for."""
    return plan.with_name(f"{plan.name}.json")


def write_machine(plan: Path, machine: Machine) -> None:
    """Write beside an engine what it was built for."""
    sidecar(plan).write_text(json.dumps(asdict(machine), indent=2) + "\n")


def require_same_machine(plan: Path, machine: Machine) -> None:
    """Refuse to load an engine that was built for another GPU or TensorRT.

    Raises:
        FileError: if it was, or if nothing beside it says what it was built for.
    """
    path = sidecar(plan)
    try:
        built = Machine(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise FileError(
            f"{plan} can't be loaded: {path.name} beside it, which says what it was built for, is missing or damaged. "
            "Build the engine again with `nmgraph export --trt`."
        ) from error
    if built != machine:
        raise FileError(
            f"{plan} was built for {built}, and this is {machine}. An engine runs where it was built: build it again "
            "here from the ONNX file beside it, with `nmgraph export --trt` or trtexec."
        )
