"""A real engine on a real GPU. Nowhere else is shown that TensorRT takes what nmgraph gives it."""

import importlib.util
import json

import pytest
import torch
from torch import nn

import nmgraph

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt") is None, reason="TensorRT is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def wide():
    """Wide enough that a sparse kernel may win."""
    layers = [m for _ in range(3) for m in (nn.Conv2d(512, 512, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 64)).eval()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    torch.manual_seed(0)
    model = nmgraph.convert(wide(), method="srste")
    directory = tmp_path_factory.mktemp("real") / "export"
    x = torch.randn(8, 512, 28, 28)
    return nmgraph.export(model, directory, example_inputs=x, trt=True, precision="fp16")


def test_engine_answers_as_the_model(report):
    assert report.engine.holds, str(report.engine)


def test_both_engines_are_timed(report):
    assert report.engine.sparse.median_ms > 0
    assert report.engine.dense.median_ms > 0


def test_every_product_is_found_in_the_engine_or_said_not_to_be(report):
    assert [layer.sites for layer in report.engine.layers] == [("0",), ("2",), ("4",), ("8",)]
    convolutions = report.engine.layers[:3]
    assert all(layer.runs in ("sparse", "dense", "unknown") for layer in convolutions), convolutions


def test_build_log_speaks_of_sparsity(report):
    assert report.engine.log_speaks
    assert all(layer.eligible for layer in report.engine.layers[:3])


def test_engine_loads_where_it_was_built_and_nowhere_else(report):
    import tensorrt

    from nmgraph.errors import FileError
    from nmgraph.export.trt_build import load_engine

    plan = report.directory / "model.plan"
    assert load_engine(tensorrt, plan) is not None
    said = plan.with_name("model.plan.json")
    said.write_text(json.dumps(json.loads(said.read_text()) | {"gpu": "another"}))
    with pytest.raises(FileError, match="was built for another"):
        load_engine(tensorrt, plan)
