"""The proof asks every product for its axis. The graphs here are written by hand, one per way a weight can reach it."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model

from nmgraph.errors import FileError
from nmgraph.export.onnx_file import MANIFEST_KEY, SITES_KEY
from nmgraph.export.proof import load_onnx, verify_onnx
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.manifest import Entry, Manifest

# 2:4 along its last axis, of length 8, and along no other one.
SPARSE = np.array([[1, 2, 0, 0, 0, 3, 0, 4]] * 4, dtype=np.float32)


def graph(body, manifest=None, sites=None, **weights):
    model = parse_model(
        '<ir_version: 10, opset_import: ["": 20]> written (float[2, 8] x, float[8, 2] xt) => (float[2, 4] y) {'
        + body
        + "}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    if manifest:
        onnx.helper.set_model_props(model, {MANIFEST_KEY: manifest.to_json(), SITES_KEY: sites})
    return model


def only_check(model, pattern=None):
    found = verify_onnx(model, "written", pattern)
    assert found.problems == ()
    (check,) = found.checks
    assert found.holds is check.holds
    return check


PRODUCTS = {
    "MatMul": ("y = MatMul(x, w)", SPARSE.T),
    "MatMul, weight first": ("y = MatMul(w, xt)", SPARSE),
    "MatMul, batched weight": ("y = MatMul(x, w)", np.stack([SPARSE.T] * 2)),
    "MatMul, batched weight first": ("y = MatMul(w, xt)", np.stack([SPARSE] * 2)),
    "MatMul of a live Transpose": ("wt = Transpose<perm = [1, 0]>(w) y = MatMul(x, wt)", SPARSE),
    "MatMul of a Transpose without perm": ("wt = Transpose(w) y = MatMul(x, wt)", SPARSE),
    "MatMul of two Transposes": (
        "a = Transpose<perm = [1, 0]>(w) b = Transpose<perm = [1, 0]>(a) y = MatMul(x, b)",
        SPARSE.T,
    ),
    "MatMul of a batched Transpose": (
        "wt = Transpose<perm = [0, 2, 1]>(w) y = MatMul(x, wt)",
        np.stack([SPARSE] * 3),
    ),
    "MatMul of a cyclic Transpose": (  # axis 1 of its output is axis 0 of the weight
        "wt = Transpose<perm = [2, 0, 1]>(w) y = MatMul(x, wt)",
        np.stack([SPARSE] * 3, axis=1).transpose(2, 0, 1),
    ),
    "MatMul of a Cast": ("c = Cast<to = 1>(w) y = MatMul(x, c)", SPARSE.T.astype(np.float16)),
    "MatMul of a Cast of a Transpose": (
        "wt = Transpose<perm = [1, 0]>(w) c = Cast<to = 1>(wt) y = MatMul(x, c)",
        SPARSE.astype(np.float16),
    ),
    "MatMul of an Identity": ("c = Identity(w) y = MatMul(x, c)", SPARSE.T),
    "Gemm": ("y = Gemm(x, w)", SPARSE.T),
    "Gemm, transB": ("y = Gemm<transB = 1>(x, w)", SPARSE),
    "Gemm, transB = 0": ("y = Gemm<transB = 0>(x, w)", SPARSE.T),
    "Gemm, weight first": ("y = Gemm(w, xt)", SPARSE),
    "Gemm, weight first, transA": ("y = Gemm<transA = 1>(w, xt)", SPARSE.T),
    "Gemm, transB of a Transpose": ("wt = Transpose<perm = [1, 0]>(w) y = Gemm<transB = 1>(x, wt)", SPARSE.T),
    "Conv 1-D": ("y = Conv(x, w)", SPARSE[:, :, None]),
    "Conv 2-D": ("y = Conv(x, w)", np.tile(SPARSE[:, :, None, None], (1, 1, 3, 3))),
    "Conv 3-D": ("y = Conv(x, w)", np.tile(SPARSE[:, :, None, None, None], (1, 1, 1, 3, 3))),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_sparse_weight_holds_along_the_axis_of_its_product(product):
    body, weight = PRODUCTS[product]
    check = only_check(graph(body, w=weight))
    assert check.holds
    assert (check.name, check.kind, check.tensorrt) == ("w", product.replace(",", " ").split()[0], "")
    assert check.density == 0.5


@pytest.mark.parametrize("product", PRODUCTS)
def test_weight_that_is_sparse_along_another_axis_does_not_hold(product):
    body, weight = PRODUCTS[product]
    moved = np.sort(np.abs(weight).ravel()).reshape(weight.shape)  # as many zeros, all in the first half
    assert not only_check(graph(body, w=moved)).holds


@pytest.mark.parametrize("product", PRODUCTS)
def test_single_weight_too_many_is_found(product):
    body, weight = PRODUCTS[product]
    weight = weight.copy()
    weight[tuple(np.argwhere(weight == 0)[-1])] = 5
    assert only_check(graph(body, w=weight)).finding.endswith("keeps 3 of 4")


def test_weight_in_a_constant_node_is_checked():
    model = graph("y = MatMul(x, w)")
    constant = onnx.helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(SPARSE.T))
    model.graph.node.insert(0, constant)
    assert only_check(model).holds


def test_quantized_weight_is_checked_by_its_integers():
    body = "q = DequantizeLinear(w, scale) y = MatMul(x, q)"
    assert only_check(graph(body, w=SPARSE.T.astype(np.int8), scale=np.float32(0.1).reshape(()))).holds


def test_zeros_of_an_asymmetric_quantization_are_no_zeros():
    body = "q = DequantizeLinear(w, scale, zero) y = MatMul(x, q)"
    weights = {"w": SPARSE.T.astype(np.int8), "scale": np.float32(0.1).reshape(()), "zero": np.int8(3).reshape(())}
    assert not verify_onnx(graph(body, **weights), "written").holds


@pytest.mark.parametrize(
    ("body", "extra", "operator"),
    [
        ("m = Mul(w, mask) p = MatMul(x, m) y = Identity(p)", {"mask": (SPARSE.T != 0).astype(np.float32)}, "Mul"),
        ("m = Where(mask, w, zero) p = MatMul(x, m) y = Identity(p)", {"mask": SPARSE.T != 0, "zero": np.zeros(1, np.float32)}, "Where"),
        ("a = Mul(w, mask) m = Cast<to = 1>(a) p = MatMul(x, m) y = Identity(p)", {"mask": (SPARSE.T != 0).astype(np.float32)}, "Mul"),
    ],
    ids=["Mul", "Where", "Mul behind a Cast"],
)  # fmt: skip
def test_mask_that_was_not_folded_is_a_problem(body, extra, operator):
    found = verify_onnx(graph(body, w=SPARSE.T, **extra), "written")
    assert found.problems[0].startswith(f"{operator} stands between an initializer and MatMul")
    assert not found.holds


def test_products_of_activations_are_no_weights():
    found = verify_onnx(graph("a = Relu(x) y = MatMul(a, xt)"), "written")
    assert found.checks == ()
    assert found.problems == ("no convolution, Gemm or MatMul with a constant weight found",)
    assert not found.holds


def test_grouped_convolution_is_listed_but_need_not_hold():
    found = verify_onnx(graph("y = Conv<group = 2>(x, w)", w=np.ones((4, 4, 1), np.float32)), "written")
    (check,) = found.checks
    assert (check.expected, check.tensorrt) == (False, "grouped convolution")


def test_bias_of_a_gemm_is_no_weight():
    found = verify_onnx(graph("y = Gemm<transB = 1>(x, w, b)", w=SPARSE, b=np.ones(4, np.float32)), "written")
    assert [c.name for c in found.checks] == ["w"]


def test_weight_used_twice_along_one_axis_is_checked_once():
    found = verify_onnx(graph("a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b)", w=SPARSE.T), "written")
    assert [c.name for c in found.checks] == ["w"]


def test_weight_used_along_two_axes_has_to_hold_along_both():
    weight = np.zeros((8, 8), np.float32)
    weight[:4, :4] = [[1, 1, 0, 0]] * 4
    found = verify_onnx(graph("a = MatMul(x, w) y = Gemm<transB = 1>(a, w)", w=weight), "written")
    assert [(c.kind, c.holds) for c in found.checks] == [("MatMul", False), ("Gemm", True)]
    assert not found.holds


def test_weight_that_no_block_divides_need_not_hold_without_a_manifest():
    found = verify_onnx(graph("y = MatMul(x, w)", w=np.ones((6, 4), np.float32)), "written")
    assert [(c.expected, c.holds) for c in found.checks] == [(False, False)]


def test_pattern_that_is_given_is_checked():
    model = graph("y = MatMul(x, w)", w=SPARSE.T)
    assert only_check(model, Pattern(4, 8)).holds
    assert not only_check(model, Pattern(1, 4)).holds


MANIFEST = Manifest(
    "lbc",
    (
        Entry("body", "Linear", (4, 8), "1:4", True),
        Entry("head", "Linear", (4, 8), "2:4", False, reason="left dense on request"),
    ),
)
ONE_OF_FOUR = np.array([[1, 0, 0, 0, 0, 3, 0, 0]] * 4, dtype=np.float32)
TWO_LAYERS = "a = Gemm<transB = 1>(x, w) b = Gemm<transB = 1>(x, v) y = Add(a, b)"


def test_manifest_says_what_each_weight_has_to_hold():
    model = graph(TWO_LAYERS, MANIFEST, '{"w": ["body"], "v": ["head"]}', w=ONE_OF_FOUR, v=np.ones((4, 8), np.float32))
    found = verify_onnx(model, "written")
    assert [(c.name, c.pattern, c.expected, c.holds) for c in found.checks] == [
        ("body", "1:4", True, True),
        ("head", "2:4", False, False),
    ]
    assert found.holds


def test_pattern_of_the_manifest_is_stricter_than_the_usual_one():
    model = graph(TWO_LAYERS, MANIFEST, '{"w": ["body"]}', w=SPARSE, v=np.ones((4, 8), np.float32))
    found = verify_onnx(model, "written")
    assert [c.name for c in found.failures] == ["body"]
    assert [c.name for c in found.checks] == ["body", "v"]


def test_without_the_manifest_every_weight_that_fits_has_to_hold():
    found = verify_onnx(graph(TWO_LAYERS, w=ONE_OF_FOUR, v=np.ones((4, 8), np.float32)), "written")
    assert [c.name for c in found.failures] == ["v"]


def test_site_whose_weight_is_gone_is_a_problem():
    found = verify_onnx(graph(TWO_LAYERS, MANIFEST, "{}", w=SPARSE, v=SPARSE), "written")
    assert found.problems == ("no convolution, Gemm or MatMul uses the weight of body",)
    assert not found.holds


def test_site_whose_weight_is_gone_is_a_problem_though_the_others_hold():
    entries = (Entry("body", "Linear", (4, 8), "2:4", True), Entry("gone", "Linear", (4, 8), "2:4", True))
    found = verify_onnx(graph("y = MatMul(x, w)", Manifest("lbc", entries), '{"w": ["body"]}', w=SPARSE.T), "written")
    assert found.failures == ()
    assert found.problems == ("no convolution, Gemm or MatMul uses the weight of gone",)
    assert not found.holds


def test_file_round_trip(tmp_path):
    onnx.save(graph("y = MatMul(x, w)", w=SPARSE.T), tmp_path / "model.onnx")
    assert verify_onnx(load_onnx(tmp_path / "model.onnx"), "model.onnx").holds


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no ONNX at all", b"\x08\x0a\x12"])
def test_file_that_is_no_onnx_says_so(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(FileError, match=rf"^{path} can't be read as ONNX: .+"):
        load_onnx(path)


def test_missing_file_says_so(tmp_path):
    with pytest.raises(FileError, match=r"model\.onnx .*(No such file|does not exist)"):
        load_onnx(tmp_path / "model.onnx")


def test_file_without_its_external_data_says_so(tmp_path):
    path = tmp_path / "model.onnx"
    model = graph("y = MatMul(x, w)", w=np.zeros((8, 4096), np.float32))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(FileError, match=rf"^{path} can't be read as ONNX: .*weights\.bin"):
        load_onnx(path)
