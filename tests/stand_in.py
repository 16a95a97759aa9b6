"""A stand-in on the CPU for the two kernels of cuSPARSELt, which no CPU has: the same contract, by dense products.

What it takes and gives is what NVIDIA's documentation and torch's own checks say: half precision, both sides of the
sparse matrix multiples of 16, columns of the dense one multiples of 8, a transposed view of something contiguous. What is
compressed has 9/16 of the numbers. Where the real one loses values silently, as more than 2 of 4 stand, this one raises.
"""

from contextlib import contextmanager

import torch
from torch.nn import functional as F

calls = []


def _compress(weight):
    assert weight.dim() == 2
    assert weight.is_contiguous(), weight.stride()
    assert weight.dtype in (torch.float16, torch.bfloat16), weight.dtype
    outputs, inputs = weight.shape
    assert (outputs % 16, inputs % 16) == (0, 0), weight.shape
    blocks = weight.reshape(outputs, -1, 4)
    if bool(((blocks != 0).sum(-1) > 2).any()):
        raise RuntimeError("the stand-in was given a weight that is not 2:4")
    positions = (blocks != 0).byte().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    values = blocks.gather(-1, positions).reshape(outputs, -1)
    pairs = (positions[..., 0] | positions[..., 1] << 2).to(torch.uint8).reshape(outputs, -1, 2)
    metadata = (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(weight.dtype)
    calls.append(("compress", tuple(weight.shape)))
    return torch.cat([values, metadata], dim=1)


def _restored(compressed, inputs):
    outputs = compressed.numel() * 16 // 9 // inputs
    compressed = compressed.reshape(outputs, -1)
    values, metadata = compressed[:, : inputs // 2], compressed[:, inputs // 2 :].contiguous().view(torch.uint8)
    pairs = torch.stack([metadata & 15, metadata >> 4], dim=-1).reshape(outputs, -1)
    positions = torch.stack([pairs & 3, pairs >> 2], dim=-1).long()
    blocks = compressed.new_zeros(outputs, inputs // 4, 4)
    return blocks.scatter(-1, positions, values.reshape(outputs, -1, 2)).reshape(outputs, inputs)


def _multiply(compressed, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0, split_k=1, split_k_mode=-1):  # fmt: skip
    assert {t.dtype for t in (compressed, dense, bias) if t is not None} == {dense.dtype}
    assert dense.t().is_contiguous(), dense.stride()
    assert dense.shape[1] % 8 == 0, dense.shape
    calls.append(("multiply", (compressed.numel() * 16 // 9 // dense.shape[0], *dense.shape)))
    y = F.linear(dense.t(), _restored(compressed, dense.shape[0]), bias)
    return y if transpose_result else y.t().contiguous()


def _search(compressed, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False):
    return 1


@contextmanager
def kernels():
    """Let torch find the stand-in, if it does not yet; gives the list of what was called since."""
    calls.clear()
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::_cslt_compress", "CPU"):
        yield calls  # as in a process that was forked off
        return
    library = torch.library.Library("aten", "IMPL")
    library.impl("_cslt_compress", _compress, "CPU")
    library.impl("_cslt_sparse_mm", _multiply, "CPU")
    library.impl("_cslt_sparse_mm_search", _search, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
