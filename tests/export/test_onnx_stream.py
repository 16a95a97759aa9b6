"""Files written tensor by tensor are what protobuf writes whole."""

import onnx
import pytest
import torch
from models import Encoder, resnet

from nmgraph.export.onnx_stream import _varint, save_streamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "shape"), [(resnet, (1, 3, 32, 32)), (Encoder, (1, 5, 32))], ids=["ResNet", "TransformerEncoder"]
)
def test_file_holds_the_same_message(make, shape, dtype, tmp_path):
    model = make().eval().to(dtype)
    program = torch.onnx.export(model, (torch.zeros(shape, dtype=dtype),), dynamo=True, verbose=False)
    program.save(str(tmp_path / "whole.onnx"))
    tensors = {name: value.const_value for name, value in program.model.graph.initializers.items()}
    save_streamed(program.model, tmp_path / "streamed.onnx")
    assert {name: value.const_value for name, value in program.model.graph.initializers.items()} == tensors
    whole, streamed = (onnx.load(tmp_path / f"{name}.onnx") for name in ("whole", "streamed"))
    for message in (whole, streamed):
        message.graph.initializer.sort(key=lambda t: t.name)
    assert len(whole.graph.initializer) > 5
    assert streamed == whole
    onnx.checker.check_model(str(tmp_path / "streamed.onnx"))


def test_counts_are_encoded_as_protobuf_does():
    for number in (0, 1, 127, 128, 300, 2**14 - 1, 2**14, 2**31 - 1):
        by_protobuf = onnx.TensorProto(dims=[number]).SerializeToString()
        assert by_protobuf.endswith(_varint(number))
