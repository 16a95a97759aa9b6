"""What is converted, what stays dense, and the reason that the manifest gives."""

import pytest
import torch
from models import Encoder, TiedLanguageModel, cnn, mlp
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import nmgraph


def entries(model, **options):
    """The manifest's entries by name; every name has to be there only once."""
    found = nmgraph.manifest(nmgraph.convert(model, **options)).entries
    assert len({e.name for e in found}) == len(found)
    return {e.name: e for e in found}


def reason_and_remedy(model, site, **options):
    entry = entries(model, **options)[site]
    assert not entry.converted
    return entry.reason, entry.remedy


class Beside(nn.Module):
    """Holds what is tried, beside a layer that can always be converted."""

    def __init__(self, tried):
        super().__init__()
        self.plain, self.tried = nn.Linear(16, 16), tried

    def forward(self, x):
        return self.tried(self.plain(x))


@pytest.mark.parametrize(
    ("layer", "pattern", "reason", "remedy"),
    [
        (nn.Linear(18, 8), "2:4", "18 input features are not a multiple of 4", "choose 1:2 for it"),
        (nn.Conv2d(3, 8, 3), "2:4", "3 input channels are not a multiple of 4", "no usual pattern fits"),
        (nn.Conv2d(12, 8, 3), "4:8", "12 input channels are not a multiple of 8", "choose 2:4 for it"),
    ],
)
def test_pattern_has_to_divide_the_input_channels(layer, pattern, reason, remedy):
    assert reason_and_remedy(Beside(layer), "tried", pattern=pattern) == (reason, remedy)


@pytest.mark.parametrize("groups", [2, 8], ids=["grouped", "depthwise"])
def test_grouped_convolutions_stay_dense(groups):
    assert reason_and_remedy(Beside(nn.Conv2d(8, 8, 3, groups=groups)), "tried") == (
        f"it is a grouped convolution (groups={groups})",
        "sparse tensor cores don't take these; it stays dense",
    )


def test_head_tied_to_an_embedding_stays_dense():
    assert reason_and_remedy(TiedLanguageModel(), "head") == (
        "its weight is shared with another module",
        "untie the weights first",
    )


def test_two_layers_that_share_a_weight_stay_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    assert [name for name, e in entries(model).items() if e.converted] == ["1"]


def test_layer_used_twice_is_one_site():
    layer = nn.Linear(16, 16)
    found = entries(nn.Sequential(layer, nn.ReLU(), layer))
    assert list(found) == ["0"]
    assert found["0"].converted
    assert found["0"].calls == 2


def test_frozen_layers_stay_dense():
    assert reason_and_remedy(Beside(nn.Linear(16, 8).requires_grad_(False)), "tried") == (
        "its weight is frozen (requires_grad=False)",
        "unfreeze it before converting",
    )


