"""A fake of the ``tensorrt`` module: builds "engines" that ONNX Runtime runs on the CPU, and says what one wants to hear.

It shows that nmgraph calls the API in a sensible order with sensible values. It shows nothing of TensorRT itself.
``test_tensorrt_api.py`` holds its names and parameters to the real bindings; what begins with ``fake_`` is its own.
"""

import base64
import ctypes
import enum
import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

__version__ = "11.4.0.106"


class BuilderFlag(enum.Enum):
    SPARSE_WEIGHTS = 7


class ProfilingVerbosity(enum.Enum):
    DETAILED = 2


class LayerInformationFormat(enum.Enum):
    JSON = 1


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8
    FP8 = 6


class ILogger:
    class Severity(enum.Enum):
        ERROR = 1
        INFO = 3
        VERBOSE = 4

    def __init__(self):
        pass


class IProgressMonitor:
    def __init__(self):
        pass


class FakeWorld:
    """What a test sets, and what it reads back."""

    def __init__(self):
        self.builds = []  # one dict per build
        self.broken = set()  # start, parse, build, load, run, cache
        self.silent = False  # the log says nothing of sparsity
        self.wrong = False  # engines answer something else
        self.dense_ms = 1.25
        self.clock = 0.0


fake_world = FakeWorld()
_DTYPES = {1: DataType.FLOAT, 10: DataType.HALF, 7: DataType.INT64}
_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64}


class Builder:
    def __init__(self, logger):
        if "start" in fake_world.broken:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.fake_logger = logger

    def create_network(self, flags=0):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        sparse = BuilderFlag.SPARSE_WEIGHTS in config.fake_flags
        fake_world.builds.append({
            "sparse": sparse, "timing_cache": config.fake_cache.fake_content, "verbosity": config.profiling_verbosity,
            "profiles": [p.fake_shapes for p in config.fake_profiles],
        })  # fmt: skip
        if not _phases(config.progress_monitor):
            fake_world.builds[-1]["stopped"] = True
            return None
        if "build" in fake_world.broken:
            self.fake_logger.log(ILogger.Severity.ERROR, "Could not find any implementation for node node_conv2d.")
            return None
        self.fake_logger.log(ILogger.Severity.VERBOSE, "a thousand lines like this one")
        if sparse and not fake_world.silent:
            names = ", ".join(node.name for node in network.fake_products)
            picked = ", ".join(node.name for node in network.fake_products if node.op_type == "Conv")
            self.fake_logger.log(ILogger.Severity.INFO, f"(Sparsity) Layers eligible for sparse math: {names}")
            self.fake_logger.log(
                ILogger.Severity.INFO,
                f"(Sparsity) TRT inference plan picked sparse implementation for layers: {picked}",
            )
        content = base64.b64encode(network.fake_model.SerializeToString()).decode()
        return json.dumps({"sparse": sparse, "onnx": content}).encode()


def _phases(monitor):
    monitor.phase_start("Building", None, 4)
    monitor.phase_start("Timing", "Building", 2)
    going = all([monitor.step_complete("Timing", 0), *(monitor.step_complete("Building", i) for i in range(4))])
    monitor.phase_finish("Timing")
    monitor.phase_finish("Building")
    return going


class IBuilderConfig:
    def __init__(self):
        self.fake_flags, self.fake_profiles, self.fake_cache = set(), [], None
        self.profiling_verbosity = self.progress_monitor = None

    def set_flag(self, flag):
        self.fake_flags.add(flag)

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.fake_content and "cache" in fake_world.broken:
            return False
        self.fake_cache = cache
        return True

    def add_optimization_profile(self, profile):
        self.fake_profiles.append(profile)
        return -1 if "profile" in fake_world.broken else 0


class ITimingCache:
    def __init__(self, content):
        self.fake_content = bytes(content)

    def serialize(self):
        return self.fake_content + b"timed;"


class IOptimizationProfile:
    def __init__(self):
        self.fake_shapes = {}

    def set_shape(self, input, min, opt, max):
        self.fake_shapes[input] = (min, opt, max)


class INetworkDefinition:
    fake_model = None

    @property
    def num_inputs(self):
        return len(self.fake_model.graph.input)

    def get_input(self, index):
        value = self.fake_model.graph.input[index]
        return SimpleNamespace(name=value.name, shape=[d.dim_value or -1 for d in value.type.tensor_type.shape.dim])

    @property
    def fake_products(self):
        return [n for n in self.fake_model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]


