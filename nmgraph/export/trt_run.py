"""Run engines on the GPU: what they answer, and how long they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nmgraph.errors import ExportError

DEVICE = "cuda"
ROUNDS, WARM_UP, RUNS = 5, 20, 60
"""Engines take turns, so that a clock that sinks with the heat falls on all of them alike."""
DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT8": torch.int8, "INT32": torch.int32,
    "INT64": torch.int64, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """How long one run takes on the GPU, inputs and outputs already there.

    Attributes:
        median_ms: of all runs, in milliseconds.
        fastest_ms: of all runs.
        slowest_ms: of all runs.
        runs: how many were timed.
    """

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    runs: int


class Execution:
    """An engine with its buffers, ready to run."""

    def __init__(self, trt: Any, engine: Any, inputs: Mapping[str, Tensor]) -> None:
        self.context = engine.create_execution_context()
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.inputs, self.outputs = _bind(trt, engine, self.context, inputs)

    def enqueue(self) -> None:
        """Start one run on the stream.

        Raises:
            ExportError: if TensorRT refuses.
        """
        context = self.context
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise ExportError("TensorRT could not run the engine it built; its log says why.")

    def answer(self, names: Sequence[str]) -> list[Tensor]:
        """Run once, and give the outputs of these names, on the CPU."""
        torch.cuda.synchronize()  # the buffers were filled on another stream
        self.enqueue()
        self.stream.synchronize()
        return [self.outputs[name].cpu() for name in names]

    def time(self, runs: int) -> list[float]:
        """Time single runs, in milliseconds."""
        pairs = [(_event(), _event()) for _ in range(runs)]
        for start, stop in pairs:
            start.record(self.stream)
            self.enqueue()
            stop.record(self.stream)
        self.stream.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]


def input_names(trt: Any, engine: Any) -> list[str]:
    """List what an engine takes."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]


def sample_in_turns(executions: Sequence[Execution]) -> list[list[float]]:
    """Time engines against each other, in milliseconds: in rounds, each warmed up before it is timed."""
    samples: list[list[float]] = [[] for _ in executions]
    for _ in range(ROUNDS):
        for execution, found in zip(executions, samples, strict=True):
            execution.time(WARM_UP)
            found += execution.time(RUNS)
    return samples


def time_in_turns(executions: Sequence[Execution]) -> list[Timing]:
    """Sum up what :func:`sample_in_turns` finds."""
    samples = sample_in_turns(executions)
    return [Timing(median(found), min(found), max(found), len(found)) for found in samples]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _bind(
    trt: Any, engine: Any, context: Any, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    fed = input_names(trt, engine)
    given = {name: inputs[name].to(DEVICE, _dtype(engine, name)).contiguous() for name in fed}
    for name, values in given.items():
        context.set_input_shape(name, tuple(values.shape))
    # Only now: the shape of an output may follow from those of the inputs.
    made = {name: _empty(engine, context, name) for name in names if name not in given}
    for name, buffer in (given | made).items():
        context.set_tensor_address(name, buffer.data_ptr())
    return given, made


def _empty(engine: Any, context: Any, name: str) -> Tensor:
    shape = tuple(context.get_tensor_shape(name))
    if -1 in shape:
        raise ExportError(
            f"output {name} has a shape that only its values tell, {shape}; such an engine can't be timed."
        )
    return torch.empty(shape, dtype=_dtype(engine, name), device=DEVICE)


def _dtype(engine: Any, name: str) -> torch.dtype:
    kind = engine.get_tensor_dtype(name)
    if kind.name not in DTYPES:
        raise ExportError(f"{name} is {kind.name} in the engine, which torch can't hold.")
    return DTYPES[kind.name]
