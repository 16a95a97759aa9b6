"""TensorRT engines. Only the check that comes before any work exists; the builder does not yet."""

from __future__ import annotations

import importlib.util

from nmgraph.errors import ExportError, MissingPackageError


def require_tensorrt() -> None:
    """Refuse to begin an export that would end without an engine.

    Raises:
        MissingPackageError: if TensorRT is not installed.
        ExportError: if it is, as this version builds no engines.
    """
    by_hand = "export without --trt, then run: trtexec --onnx=model.onnx --sparsity=enable --saveEngine=model.plan"
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingPackageError(
            f"--trt needs TensorRT, which is not installed: pip install tensorrt (Linux or Windows with an NVIDIA GPU). "
            f"Or build the engine on the machine that will run it: {by_hand}"
        )
    raise ExportError(f"this version of nmgraph builds no TensorRT engines yet: {by_hand}")
