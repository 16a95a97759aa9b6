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


def test_a_depthwise_convolution_that_is_asked_for_says_that_it_has_no_blocks():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    entry = nmgraph.inspect(model, include=["0"]).manifest.entries[0]
    assert (entry.reason, entry.remedy) == ("1 input channel is not a multiple of 4", "no usual pattern fits")


@pytest.mark.parametrize("groups", [2, 8], ids=["grouped", "depthwise"])
def test_grouped_convolutions_stay_dense(groups):
    assert reason_and_remedy(Beside(nn.Conv2d(8, 8, 3, groups=groups)), "tried") == (
        f"it is a grouped convolution (groups={groups})",
        "sparse tensor cores don't take these; ask for it with --include where M divides a group's channels",
    )


def test_head_tied_to_an_embedding_stays_dense():
    assert reason_and_remedy(TiedLanguageModel(), "head") == (
        "its weight is shared by embedding and head",
        "untie the weights, or ask for it with --include: then all of them are masked",
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
        "unfreeze it, or ask for it with --include: then it gets a fixed mask by magnitude",
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


@pytest.mark.parametrize(
    ("module", "reasons"),
    [
        (nn.Bilinear(8, 8, 8), {"tried": "Bilinear sums over two inputs at once"}),
        (
            nn.LSTM(16, 8),
            dict.fromkeys(
                ["tried.weight_ih_l0", "tried.weight_hh_l0"],
                "LSTM runs in a fused kernel that keeps a list of its weights",
            ),
        ),
    ],
    ids=["Bilinear", "LSTM"],
)
def test_weights_that_cannot_be_masked_are_listed_with_a_reason(module, reasons):
    assert {name: e.reason for name, e in entries(Beside(module)).items() if not e.converted} == reasons


@pytest.mark.parametrize(
    ("module", "axes"),
    [
        (nn.ConvTranspose1d(16, 8, 3), {"tried": 0}),
        (nn.ConvTranspose2d(16, 8, 3), {"tried": 0}),
        (nn.ConvTranspose3d(16, 8, 3), {"tried": 0}),
        (nn.GRUCell(16, 8), {"tried.weight_ih": 1, "tried.weight_hh": 1}),
        (nn.MultiheadAttention(16, 4), {"tried.in_proj_weight": 1, "tried.out_proj": 1}),
        (
            nn.MultiheadAttention(16, 4, kdim=8, vdim=8),
            {f"tried.{name}": 1 for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_weights_of_other_modules_are_converted_on_their_own_axis(module, axes):
    found = entries(Beside(module), method="srste")
    assert {name: e.axis for name, e in found.items() if e.converted and name != "plain"} == axes


class BareProduct(nn.Module):
    """Multiplies by a parameter of its own, without a layer."""

    def __init__(self, multiply):
        super().__init__()
        self.projection, self.head, self.multiply = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 8), multiply

    def forward(self, x):
        return self.head(self.multiply(x, self.projection))


PRODUCTS = {
    "F.linear(x, w)": (F.linear, "linear", 1),
    "F.linear(x, weight=w)": (lambda x, w: F.linear(x, weight=w), "linear", 1),
    "torch.matmul(x, w)": (torch.matmul, "matmul", 0),
    "torch.mm(x, w)": (torch.mm, "mm", 0),
    "torch.addmm(x, x, w)": (lambda x, w: torch.addmm(x, x, w), "addmm", 0),
    "torch.addmm(x, x, w.t())": (lambda x, w: torch.addmm(x, x, w.t()), "addmm", 1),
    "x.matmul(w)": (lambda x, w: x.matmul(w), "matmul", 0),
    "x @ w": (lambda x, w: x @ w, "matmul", 0),
    "x @ w.t()": (lambda x, w: x @ w.t(), "matmul", 1),
    "x @ w.transpose(0, 1)": (lambda x, w: x @ w.transpose(0, 1), "matmul", 1),
    "x @ w.permute(1, 0)": (lambda x, w: x @ w.permute(1, 0), "matmul", 1),
    "x @ w.T": (lambda x, w: x @ w.T, "matmul", 1),
    "x @ w.mT": (lambda x, w: x @ w.mT, "matmul", 1),
    "x @ w.float()": (lambda x, w: x @ w.float(), "matmul", 0),
    "torch.matmul(x, other=w)": (lambda x, w: torch.matmul(x, other=w), "matmul", 0),
    "w @ x": (lambda x, w: w @ x, "matmul", 1),
    "einsum bi,io": (lambda x, w: torch.einsum("bi,io->bo", x, w), "einsum", 0),
    "einsum bi,oi": (lambda x, w: torch.einsum("bi,oi->bo", x, w), "einsum", 1),
    "einsum [x, w]": (lambda x, w: torch.einsum("bi,oi->bo", [x, w]), "einsum", 1),
}


@pytest.mark.parametrize("inputs", [None, torch.randn(16, 16)], ids=["from the graph", "from a run"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_product_with_a_bare_parameter_is_converted_on_the_axis_it_sums_over(product, inputs):
    multiply, function, axis = PRODUCTS[product]
    model = nmgraph.convert(BareProduct(multiply), method="srste", example_inputs=inputs)
    found = {e.name: e for e in nmgraph.manifest(model).entries}
    assert sorted(found) == ["head", "projection"]
    entry = found["projection"]
    assert (entry.converted, entry.shape, entry.axis) == (True, (16, 16), axis)
    assert entry.kind == (function if inputs is None else "matmul")
    assert ((model.projection != 0).movedim(axis, -1).reshape(16, 4, 4).sum(-1) == 2).all()
    x = torch.randn(16, 16)
    assert torch.equal(nmgraph.finalize(model)(x), model(x))


REFUSED = {
    "along both axes": (lambda x, w: F.linear(F.linear(x, w), w.t()), "linear sums along more than one of its axes"),
    "standardised": (
        lambda x, w: F.linear(x, w - w.mean(1, keepdim=True)),
        "linear multiplies by something computed from this parameter, where its zeros may not be zeros",
    ),
    "several axes": (
        lambda x, w: torch.einsum("bij,ij->b", x.reshape(-1, 16, 16), w).unsqueeze(1).expand(-1, 16),
        "einsum sums so that no blocks along one of its axes follow",
    ),
}


@pytest.mark.parametrize("product", REFUSED)
def test_bare_product_that_cannot_be_masked_is_listed_with_its_reason(product):
    multiply, reason = REFUSED[product]
    assert reason_and_remedy(BareProduct(multiply), "projection")[0] == reason


class Stack(nn.Module):
    """A mixture's experts in one parameter, multiplied in one way of several."""

    def __init__(self, multiply, *shape):
        super().__init__()
        self.experts, self.head, self.multiply = nn.Parameter(torch.randn(shape)), nn.Linear(8, 8), multiply

    def forward(self, x):
        return self.head(self.multiply(x, self.experts))


STACKS = {
    "bmm": (lambda x, w: torch.bmm(x.expand(3, -1, -1), w), (3, 16, 8), -2),
    "F.linear of one": (lambda x, w: F.linear(x, w[1]), (3, 8, 16), -1),
    "x @ one": (lambda x, w: x @ w[0], (3, 16, 8), -2),
    "x @ one.T": (lambda x, w: x @ w[2].T, (3, 8, 16), -1),
    "unbind": (lambda x, w: x @ w.unbind(0)[1], (3, 16, 8), -2),
    "einsum": (lambda x, w: torch.einsum("bi,eoi->beo", x, w), (3, 8, 16), -1),
}


@pytest.mark.parametrize("inputs", [None, torch.randn(4, 16)], ids=["from the graph", "from a run"])
@pytest.mark.parametrize("stack", STACKS)
def test_stack_of_matrices_is_converted_on_the_axis_it_sums_over(stack, inputs):
    multiply, shape, axis = STACKS[stack]
    model = nmgraph.convert(Stack(multiply, *shape), method="srste", example_inputs=inputs)
    entry = next(e for e in nmgraph.manifest(model).entries if e.name == "experts")
    assert (entry.converted, entry.axis) == (True, axis)
    assert ((model.experts != 0).movedim(axis, -1).reshape(-1, 4).sum(-1) == 2).all()
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 4, 6, 6)], ids=["from the graph", "from a run"])
def test_convolution_with_a_bare_parameter_is_converted(inputs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.head = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.head(F.conv2d(x, self.kernel))

    found = entries(Net(), example_inputs=inputs)
    assert found["kernel"].converted
    assert (found["kernel"].shape, found["kernel"].axis) == ((8, 4, 3, 3), 1)


def test_parameter_multiplied_twice_is_listed_once():
    found = entries(BareProduct(lambda x, w: F.linear(F.linear(x, w), w)))
    assert sorted(found) == ["head", "projection"]


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


def test_layer_whose_class_masks_its_weight_already_stays_dense():
    class MaskedElsewhere(nn.Linear):  # as ModelOpt does it
        @property
        def weight(self):
            return self._parameters["weight"] * 0.5

    layer = nn.Linear(16, 8)
    layer.__class__ = MaskedElsewhere
    assert reason_and_remedy(Beside(layer), "tried") == (
        "what MaskedElsewhere.weight gives is computed from its parameter, which a mask would replace",
        "fold it into the parameter first, by what made it so (ModelOpt: mts.export)",
    )


def test_layer_that_cannot_be_tried_stays_dense():
    class Gated(nn.Linear):
        def forward(self, x, gate):
            return super().forward(x) * gate

    reason, remedy = reason_and_remedy(Beside(Gated(16, 8)), "tried")
    assert reason.startswith("Gated could not be tried on a sparse weight (")
    assert "gate" in reason
    assert remedy == "it stays dense; use a plain layer if it should not"


def test_reason_of_a_layer_that_cannot_be_tried_is_short_whatever_its_error_says():
    class Elsewhere(nn.Linear):
        def forward(self, x):
            raise NotImplementedError("no such kernel on the CPU.\n" + "registered at somewhere else\n" * 100)

    reason, _ = reason_and_remedy(Beside(Elsewhere(16, 8)), "tried")
    assert reason.startswith(
        "Elsewhere could not be tried on a sparse weight (no such kernel on the CPU. registered at"
    )
    assert len(reason) < 250
    assert "\n" not in reason


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
        "encoder.layers.1.self_attn.in_proj_weight",
        "encoder.layers.1.self_attn.out_proj",
        "encoder.layers.1.linear1",
        "encoder.layers.1.linear2",
    ]


def test_layers_gives_patterns_by_glob_and_the_last_match_counts():
    found = entries(Encoder(), layers={"encoder.*": "1:4", "*.linear1": "4:8", "encoder.layers.1.*": "1:16"})
    assert {name: e.pattern for name, e in found.items() if e.converted} == {
        "encoder.layers.0.self_attn.in_proj_weight": "1:4",
        "encoder.layers.0.self_attn.out_proj": "1:4",
        "encoder.layers.0.linear1": "4:8",
        "encoder.layers.0.linear2": "1:4",
        "encoder.layers.1.self_attn.in_proj_weight": "1:16",
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


def test_table_that_a_run_shows_to_be_looked_up_by_one_hot_products_stays_dense():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 8)

        def forward(self, positions):
            return self.head(F.one_hot(positions, 8).to(self.table.dtype) @ self.table)

    reason, _ = reason_and_remedy(Positions(), "table", example_inputs=torch.arange(5))
    assert reason == "it is a table that rows are looked up in, by products with ones and zeros"


def test_parameter_of_a_module_that_cannot_be_followed_is_listed_until_a_run_shows_its_use():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.offset = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(4, 8))
            self.body = nn.Linear(16, 16)

        def forward(self, x):
            x = self.body(x)
            return (x @ self.matrix if x.sum() > 0 else -x @ self.matrix) + self.offset

    for site in ("matrix", "offset"):
        assert reason_and_remedy(Branches(), site) == (
            "the forward of Branches can't be followed, so it is not known whether it is a weight",
            "give example inputs (--input): a run shows what is multiplied",
        )
    found = entries(Branches(), example_inputs=torch.randn(4, 16))
    assert sorted(found) == ["body", "matrix"]
    assert (found["matrix"].converted, found["matrix"].axis, found["matrix"].macs) == (True, 0, 4 * 16 * 8)


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 16, 6, 6)], ids=["from the graph", "from a run"])
@pytest.mark.parametrize(
    ("convolve", "shape"),
    [(F.conv2d, (16, 8, 3, 3)), (F.conv_transpose2d, (16, 8, 3, 3))],
    ids=["conv2d", "conv_transpose2d"],
)
def test_grouped_convolution_with_a_bare_parameter_stays_dense(convolve, shape, inputs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.head = nn.Parameter(torch.randn(shape)), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            return self.head(convolve(x, self.kernel, groups=2))

    reason, _ = reason_and_remedy(Net(), "kernel", example_inputs=inputs)
    assert reason == "it is a grouped convolution (groups=2)"
    found = entries(Net(), example_inputs=inputs, include=["kernel"], method="srste")["kernel"]
    assert (found.converted, found.axis) == (True, 1 if convolve is F.conv2d else 0)


def test_parameter_of_the_graph_itself_stays_dense():
    exported = torch.export.export(BareProduct(torch.matmul), (torch.randn(4, 16),)).module()
    found = entries(exported, method="srste")
    assert found["projection"].reason == "a GraphModule holds it itself, whose copies would lose its mask"
    assert found["head"].converted
