"""Write an ONNX file tensor by tensor, as protobuf would write it whole.

``SerializeToString`` holds the weights three times at its peak: the tensors, the message, and its bytes. Here each is
written from where it lies. The file is an ordinary ONNX file with its weights inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import onnx
import onnx_ir

# (field number << 3) | 2: a field of that many bytes, which follow their count.
_MODEL_GRAPH = bytes([7 << 3 | 2])
_GRAPH_INITIALIZER = bytes([5 << 3 | 2])
_TENSOR_RAW_DATA = bytes([9 << 3 | 2])


def save_streamed(model: onnx_ir.Model, path: Path) -> None:
    """Write a model; the file is smaller than 2 GiB, as every protobuf message is.

    Args:
        model: its initializers are read one at a time.
        path: of the file.
    """
    tensors = {
        name: tensor
        for name, value in model.graph.initializers.items()
        if (tensor := value.const_value) is not None and tensor.dtype != onnx_ir.DataType.STRING
    }
    proto = _without_data(model, tensors)
    heads = {t.name: t.SerializeToString() for t in map(_head, proto.graph.initializer) if t.name in tensors}
    inline = [t for t in proto.graph.initializer if t.name not in tensors]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inline)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    fields = {name: len(heads[name]) + _field_size(tensor.nbytes) for name, tensor in tensors.items()}
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        _begin_field(file, _MODEL_GRAPH, len(graph) + sum(map(_field_size, fields.values())))
        file.write(graph)
        for name, tensor in tensors.items():
            _begin_field(file, _GRAPH_INITIALIZER, fields[name])
            file.write(heads[name])
            _begin_field(file, _TENSOR_RAW_DATA, tensor.nbytes)
            file.write(tensor.tobytes())


def _without_data(model: onnx_ir.Model, tensors: dict[str, onnx_ir.TensorProtocol]) -> onnx.ModelProto:
    """Serialize everything but the data of these initializers."""
    values = model.graph.initializers
    try:
        for name, tensor in tensors.items():
            shape: Any = tensor.shape
            values[name].const_value = onnx_ir.ExternalTensor("", None, None, tensor.dtype, shape=shape, name=name)
        return onnx_ir.to_proto(model)
    finally:
        for name, tensor in tensors.items():
            values[name].const_value = tensor


def _head(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)


def _varint(number: int) -> bytes:
    """Encode a count in groups of seven bits, the lowest first.

    >>> _varint(300).hex()
    'ac02'
    """
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _field_size(content: int) -> int:
    return 1 + len(_varint(content)) + content


def _begin_field(file: IO[bytes], tag: bytes, content: int) -> None:
    file.write(tag + _varint(content))
