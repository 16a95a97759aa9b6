"""What the log and the inspector say, and what is made of it where they say nothing."""

import json

import published_texts as texts
import pytest

from nmgraph.export.trt_tactics import judge, parse_inspector, parse_log

SILENT = parse_log([])


def told(node, inspector="", log="", obstacle=""):
    found = judge(node, "Conv", (), obstacle, parse_inspector(inspector), parse_log(log.splitlines()))
    return found.runs, found.said_by, found.eligible


def test_log_lists_nodes_of_fused_layers():
    log = parse_log(texts.LOG_8_SPARSE.splitlines())
    assert log.eligible == {"MatMul_40", "Conv_6", "Relu_7", "Conv_8", "Add_9", "Relu_10"}
    assert log.picked == {"Conv_8", "Add_9", "Relu_10"}


def test_empty_list_in_the_log_is_not_silence():
    log = parse_log(texts.LOG_8_NONE_PICKED.splitlines())
    assert (log.eligible, log.picked) == (frozenset({"Conv_0"}), frozenset())
    assert parse_log(texts.LOG_DENSE.splitlines()) == SILENT
    assert (SILENT.eligible, SILENT.picked) == (None, None)


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", "null"])
def test_inspector_that_says_nothing_gives_no_layers(text):
    assert parse_inspector(text) == ()
    assert told("Conv_6", text) == ("not visible", "", None)


@pytest.mark.parametrize(
    ("inspector", "log", "node", "expected"),
    [
        # A dense tactic with HasSparseWeights=1 is dense; the tactic counts.
        (texts.INSPECTOR_8, texts.LOG_8_SPARSE, "Conv_6", ("dense", "tactic", True)),
        (texts.INSPECTOR_8, texts.LOG_8_SPARSE, "Conv_8", ("sparse", "tactic", True)),
        # Inside Myelin no tactic is shown, but the log says what was not picked.
        (texts.INSPECTOR_8, texts.LOG_8_SPARSE, "MatMul_40", ("dense", "build log", True)),
        (texts.INSPECTOR_8, "", "MatMul_40", ("not visible", "", None)),
        (texts.INSPECTOR_8, texts.LOG_DENSE, "Conv_8", ("sparse", "tactic", None)),
        (texts.INSPECTOR_10, texts.LOG_10_SPARSE, "/layer1/conv1/Conv", ("dense", "tactic", True)),
        (texts.INSPECTOR_10, texts.LOG_10_SPARSE, "/layer2/conv1/Conv", ("sparse", "tactic", True)),
        # Myelin writes _ for . in the names of its kernels.
        (texts.INSPECTOR_10, texts.LOG_10_SPARSE, "/model.10/attn/MatMul", ("dense", "tactic", False)),
        (texts.INSPECTOR_10, texts.LOG_10_SPARSE, "/attn/MatMul_1", ("not visible", "", False)),
        (texts.INSPECTOR_10, texts.LOG_10_SPARSE, "/nowhere/Conv", ("not visible", "", False)),
        (texts.INSPECTOR_11, "", "node_conv2d", ("sparse", "tactic", None)),
        (texts.INSPECTOR_11, "", "node_linear", ("sparse", "tactic", None)),
        # Kernel names of later GPUs are not known: neither yes nor no.
        (texts.INSPECTOR_11, "", "node_conv2d_1", ("unknown", "", None)),
        (texts.INSPECTOR_11, "", "node_MatMul_3", ("not visible", "", None)),
        (texts.INSPECTOR_11, "(Sparsity) Layers eligible for sparse math: node_conv2d_1", "node_conv2d_1", ("unknown", "", True)),
        (texts.INSPECTOR_NAMES_ONLY, "", "Conv_8", ("not visible", "", None)),
        ("", texts.LOG_8_SPARSE, "Conv_8", ("sparse", "build log", True)),
    ],
)  # fmt: skip
def test_verdict_names_what_it_rests_on(inspector, log, node, expected):
    assert told(node, inspector, log) == expected


@pytest.mark.parametrize("tactic", [texts.SPARSE_CONV, texts.SPARSE_GEMM, "sm80_xmma_fprop_avdt_sparse_int8int8_x"])
def test_published_sparse_tactics_are_known(tactic):
    assert told("a", json.dumps({"Layers": [{"Name": "a", "TacticName": tactic}]}))[0] == "sparse"


@pytest.mark.parametrize("tactic", [texts.DENSE_CONV, texts.DENSE_INT8])
def test_published_dense_tactics_are_known(tactic):
    assert told("a", json.dumps({"Layers": [{"Name": "a", "TacticName": tactic}]}))[0] == "dense"


def test_name_of_a_generated_kernel_is_no_tactic():
    layer = {"Name": "__myl_Gat", "Metadata": "[ONNX Layer: a]", "TacticName": "__myl_SparseGather_0x5d1c"}
    assert told("a", json.dumps({"Layers": [layer]}))[0] == "not visible"


def test_a_node_is_not_taken_for_one_whose_name_begins_alike():
    assert told("Conv", texts.INSPECTOR_8, texts.LOG_8_SPARSE) == ("not visible", "", False)
    assert told("node_conv2d_10", texts.INSPECTOR_11)[0] == "not visible"
