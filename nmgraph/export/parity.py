"""Run the ONNX file in ONNX Runtime, and compare it with the model it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from nmgraph.errors import ExportError, first_line
from nmgraph.export.inputs import Inputs

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest accepted difference, relative to the largest magnitude of an output."""


@dataclass(frozen=True)
class OutputParity:
    """How far one output of ONNX Runtime is from PyTorch's.

    Attributes:
        name: of the output in the file.
        relative_error: largest difference over the largest magnitude; infinite if shapes or NaNs differ.
    """

    name: str
    relative_error: float


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime is from PyTorch.

    Attributes:
        outputs: every output of the file, of each run.
        tolerance: largest accepted relative error.
    """

    outputs: tuple[OutputParity, ...]
    tolerance: float

    @property
    def diverging(self) -> OutputParity | None:
        """The first output beyond the tolerance."""
        return next((o for o in self.outputs if not o.relative_error <= self.tolerance), None)

    @property
    def holds(self) -> bool:
        """Tell whether all outputs agree."""
        return self.diverging is None

    @property
    def worst(self) -> float:
        """Largest relative error of all outputs."""
        return max((o.relative_error for o in self.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return {"holds": self.holds, **asdict(self)}

    def __str__(self) -> str:
        if self.diverging is not None:
            return f"output {self.diverging.name} is off by {self.diverging.relative_error:.1e} (accepted: {self.tolerance:.0e})"
        names = {o.name for o in self.outputs}
        runs = len(self.outputs) // max(1, len(names))
        counted = f"{len(names)} output(s)" + f" in {runs} runs" * (runs > 1)
        return f"largest relative error {self.worst:.1e} of {counted} (accepted: {self.tolerance:.0e})"


def open_session(path: Path, *, fast: bool = True) -> onnxruntime.InferenceSession:
    """Open an ONNX file in ONNX Runtime on the CPU, without its own messages on stderr; it raises errors of its own kinds.

    Args:
        path: of the file.
        fast: lay weights out anew for speed, which takes twice their memory.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not fast:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare(model: nn.Module, path: Path, inputs: Inputs, dtype: torch.dtype) -> Parity:
    """Run both on the same inputs.

    Args:
        model: what was exported, in eval mode.
        path: of the ONNX file.
        inputs: what to run.
        dtype: of the model's weights, which sets the tolerance.

    Raises:
        ExportError: if ONNX Runtime cannot run the file.
    """
    expected = inputs.outputs(model)
    try:
        session = open_session(path, fast=False)
        values = inputs.named([i.name for i in session.get_inputs()])
        found = session.run(None, {name: tensor.numpy() for name, tensor in values.items()})
    except Exception as error:
        # onnxruntime raises classes of its own, without a common base that is public.
        raise ExportError(f"ONNX Runtime can't run {path.name}: {first_line(error)}") from error
    outputs = [o.name for o in session.get_outputs()]
    if len(outputs) != len(expected):
        raise ExportError(f"{path.name} has {len(outputs)} outputs, the model {len(expected)}.")
    return compare_outputs(
        dict(zip(outputs, expected, strict=True)), dict(zip(outputs, found, strict=True)), TOLERANCE[dtype]
    )


def joined(several: Iterable[Parity]) -> Parity:
    """Put together what was found on several inputs."""
    found = list(several)
    return Parity(tuple(output for parity in found for output in parity.outputs), found[0].tolerance)


def compare_outputs(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, np.ndarray | torch.Tensor], tolerance: float
) -> Parity:
    """Compare answers by the names of their outputs."""
    errors = (OutputParity(name, _relative_error(want, np.asarray(found[name]))) for name, want in expected.items())
    return Parity(tuple(errors), tolerance)


def _relative_error(expected: torch.Tensor, found: np.ndarray) -> float:
    want, got = expected.to(torch.float64).numpy(), np.asarray(found, dtype=np.float64)
    if want.shape != got.shape or not np.array_equal(np.isfinite(want), np.isfinite(got)):
        return float("inf")
    finite = np.isfinite(want)
    scale = float(np.abs(want[finite]).max(initial=0.0)) or 1.0
    return float(np.abs(want[finite] - got[finite]).max(initial=0.0)) / scale
