"""The trtexec line that builds on another machine what ``--trt`` builds here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import onnx

from nmgraph.export.inputs import Inputs
from nmgraph.export.trt_files import CACHE, ENGINE, LAYERS


def trtexec_line(model: onnx.ModelProto, inputs: Inputs) -> str:
    """Write the line, to be run in the export's directory.

    Args:
        model: the exported file.
        inputs: the example inputs, whose shapes count where the file leaves sizes open.
    """
    # --stronglyTyped: TensorRT 11 ignores it, 10 would choose precisions of its own without.
    words = ["trtexec", "--onnx=model.onnx", f"--saveEngine={ENGINE}", "--stronglyTyped", "--sparsity=enable"]
    declared = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    open_inputs = {name: sizes for name, sizes in declared.items() if 0 in sizes}
    if open_inputs:
        smallest = {name: [size or 1 for size in sizes] for name, sizes in open_inputs.items()}
        example = {name: list(values.shape) for name, values in inputs.named(list(open_inputs)).items()}
        words += [f"--minShapes={_spell(smallest)}", f"--optShapes={_spell(example)}", f"--maxShapes={_spell(example)}"]
    words += [f"--timingCacheFile={CACHE}", "--profilingVerbosity=detailed", f"--exportLayerInfo={LAYERS}", "--verbose"]
    return shlex.join(words)


def _spell(shapes: Mapping[str, list[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, sizes))}" for name, sizes in shapes.items())
