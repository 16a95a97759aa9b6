"""Time ONNX files in ONNX Runtime, or engines in TensorRT, in turn, so that a busy machine is busy for all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.markup import escape
from rich.table import Table

from nmgraph.errors import ExportError, FileError, first_line
from nmgraph.export.inputs import Inputs, make_up
from nmgraph.export.parity import open_session
from nmgraph.export.trt_build import load_engine
from nmgraph.export.trt_machine import require_tensorrt, this_machine
from nmgraph.export.trt_run import Execution, input_names, sample_in_turns

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64",
    "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """How long one call of a file takes.

    Attributes:
        file: its path.
        inputs: what it was called with, in words.
        median_ms: of all rounds.
        quartiles_ms: the first and the third.
        ratio: of the first file's median to this one's; above 1 it is faster than the first.
    """

    file: str
    inputs: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float


@dataclass(frozen=True)
class Timings:
    """How long each file takes, from one run.

    Attributes:
        runner: what ran them, in words.
        rounds: that count.
        files: in the order given.
    """

    runner: str
    rounds: int
    files: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    def __rich__(self) -> Table:
        title = f"{self.runner}, medians of {self.rounds} calls in turn"
        table = Table(title=escape(title), title_justify="left", header_style="bold")
        for column in ("file", "inputs", "median", "quartiles", "speed, first = 1"):
            table.add_column(column, overflow="fold", justify="left" if column in ("file", "inputs") else "right")
        for t in self.files:
            low, high = t.quartiles_ms
            spread = f"{low:.2f} to {high:.2f} ms"
            table.add_row(escape(t.file), escape(t.inputs), f"{t.median_ms:.2f} ms", spread, f"{t.ratio:.2f}")
        return table


def time_files(
    paths: Sequence[Path], *, inputs: Inputs | None = None, rounds: int = 30, progress: Callable[[str], None]
) -> Timings:
    """Time ONNX files on the CPU, or engines on the GPU.

    Args:
        paths: ONNX files, or ``.plan`` files; the first is what the others are compared with.
        inputs: what to call them with; by default random values of the shapes an ONNX file declares, dynamic sizes as 1.
        rounds: how many calls of each ONNX file count, after a fifth as many that don't.
        progress: called with what begins.

    Raises:
        FileError: if a file is missing or ONNX Runtime cannot read it.
        ExportError: if it does not run on the inputs.
    """
    if all(path.suffix == ".plan" for path in paths):
        return _time_engines(paths, inputs, progress)
    calls = []
    for path in paths:
        progress(f"reading {path.name}")
        session = _session(path)
        values, said = _values(session, path, inputs)
        calls.append((path, said, _caller(session, path, values)))
    progress("timing")
    seconds: list[list[float]] = [[] for _ in calls]
    warm_up = max(1, rounds // 5)
    for round_ in range(warm_up + rounds):
        for (_, _, call), own in zip(calls, seconds, strict=True):
            taken = call()
            if round_ >= warm_up:
                own.append(taken)
    first = statistics.median(seconds[0])
    files = [_summary(path, said, own, first) for (path, said, _), own in zip(calls, seconds, strict=True)]
    return Timings(f"ONNX Runtime, CPUExecutionProvider, {os.cpu_count() or 1} thread(s)", rounds, tuple(files))


def _time_engines(paths: Sequence[Path], inputs: Inputs | None, progress: Callable[[str], None]) -> Timings:
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise FileError(f"{missing} does not exist.")
    trt = require_tensorrt()
    executions = []
    for path in paths:
        progress(f"reading {path.name}")
        engine = load_engine(trt, path)
        names = input_names(trt, engine)
        if inputs is None or len(inputs.args) + len(inputs.kwargs) != len(names):
            raise ExportError(
                f"{path.name} takes {', '.join(names)}; give one --input for each, in this order or by name."
            )
        executions.append(Execution(trt, engine, inputs.named(names)))
    progress("timing")
    samples = [[ms / 1e3 for ms in found] for found in sample_in_turns(executions)]
    first = statistics.median(samples[0])
    files = [_summary(path, str(inputs), own, first) for path, own in zip(paths, samples, strict=True)]
    return Timings(f"TensorRT on {this_machine(trt)}", len(samples[0]), tuple(files))


def _session(path: Path) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise FileError(f"{path} does not exist.")
    if path.suffix != ".onnx":
        raise FileError(
            f"{path} is no .onnx file. Export one first: nmgraph export CONVERTED.nm.pt. Engines (.plan) are timed among themselves."
        )
    try:
        return open_session(path)
    except Exception as error:
        # onnxruntime raises classes of its own, without a common base that is public.
        raise FileError(f"ONNX Runtime can't read {path}: {first_line(error)}") from error


def _values(session: onnxruntime.InferenceSession, path: Path, inputs: Inputs | None) -> tuple[dict[str, Any], str]:
    declared = session.get_inputs()
    if inputs is not None:
        names = [i.name for i in declared]
        if len(inputs.args) + len(inputs.kwargs) != len(names) or not inputs.kwargs.keys() <= set(
            names[len(inputs.args) :]
        ):
            raise ExportError(
                f"{path.name} takes {', '.join(names)}; give one --input for each, in this order or by name."
            )
        return {name: tensor.numpy() for name, tensor in inputs.named(names).items()}, str(inputs)
    values = {}
    for i in declared:
        if i.type not in _DTYPES:
            raise ExportError(f"{path.name}: its input {i.name} is a {i.type}, which can't be made up.")
        shape = tuple(size if isinstance(size, int) and size > 0 else 1 for size in i.shape)
        values[i.name] = make_up(shape, _DTYPES[i.type]).numpy()
    return values, ", ".join(f"{name}={'x'.join(map(str, v.shape))}" for name, v in values.items())


def _caller(session: onnxruntime.InferenceSession, path: Path, values: dict[str, np.ndarray]) -> Callable[[], float]:
    def call() -> float:
        began = time.perf_counter()
        try:
            session.run(None, values)
        except Exception as error:
            said = " ".join(str(error).split())  # its first line names no number
            raise ExportError(f"ONNX Runtime can't run {path}: {said}") from error
        return time.perf_counter() - began

    return call


def _summary(path: Path, said: str, seconds: list[float], first: float) -> Timing:
    low, _, high = statistics.quantiles(seconds, n=4)
    median = statistics.median(seconds)
    return Timing(str(path), said, 1e3 * median, (1e3 * low, 1e3 * high), first / median)
