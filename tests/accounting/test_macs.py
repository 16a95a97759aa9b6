"""MACs, held against torch's own counter, which knows operators and nothing of layers."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nmgraph
from nmgraph.accounting.macs import Macs, count_macs
from nmgraph.errors import ExportError
from nmgraph.export.inputs import make_inputs


def resnet18():
    from torchvision.models import resnet18

    return resnet18(weights=None), torch.randn(2, 3, 64, 64)


def vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8), torch.randn(2, 3, 32, 32)


def mobilenet():
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(weights=None), torch.randn(2, 3, 64, 64)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        attn_implementation="eager",
    )  # fmt: skip
    return BertForMaskedLM(config), torch.randint(0, 64, (2, 16))


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 6, 32)


class Attention(nn.Module):
    """Its last layer is never called: attention reads the weight of it."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0]


class Functional(nn.Module):
    """Two products in one module, whose input needs no gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(8, 32))

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.a).relu(), self.b)


class Twice(nn.Module):
    """One layer, called twice: only its second input needs a gradient."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(self.layer(x))


def attention():
    return Attention(), torch.randn(2, 5, 16)


def functional():
    return Functional(), torch.randn(4, 16)


def twice():
    return Twice(), torch.randn(4, 16)


ATTENTION = {vit: (12, 2, 3, 17, 64), encoder: (2, 2, 4, 6, 8), attention: (1, 2, 2, 5, 8)}
"""Layers, batch, heads, tokens, channels of a head: of fused attention, which torch 2.13 does not count on the CPU."""

MODELS = [attention, functional, twice, resnet18, vit, mobilenet, bert, encoder]


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("make", MODELS)
def test_a_training_step_costs_what_torch_counts(make):
    model, x = make()
    found = count_macs(model, lambda m: m(x))
    for p in model.modules():
        if isinstance(p, nn.Dropout):
            p.p = 0.0
    with FlopCounterMode(display=False) as forward:
        y = first(model.eval()(x))
    layers, batch, heads, tokens, channels = ATTENTION.get(make, (0,) * 5)
    fused = 2 * layers * batch * heads * tokens**2 * channels  # MACs
    assert 2 * found.total.forward == forward.get_total_flops() + 2 * fused
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    ours = 2 * (found.total.input_gradient + found.total.weight_gradient)
    theirs = backward.get_total_flops()
    if make is mobilenet:  # torch 2.13 counts the backward of grouped convolutions as if they had one group
        assert ours == 2 * found.total.forward * 2 - 2 * found.layers["features.0.0"].forward < theirs
    else:
        assert ours == theirs + 4 * fused


def test_each_layer_costs_what_torch_counts_in_its_module():
    model, x = resnet18()
    found = count_macs(model, lambda m: m(x))
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    theirs = counter.get_flop_counts()
    assert len(found.layers) == 21
    for site, macs in found.layers.items():
        assert 2 * macs.forward == sum(theirs[f"ResNet.{site}"].values())


def test_the_first_layer_and_frozen_ones_need_fewer_gradients():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].weight.requires_grad_(False), net[0].bias.requires_grad_(False)
    found = count_macs(net, lambda m: m(torch.ones(1, 8)))
    assert found.layers == {"0": Macs(64, 0, 0), "1": Macs(64, 0, 64), "2": Macs(64, 64, 64)}


def test_a_converted_model_counts_as_its_dense_self_and_is_not_changed():
    model, x = encoder()
    before = count_macs(model, lambda m: m(x))
    nmgraph.convert(model, method="bimask", example_inputs=x)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert count_macs(model, lambda m: m(x)) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_tied_head_is_counted_once_and_as_the_head():
    model, x = bert()
    found = count_macs(model, lambda m: m(x))
    assert found.layers["cls.predictions.decoder"].forward == 2 * 16 * 32 * 64
    assert not any("word_embeddings" in site for site in found.layers)


def test_a_model_on_the_meta_device_costs_as_much():
    model, x = bert()
    with torch.device("meta"):
        meta, _ = bert()
    assert count_macs(meta, lambda m: m(x)) == count_macs(model, lambda m: m(x))
    listed = nmgraph.manifest(nmgraph.convert(meta, method="srste", example_inputs=x))
    assert listed.macs_coverage == pytest.approx(
        nmgraph.manifest(nmgraph.convert(model, method="srste", example_inputs=x)).macs_coverage
    )


def test_experts_in_one_tensor_are_counted_where_torch_does_not():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager",
    )  # fmt: skip
    tokens = torch.randint(0, 64, (2, 12))
    found = count_macs(MixtralForCausalLM(config), lambda m: m(tokens))
    experts = sum(macs.forward for site, macs in found.layers.items() if "experts" in site)
    assert experts == 24 * 2 * 3 * 32 * 64
    assert found.elsewhere.forward == pytest.approx(2 * 2 * 2 * 12 * 12 * 16, rel=0.1)  # and rotary angles


def test_a_layer_that_standardises_its_weight_counts_as_that_layer():
    from timm.layers import ScaledStdConv2d

    found = count_macs(ScaledStdConv2d(8, 16, 3, padding=1), lambda m: m(torch.ones(1, 8, 5, 5)))
    assert (found.layers[""].forward, found.elsewhere.forward) == (16 * 8 * 9 * 25, 0)


class Routed(nn.Module):
    """Which rows an expert gets, and whether it is called, depends on values."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        chosen, out = x.sum(-1) > 0, torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(x[chosen == i])
        return out


def test_a_forward_that_asks_for_values_is_run_with_them():
    x = torch.cat([torch.ones(3, 16), -torch.ones(1, 16)])
    found = count_macs(Routed(), lambda m: m(x))
    assert {site: macs.forward for site, macs in found.layers.items()} == {"experts.0": 256, "experts.1": 3 * 256}
    assert nmgraph.inspect(Routed(), example_inputs=x).inference == 0.5


def test_inputs_that_do_not_fit_are_called_so_by_the_models_name():
    with pytest.raises(ExportError, match=r"Routed does not take the inputs 4x8 \(given\): "):
        count_macs(Routed(), make_inputs(torch.ones(4, 8)).call)
