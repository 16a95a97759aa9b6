"""An ONNX file that takes any batch size."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import Encoder, resnet
from torch import nn

import nmgraph
from nmgraph.errors import ExportError


def export(model, directory, inputs, **options):
    converted = nmgraph.convert(model, method="srste")
    return nmgraph.export(converted, directory, example_inputs=inputs, dynamic_batch=True, **options)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(resnet, (1, 3, 32, 32)), (Encoder, (1, 5, 32))],
    ids=["ResNet", "TransformerEncoder"],
)
def test_file_takes_other_batches_than_the_example(make, shape, tmp_path):
    report = export(make(), tmp_path / "out", torch.randn(shape))
    assert report.holds
    assert len(report.parity.outputs) == 3  # one output, compared at three sizes
    assert "of 1 output(s) in 3 runs (" in str(report.parity)
    file = onnx.load(tmp_path / "out" / "model.onnx")
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for batch in (1, 2, 7):
        (answer,) = session.run(None, {session.get_inputs()[0].name: np.zeros((batch, *shape[1:]), np.float32)})
        assert answer.shape[0] == batch


def test_inputs_by_name_are_opened_too(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, a, b):
            return self.first(a) + self.second(b)

    report = export(Sum(), tmp_path / "out", {"a": torch.randn(2, 16), "b": torch.randn(2, 16)})
    assert report.holds
    file = onnx.load(tmp_path / "out" / "model.onnx")
    assert all(i.type.tensor_type.shape.dim[0].dim_param for i in file.graph.input)


def test_inputs_without_a_common_batch_are_refused(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x, scale):
            return self.layer(x) * scale

    with pytest.raises(ExportError, match="have no batch axis in common"):
        export(Scaled(), tmp_path / "out", (torch.randn(2, 16), torch.ones(8)))
    assert not (tmp_path / "out").exists()


def test_model_that_fixes_its_batch_says_so(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            return self.layer(x.reshape(2, 16))

    with pytest.raises(ExportError, match="Fixed does not take the inputs 1x16"):
        export(Fixed(), tmp_path / "out", torch.randn(2, 16))


def test_open_batch_without_an_onnx_file_is_refused(tmp_path):
    with pytest.raises(ExportError, match="there is no ONNX file to leave a batch open in"):
        export(nn.Linear(16, 8), tmp_path / "out", torch.randn(2, 16), onnx=False, safetensors=True)