@pytest.mark.parametrize(
    "computed",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
    ids=lambda f: f.__name__,
)
def test_parametrized_weights_stay_dense(computed):
    assert reason_and_remedy(Beside(computed(nn.Linear(16, 8))), "tried") == (
        "its weight is computed by a parametrization (weight_norm, spectral_norm, ...)",
        "remove it first (parametrize.remove_parametrizations, or remove_weight_norm for the older kind)",
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("computed", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda f: f.__name__)
def test_weights_computed_by_the_older_hooks_stay_dense(computed):
    model = Beside(computed(nn.Linear(16, 8)))
    reason, _ = reason_and_remedy(model, "tried", method="srste")
    assert reason == "its weight is computed by a parametrization (weight_norm, spectral_norm, ...)"
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_stay_dense():
    assert reason_and_remedy(Beside(nn.LazyLinear(8)), "tried") == (
        "it is lazy and has no shape yet",
        "run the model once before converting",
    )


OTHER_KINDS = (
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.RNNBase, nn.RNNCellBase,
    nn.MultiheadAttention,
)  # fmt: skip


@pytest.mark.parametrize(
    ("module", "sites"),
    [
        (nn.ConvTranspose1d(8, 8, 3), ["tried"]),
        (nn.ConvTranspose2d(8, 8, 3), ["tried"]),
        (nn.ConvTranspose3d(8, 8, 3), ["tried"]),
        (nn.Bilinear(8, 8, 8), ["tried"]),
        (nn.LSTM(16, 8), ["tried.weight_ih_l0", "tried.weight_hh_l0"]),
        (nn.GRUCell(16, 8), ["tried.weight_ih", "tried.weight_hh"]),
        (nn.MultiheadAttention(16, 4), ["tried.in_proj_weight"]),
        (
            nn.MultiheadAttention(16, 4, kdim=8, vdim=8),
            ["tried.q_proj_weight", "tried.k_proj_weight", "tried.v_proj_weight"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_products_are_listed_with_a_reason(module, sites):
    base = next(kind.__name__ for kind in OTHER_KINDS if isinstance(module, kind))
    skipped = {name: (e.reason, e.remedy) for name, e in entries(Beside(module)).items() if not e.converted}
    assert skipped == dict.fromkeys(sites, (f"weights of {base} are not converted yet", "it stays dense"))


def test_output_projection_of_an_attention_is_converted():
    found = entries(Encoder())
    assert found["encoder.layers.0.self_attn.out_proj"].converted
    assert (
        found["encoder.layers.0.self_attn.in_proj_weight"].reason
        == "weights of MultiheadAttention are not converted yet"
    )


class BareProduct(nn.Module):
    """Multiplies by a parameter of its own, without a layer."""

    def __init__(self, multiply):
        super().__init__()
        self.projection, self.head, self.multiply = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 8), multiply

    def forward(self, x):
        return self.head(self.multiply(x, self.projection))


PRODUCTS = {
    "F.linear(x, w)": (F.linear, "linear"),
    "F.linear(x, weight=w)": (lambda x, w: F.linear(x, weight=w), "linear"),
    "torch.matmul(x, w)": (torch.matmul, "matmul"),
    "torch.mm(x, w)": (torch.mm, "mm"),
    "torch.addmm(x, x, w)": (lambda x, w: torch.addmm(x, x, w), "addmm"),
    "x.matmul(w)": (lambda x, w: x.matmul(w), "matmul"),
    "x @ w": (lambda x, w: x @ w, "matmul"),
    "x @ w.t()": (lambda x, w: x @ w.t(), "matmul"),
    "x @ w.transpose(0, 1)": (lambda x, w: x @ w.transpose(0, 1), "matmul"),
    "x @ w.T": (lambda x, w: x @ w.T, "matmul"),
    "x @ w.mT": (lambda x, w: x @ w.mT, "matmul"),
    "torch.matmul(x, other=w)": (lambda x, w: torch.matmul(x, other=w), "matmul"),
    "w @ x": (lambda x, w: w @ x, "matmul"),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_product_with_a_bare_parameter_is_listed_once(product):
    multiply, function = PRODUCTS[product]
    found = entries(BareProduct(multiply))
    assert list(found) == ["head", "projection"]
    entry = found["projection"]
    assert (entry.kind, entry.shape, entry.reason, entry.remedy) == (
        function,
        (16, 16),
        f"{function} multiplies by this parameter directly",
        "hold it in an nn.Linear or nn.Conv layer",
    )


def test_convolution_with_a_bare_parameter_is_listed_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.head = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.head(F.conv2d(x, self.kernel))

    found = entries(Net())
    assert found["kernel"].reason == "conv2d multiplies by this parameter directly"
    assert found["kernel"].shape == (8, 4, 3, 3)


def test_parameter_multiplied_twice_is_listed_once():
    found = entries(BareProduct(lambda x, w: F.linear(F.linear(x, w), w)))
    assert list(found) == ["head", "projection"]


def test_layer_whose_weight_is_read_by_others_is_listed_once_and_converted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            return F.linear(x, self.layer.weight)

    found = entries(Net())
    assert list(found) == ["layer"]
    assert found["layer"].converted


class BranchingAround(nn.Module):
    """Cannot be traced itself; what it holds can."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) if x.sum() > 0 else self.part(-x)


class Projection(nn.Module):
    """Holds nothing but the matrix it multiplies by."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return x @ self.matrix


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(16, 16), Projection()),
        lambda: BranchingAround(nn.Sequential(nn.Linear(16, 16), Projection())),
        lambda: nn.Sequential(nn.Linear(16, 16), BranchingAround(Projection())),
        lambda: nn.Sequential(BranchingAround(nn.Sequential(nn.Linear(16, 16), Projection()))),
    ],
    ids=["all traceable", "untraceable root", "untraceable part", "all in an untraceable part"],
)
def test_bare_products_are_found_behind_modules_that_cannot_be_traced(make):
    assert sorted(e.kind for e in entries(make()).values()) == ["Linear", "matmul"]


def test_layer_that_only_pads_its_input_is_converted():
    found = entries(nn.Sequential(Conv2dSame(8, 8, 3), nn.Conv2d(8, 8, 1)))
    assert found["0"].converted
    assert found["0"].kind == "Conv2dSame"


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_layer_that_standardizes_its_weight_stays_dense(kind):
    assert reason_and_remedy(Beside(kind(8, 8, kernel_size=3)), "tried") == (
        f"{kind.__name__} computes with a function of its weight that fills the zeros",
        "it stays dense; use a plain layer if it should not",
    )


def test_layer_that_cannot_be_tried_stays_dense():
    class Gated(nn.Linear):
        def forward(self, x, gate):
            return super().forward(x) * gate

    reason, remedy = reason_and_remedy(Beside(Gated(16, 8)), "tried")
    assert reason.startswith("Gated could not be tried on a sparse weight (")
    assert "gate" in reason
    assert remedy == "it stays dense; use a plain layer if it should not"


def test_layer_that_multiplies_in_its_own_way_stays_dense():
    class Own(nn.Linear):
        def forward(self, x):
            return (x.unsqueeze(-2) * self.weight).sum(-1)

    reason, _ = reason_and_remedy(Beside(Own(16, 8)), "tried")
    assert reason == "Own does not multiply by its weight in F.linear or F.conv"


def test_trying_a_layer_changes_neither_its_weight_nor_its_buffers():
    class Counting(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    layer = Counting(16, 8)
    weight = layer.weight.detach().clone()
    assert entries(Beside(layer))["tried"].converted
    assert torch.equal(layer._parameters["weight"], weight)
    assert layer.calls == 0


def test_single_layer_is_a_model_too():
    model = nmgraph.convert(nn.Linear(16, 8), method="srste")
    assert [e.converted for e in nmgraph.manifest(model).entries] == [True]
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_skip_leaves_layers_dense():
    found = entries(mlp(), skip=["0"])
    assert (found["0"].converted, found["0"].reason, found["0"].remedy) == (False, "left dense on request", "")
    assert found["2"].converted


def test_skip_takes_globs():
    found = entries(Encoder(), skip=["encoder.layers.0.*", "head"])
    assert [name for name, e in found.items() if e.converted] == [
        "encoder.layers.1.self_attn.out_proj",
        "encoder.layers.1.linear1",
        "encoder.layers.1.linear2",
    ]


def test_layers_gives_patterns_by_glob_and_the_last_match_counts():
    found = entries(Encoder(), layers={"encoder.*": "1:4", "*.linear1": "4:8", "encoder.layers.1.*": "1:16"})
    assert {name: e.pattern for name, e in found.items() if e.converted} == {
        "encoder.layers.0.self_attn.out_proj": "1:4",
        "encoder.layers.0.linear1": "4:8",
        "encoder.layers.0.linear2": "1:4",
        "encoder.layers.1.self_attn.out_proj": "1:16",
        "encoder.layers.1.linear1": "1:16",
        "encoder.layers.1.linear2": "1:16",
        "head": "2:4",
    }


def test_pattern_of_its_own_makes_a_layer_fit():
    found = entries(nn.Sequential(nn.Linear(18, 8), nn.Linear(8, 8)), layers={"0": "1:2"})
    assert (found["0"].converted, found["0"].pattern) == (True, "1:2")


def test_layers_matched_by_a_glob_only_may_stay_dense():
    found = entries(cnn(), layers={"*": "1:4"})
    assert [name for name, e in found.items() if e.converted] == ["3", "7"]


def test_patterns_hold_layer_by_layer_in_the_finalized_model():
    model = nmgraph.convert(Encoder(), method="srste", layers={"*.linear1": "1:4", "head": "4:8"})
    found = nmgraph.verify(nmgraph.finalize(model))
    assert found.holds
    patterns = {c.name: (c.pattern, c.density) for c in found.checks if c.expected}
    assert patterns["encoder.layers.0.linear1"] == ("1:4", 0.25)
    assert patterns["encoder.layers.0.linear2"] == ("2:4", 0.5)
    assert patterns["head"] == ("4:8", 0.5)