class OnnxParser:
    def __init__(self, network, logger):
        self.fake_network = network
        self.num_errors = 0

    def parse_from_file(self, model):
        self.fake_network.fake_model = onnx.load(model)
        self.num_errors = int("parse" in fake_world.broken)
        return not self.num_errors

    def get_error(self, index):
        return ParserError()


class ParserError:
    def desc(self):
        return "no importer registered for op: Whistle"


class Runtime:
    def __init__(self, logger):
        self.fake_logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        if "load" in fake_world.broken:
            self.fake_logger.log(ILogger.Severity.ERROR, "Serialization assertion failed")
            return None
        return ICudaEngine(json.loads(serialized_engine))


class ICudaEngine:
    def __init__(self, plan):
        self.fake_sparse = plan["sparse"]
        self.fake_model = onnx.load_from_string(base64.b64decode(plan["onnx"]))
        graph = self.fake_model.graph
        self.fake_values = {v.name: v for v in (*graph.input, *graph.output)}
        self.fake_fed = [v.name for v in graph.input]

    @property
    def num_io_tensors(self):
        return len(self.fake_values)

    def get_tensor_name(self, index):
        return list(self.fake_values)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.fake_fed else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return _DTYPES[self.fake_values[name].type.tensor_type.elem_type]

    def create_execution_context(self):
        return IExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self)


class EngineInspector:
    def __init__(self, engine):
        self.fake_engine = engine

    def get_engine_information(self, format):
        assert format is LayerInformationFormat.JSON
        network = INetworkDefinition()
        network.fake_model = self.fake_engine.fake_model
        return json.dumps({"Layers": [self._layer(n) for n in network.fake_products], "I/O Tensors": []})

    def _layer(self, node):
        if node.op_type != "Conv":  # as where Myelin generates a kernel
            return {"Name": f"__myl_{node.op_type}", "LayerType": "kgen", "TacticName": f"__myl_{node.op_type}_0x1"}
        kind = "sparse_conv_sptensor" if self.fake_engine.fake_sparse else "implicit_gemm"
        metadata = f"[ONNX Layer: {node.name}]\x1e[ONNX Layer: relu]"
        return {
            "Name": node.name,
            "LayerType": "CaskConvolution",
            "TacticName": f"sm90_fprop_{kind}",
            "Metadata": metadata,
        }


class IExecutionContext:
    def __init__(self, engine):
        self.fake_engine, self.fake_addresses, self.fake_shapes = engine, {}, {}
        self.fake_session = onnxruntime.InferenceSession(engine.fake_model.SerializeToString())

    def set_input_shape(self, name, shape):
        self.fake_shapes[name] = shape
        return True

    def set_tensor_address(self, name, memory):
        self.fake_addresses[name] = memory
        return True

    def get_tensor_shape(self, name):
        zeros = {n: np.zeros(s, self._numpy(n)) for n, s in self.fake_shapes.items()}
        return self.fake_session.run([name], zeros)[0].shape

    def execute_async_v3(self, stream_handle):
        assert stream_handle == FakeStream.cuda_stream
        fake_world.clock += 1.0 if self.fake_engine.fake_sparse else fake_world.dense_ms
        given = {n: self._memory(n, s) for n, s in self.fake_shapes.items()}
        names = [n for n in self.fake_addresses if n not in given]
        for name, values in zip(names, self.fake_session.run(names, given), strict=True):
            self._memory(name, values.shape)[...] = values + fake_world.wrong
        return "run" not in fake_world.broken

    def _numpy(self, name):
        return _NUMPY[self.fake_engine.get_tensor_dtype(name)]

    def _memory(self, name, shape):
        dtype = np.dtype(self._numpy(name))
        size = int(np.prod(shape)) * dtype.itemsize
        content = (ctypes.c_char * size).from_address(self.fake_addresses[name])
        return np.frombuffer(content, dtype).reshape(shape)


class FakeStream:
    """Stands in for a CUDA stream."""

    cuda_stream = 4711

    def synchronize(self):
        pass


class FakeEvent:
    """Stands in for a CUDA event, on the fake clock."""

    def record(self, stream):
        self.fake_time = fake_world.clock

    def elapsed_time(self, stop):
        return stop.fake_time - self.fake_time
