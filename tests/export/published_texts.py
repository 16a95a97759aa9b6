"""What TensorRT says of sparsity: written by hand, modelled on published logs. None of it was recorded here.

The two sparsity lines, the shape of the inspector's layers and the kinds of tactic names follow TensorRT's developer
guide, its 10-to-11 migration page, and what users posted with NVIDIA/TensorRT issues 1403, 2169, 2271, 4020, 4054, 4056
and 4694. Layer names, sizes and hashes are made up. That TensorRT 11 still writes the two lines is not known.
"""

import json

LOG_8_SPARSE = """\
[08/05/2024-12:06:31] [W] [TRT] onnx2trt_utils.cpp:374: Your ONNX model has been generated with INT64 weights.
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: MatMul_40, Conv_6 + Relu_7, Conv_8 + Add_9 + Relu_10
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: Conv_8 + Add_9 + Relu_10
[08/05/2024-12:06:55] [I] [TRT] Total Host Persistent Memory: 160
"""

LOG_8_NONE_PICKED = """\
[TensorRT] INFO: (Sparsity) Layers eligible for sparse math: Conv_0
[TensorRT] INFO: (Sparsity) TRT inference plan picked sparse implementation for layers:
"""

LOG_DENSE = """\
[09/16/2025-09:55:37] [I] [TRT] Total Activation Memory: 7864832
[09/16/2025-09:55:38] [I] [TRT] Engine generation completed in 31.19 seconds.
"""

LOG_10_SPARSE = """\
[INFO] (Sparsity) Layers eligible for sparse math: /layer1/conv1/Conv + /layer1/relu/Relu, /layer2/conv1/Conv
[INFO] (Sparsity) TRT inference plan picked sparse implementation for layers: /layer2/conv1/Conv
[INFO] Engine generation completed in 12.3 seconds.
"""


def _layer(name, kind, tactic=None, *, formats="Format/Datatype", **more):
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [2, 160, 16, 30], formats: "Channel major FP16 format"}
    shown = {"Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], **more}
    return shown | ({} if tactic is None else {"TacticName": tactic, "TacticValue": "0x00000000000003e8"})


def _onnx(*nodes):
    return "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)


SPARSE_CONV = "sm80_xmma_fprop_sparse_conv_f16f16_f16f16_f16_nhwc_nhwc_tilesize128x128x64_stage3_sptensor16x8x32"
SPARSE_GEMM = "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64_stage3_sptensor16x8x32"
DENSE_CONV = "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize64x64x64_stage4_tensor16x8x16"
DENSE_INT8 = "sm80_xmma_fprop_avdt_dense_int8int8_int8_float_tilesize128x64x64"

INSPECTOR_8 = json.dumps({
    "Layers": [
        _layer("Conv_6 + Relu_7", "CaskConvolution", DENSE_CONV, HasSparseWeights=1),
        _layer("Conv_8 + Add_9 + Relu_10", "CaskConvolution", SPARSE_CONV, HasSparseWeights=1),
        _layer("{ForeignNode[MatMul_40...Add_41]}", "Myelin"),
    ],
    "Bindings": ["x", "y"],
})  # fmt: skip

INSPECTOR_10 = json.dumps({
    "Layers": [
        _layer("Reformatting CopyNode for Input Tensor 0 to /layer1/conv1/Conv", "Reformat"),
        _layer(
            "/layer1/conv1/Conv + /layer1/relu/Relu", "CaskConvolution", DENSE_INT8, HasSparseWeights=1,
            Metadata=_onnx("/layer1/conv1/Conv", "/layer1/relu/Relu"),
        ),
        _layer("/layer2/conv1/Conv", "CaskConvolution", SPARSE_CONV, Metadata=_onnx("/layer2/conv1/Conv")),
        _layer("/model_10/attn/MatMul_myl109_2", "gemm", "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize64x64"),
        _layer("__myl_MulMaxSubExpSum_myl109_3", "kgen", "__myl_MulMaxSubExpSum_0x5d1c", Metadata=_onnx("/attn/MatMul_1")),
    ],
    "Bindings": ["x", "y"],
})  # fmt: skip

INSPECTOR_11 = json.dumps({
    "Layers": [
        _layer("node_conv2d + node_relu", "CaskConvolution", SPARSE_CONV, formats="Format", Metadata=_onnx("node_conv2d", "node_relu")),
        _layer("node_linear_myl0_2", "gemm", SPARSE_GEMM, formats="Format", Metadata=_onnx("node_linear")),
        _layer("node_conv2d_1", "CaskConvolution", "sm100_fprop_future_f16_0x12", formats="Format", Metadata=_onnx("node_conv2d_1")),
        _layer("__myl_Fc_myl0_3", "kgen", "__myl_Fc_0x77aa", formats="Format", Metadata=_onnx("node_MatMul_3")),
    ],
    "I/O Tensors": [{"Name": "x", "IOMode": "Input", "DataType": "Half", "Dimensions": [1, 64]}],
})  # fmt: skip

INSPECTOR_NAMES_ONLY = json.dumps({"Layers": ["Conv_6 + Relu_7", "Conv_8"], "Bindings": ["x"]})
