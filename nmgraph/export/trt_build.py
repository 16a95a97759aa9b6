"""Build and load engines through TensorRT's Python API, 10.13 and newer or 11.

Every name of TensorRT that nmgraph touches stands in :data:`REQUIRED_API`; tests hold the table to this code, and to
what the bindings of both lines really offer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

from nmgraph.errors import ExportError, FileError, first_line
from nmgraph.export.trt_machine import require_same_machine, this_machine

REQUIRED_API = (
    "__version__",
    "Builder.__init__",
    "Builder.build_serialized_network",
    "Builder.create_builder_config",
    "Builder.create_network",
    "Builder.create_optimization_profile",
    "BuilderFlag.SPARSE_WEIGHTS",
    "DataType.name",
    "EngineInspector.get_engine_information",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.profiling_verbosity",
    "IBuilderConfig.progress_monitor",
    "IBuilderConfig.set_flag",
    "IBuilderConfig.set_timing_cache",
    "ICudaEngine.create_engine_inspector",
    "ICudaEngine.create_execution_context",
    "ICudaEngine.get_tensor_dtype",
    "ICudaEngine.get_tensor_mode",
    "ICudaEngine.get_tensor_name",
    "ICudaEngine.num_io_tensors",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.get_tensor_shape",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_tensor_address",
    "ILogger.Severity.name",
    "ILogger.__init__",
    "ILogger.log",
    "INetworkDefinition.get_input",
    "INetworkDefinition.num_inputs",
    "IOptimizationProfile.set_shape",
    "IProgressMonitor.__init__",
    "IProgressMonitor.phase_finish",
    "IProgressMonitor.phase_start",
    "IProgressMonitor.step_complete",
    "ITensor.name",
    "ITensor.shape",
    "ITimingCache.serialize",
    "LayerInformationFormat.JSON",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.__init__",
    "OnnxParser.get_error",
    "OnnxParser.num_errors",
    "OnnxParser.parse_from_file",
    "ParserError.desc",
    "ProfilingVerbosity.DETAILED",
    "Runtime.__init__",
    "Runtime.deserialize_cuda_engine",
    "TensorIOMode.INPUT",
)


@dataclass(frozen=True)
class Build:
    """What came out of one build.

    Attributes:
        plan: the serialized engine.
        log: what TensorRT said, one message a line.
        timing_cache: to start the next build of the same network with.
    """

    plan: bytes
    log: tuple[str, ...]
    timing_cache: bytes


def build_engine(
    trt: Any, onnx: Path, shapes: Mapping[str, tuple[int, ...]], *, sparse: bool, timing_cache: bytes = b"",
    progress: Callable[[str], None],
) -> Build:  # fmt: skip
    """Build an engine from an ONNX file, in the file's own precision.

    Args:
        trt: the ``tensorrt`` module.
        onnx: the file.
        shapes: of the example inputs; where the file leaves a size open, 1 to this one are allowed for.
        sparse: let the builder consider sparse tactics; it still takes what it times as fastest.
        timing_cache: of an earlier build, used if it was made on this machine.
        progress: called with what TensorRT is at.

    Raises:
        ExportError: with TensorRT's own words, if it cannot parse or build.
    """
    logger = logger_of(trt)
    start = len(logger.lines)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # how the bindings say that the library gave them nothing
        said = logger.lines[-1] if len(logger.lines) > start else first_line(error)
        raise ExportError(f"TensorRT can't start: {said}. Check the GPU with nvidia-smi.") from error
    # TensorRT 11 knows no other kind and ignores the flag; in 10 it makes precision that of the file, too.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise ExportError(f"TensorRT can't parse {onnx.name}: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector gives no tactic names otherwise
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    cache = _attach_cache(config, timing_cache)
    _add_profile(builder, network, config, shapes)
    monitor = _monitor_of(trt)(progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    monitor.raise_stopped()
    log = tuple(logger.lines[start:])
    if plan is None:
        errors = [line for line in log if "ERROR" in line.partition("]")[0]]
        raise ExportError(
            f"TensorRT can't build an engine of {onnx.name}: {errors[-1] if errors else 'it says no why'}"
        )
    return Build(bytes(plan), log, bytes(cache.serialize()))


def load_engine(trt: Any, path: Path) -> Any:
    """Load an engine from its file.

    Raises:
        FileError: if it was built for another GPU or TensorRT, or TensorRT refuses it.
    """
    require_same_machine(path, this_machine(trt))
    return deserialize(trt, path.read_bytes(), path.name)


def deserialize(trt: Any, plan: bytes, name: str) -> Any:
    """Make an engine from its bytes.

    Raises:
        FileError: if TensorRT refuses them.
    """
    logger = logger_of(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        said = f": {logger.lines[-1]}" if logger.lines else ""
        raise FileError(f"{name} can't be loaded as a TensorRT engine{said}")
    return engine


def inspect_engine(trt: Any, engine: Any) -> str:
    """Give the engine inspector's JSON text about all layers."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


@once
def logger_of(trt: Any) -> Any:
    """Give the one logger of this process: TensorRT keeps the first it is given, and sends later builds' messages there."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            # Of the verbose flood only what is said of sparsity: releases differ in the severity they say it with.
            if severity.name != "VERBOSE" or "(Sparsity)" in msg:
                self.lines.append(f"[{severity.name}] {msg}")

    return Logger()


@once
def _monitor_of(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells the outermost phase in tenths; what the callback raises (an interruption) stops the build."""

        def __init__(self, progress: Callable[[str], None]) -> None:
            trt.IProgressMonitor.__init__(self)
            self.progress = progress
            self.stopped: BaseException | None = None
            self.steps: dict[str, int] = {}
            self.told = ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self.steps.get(phase_name)
            if steps and self.stopped is None:
                self._tell(f"{phase_name} {10 * (step + 1) // steps * 10} %")
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def _tell(self, text: str) -> None:
            if text == self.told:
                return
            self.told = text
            try:
                self.progress(text)
            except BaseException as error:
                # TensorRT is C++: nothing may fly through it, so the build is stopped, then this is raised again.
                self.stopped = error

        def raise_stopped(self) -> None:
            if self.stopped is not None:
                raise self.stopped

    return Monitor


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(error.desc() for error in errors) or "it says no why"


def _attach_cache(config: Any, content: bytes) -> Any:
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):  # damaged, or of another GPU or version
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _add_profile(builder: Any, network: Any, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Allow every size the file leaves open to be 1 up to that of the example, which is what is optimised for."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    open_inputs = {tensor.name: tuple(tensor.shape) for tensor in tensors if -1 in tuple(tensor.shape)}
    if not open_inputs:
        return
    profile = builder.create_optimization_profile()
    for name, declared in open_inputs.items():
        smallest = tuple(1 if size == -1 else size for size in declared)
        profile.set_shape(name, smallest, shapes[name], shapes[name])
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT refuses the sizes {shapes} for the inputs {', '.join(open_inputs)}.")
