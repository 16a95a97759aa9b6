"""Code that takes a layer's weight for itself instead of calling the layer."""

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nmgraph
from nmgraph.layers.masked import masked_weights
from nmgraph.methods import METHODS

both = pytest.mark.parametrize("method", METHODS)


def concluded(model):
    """Bring LBC's masks, which mask nothing at first, to their end."""
    for weight in masked_weights(model).values():
        weight.state = weight.told.method.conclude(weight.raw_OSC.detach(), weight.state, weight.told.pattern)
    return model


class Operators(TorchDispatchMode):
    """Note the names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **kwargs or {})


@both
@pytest.mark.parametrize("train", [False, True])
def test_multihead_attention_multiplies_by_the_masked_output_projection(method, train):
    attention = concluded(nmgraph.convert(nn.MultiheadAttention(16, 2, batch_first=True), method=method)).train(train)
    finished = nmgraph.finalize(attention)
    x = torch.randn(3, 5, 16)
    assert torch.equal(attention(x, x, x)[0], finished(x, x, x)[0])
    assert (finished.out_proj.weight == 0).sum() == finished.out_proj.weight.numel() / 2


@both
def test_the_fused_fast_path_of_multihead_attention_uses_masked_weights(method):
    attention = concluded(nmgraph.convert(nn.MultiheadAttention(16, 2, batch_first=True), method=method)).eval()
    finished = nmgraph.finalize(attention)
    x = torch.randn(3, 5, 16)
    with torch.no_grad(), Operators() as ran:
        fast = attention(x, x, x)[0]
    assert "_native_multi_head_attention.default" in ran.names
    with torch.no_grad():
        assert torch.equal(fast, finished(x, x, x)[0])


@both
def test_attention_sends_a_gradient_to_the_raw_output_projection(method):
    attention = concluded(nmgraph.convert(nn.MultiheadAttention(16, 2), method=method))
    x = torch.randn(5, 3, 16)
    attention(x, x, x)[0].square().sum().backward()
    kept = nm(attention.out_proj).mask()
    grad = nm(attention.out_proj).raw.grad
    assert (grad[kept] != 0).all()
    assert (grad[~kept] != 0).all() == (method in ("bimask", "maxq", "srste", "sste", "tmask"))


@both
def test_the_fused_fast_path_of_an_encoder_layer_uses_masked_weights(method):
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = concluded(nmgraph.convert(encoder, method=method))
    finished = nmgraph.finalize(encoder).eval()
    x = torch.randn(3, 5, 16)
    slow = encoder.train()(x)
    with torch.no_grad(), Operators() as ran:
        fast = encoder.eval()(x)
    assert "_transformer_encoder_layer_fwd.default" in ran.names
    with torch.no_grad():
        assert torch.equal(fast, finished(x))
    assert torch.allclose(fast, slow, atol=1e-5)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = F.linear(x, self.fc.weight, self.fc.bias)
        return F.conv2d(y[..., None, None], self.conv.weight, self.conv.bias).flatten(1)


@both
def test_a_functional_call_on_the_weight_equals_the_finalized_model(method):
    model = concluded(nmgraph.convert(Functional(), method=method))
    x = torch.randn(4, 16)
    assert torch.equal(model(x), nmgraph.finalize(model)(x))
