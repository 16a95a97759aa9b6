"""The products on sparse tensor cores, by a stand-in for their kernels, against masked dense ones."""

import pytest
import stand_in
import torch
from torch.nn import functional as F

from nmgraph.layers.sparse_product import DENSE, Operands, compress, multiply, multiply_24
from nmgraph.nm.masks import magnitude_mask
from nmgraph.nm.pattern import TENSOR_CORES
from nmgraph.nm.permutation import column_sparse

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernels():
    with stand_in.kernels() as calls:
        yield calls


def masked(outputs, inputs, dtype=torch.bfloat16, seed=0):
    w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return (w * magnitude_mask(w.unsqueeze(1), TENSOR_CORES).squeeze(1)).to(dtype)


def drawn(*shape, dtype=torch.bfloat16, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_order(w, order):
    backward = column_sparse(w.unsqueeze(1), order, TENSOR_CORES).squeeze(1)
    return backward, backward.index_select(0, order).t().contiguous()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 7, 8, 33])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_product_is_the_masked_dense_one(dtype, rows, bias, packed):
    w, x = masked(32, 64, dtype), drawn(rows, 64, dtype=dtype)
    b = drawn(32, dtype=dtype, seed=2) if bias else None
    y = multiply_24(compress(w) if packed else w, x, b, 32, 0)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, w, b))


def test_what_is_compressed_takes_nine_sixteenths():
    w = masked(32, 64)
    assert compress(w).numel() * 16 == w.numel() * 9


def test_the_stand_in_refuses_what_the_kernel_would_spoil():
    with pytest.raises(RuntimeError, match="not 2:4"):
        compress(torch.ones(16, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse_forward", [True, False])
@pytest.mark.parametrize("sparse_backward", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
def test_gradients_are_those_of_two_masked_weights(dtype, master, sparse_forward, sparse_backward, permuted):
    w, x, b = masked(32, 64, dtype), drawn(24, 64, dtype=dtype).requires_grad_(), drawn(32, dtype=master)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3)) if permuted else None
    backward, turned = in_order(w, torch.arange(32) if order is None else order)
    edge, b = w.to(master, copy=True).requires_grad_(), b.requires_grad_()
    operands = Operands(
        compress(w) if sparse_forward else w, 0 if sparse_forward else DENSE,
        compress(turned) if sparse_backward else backward, 0 if sparse_backward else DENSE, order,
    )  # fmt: skip
    y = multiply(x, edge, b, operands)
    dy = drawn(24, 32, dtype=dtype, seed=4)
    y.backward(dy)
    assert torch.equal(y, F.linear(x.detach(), w, b.detach().to(dtype)))
    torch.testing.assert_close(x.grad.float(), dy.float() @ backward.float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(edge.grad, (dy.t() @ x.detach()).to(master), rtol=0, atol=0)
    torch.testing.assert_close(b.grad, dy.sum(0).to(master), rtol=0, atol=0)
    assert edge.grad.dtype == b.grad.dtype == master


def test_only_gradients_that_are_wanted_are_computed(kernels):
    w, x = masked(32, 64), drawn(8, 64)
    operands = Operands(compress(w), 0, None, 0, None)
    edge = w.clone().requires_grad_()
    kernels.clear()
    multiply(x, edge, None, operands).sum().backward()
    assert kernels == [("multiply", (32, 64, 8))]
    assert x.grad is None


def test_gradients_that_are_views_are_taken(kernels):
    w, x = masked(32, 64), drawn(8, 64).requires_grad_()
    _, turned = in_order(w, torch.arange(32))
    y = multiply(x, w.clone().requires_grad_(), None, Operands(w, DENSE, compress(turned), 0, None))
    y.sum().backward()  # whose gradient is one number, expanded
    backward, _ = in_order(w, torch.arange(32))
    torch.testing.assert_close(x.grad, torch.ones(8, 32, dtype=torch.bfloat16) @ backward, rtol=0.02, atol=0.02)


def test_the_operator_keeps_torchs_rules_for_operators():
    w, x, b = masked(32, 64), drawn(24, 64), drawn(32)
    checks = ("test_schema", "test_faketensor")
    for weight in (w, compress(w)):
        torch.library.opcheck(multiply_24, (weight, x, b, 32, 0), test_utils=checks)
        torch.library.opcheck(multiply_24, (weight, x, None, 32, 0), test_utils=checks)
    torch.library.opcheck(multiply_24, (w.t().contiguous().t(), x, b, 32, DENSE), test_utils=checks)


def test_shapes_are_known_on_the_meta_device():
    y = multiply_24(masked(32, 64).to("meta"), drawn(5, 64).to("meta"), None, 32, 0)
    assert (y.shape, y.dtype, y.device.type) == ((5, 32), torch.bfloat16, "meta")


def test_a_gradient_of_a_gradient_is_refused_with_the_way_out():
    w, x = masked(32, 64), drawn(8, 64).requires_grad_()
    y = multiply(x, w.clone().requires_grad_(), None, Operands(compress(w), 0, compress(in_order(w, torch.arange(32))[1]), 0, None))  # fmt: skip
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='hardware="off"'):
        dx.float().square().sum().backward()
