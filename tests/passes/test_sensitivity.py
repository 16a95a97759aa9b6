"""What pruning one layer alone does to the loss: held to pruning it by hand."""

import copy
import re

import pytest
import torch
from models import Encoder, NeverTheSame, Recorder, TiedLanguageModel, cnn, convnext, deit, mlp, resnet, swin
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import nmgraph
from nmgraph.errors import ConversionError


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def by_hand(weight, n, m, axis=1):
    """Prune slowly: of every M neighbours along the axis, in every row, the N largest."""
    rows = weight.detach().clone().movedim(axis, -1).contiguous()
    for block in rows.view(-1, m):
        block[block.abs().argsort(descending=True, stable=True)[n:]] = 0
    return rows.movedim(-1, axis).contiguous()


def changes(found):
    return {site.name: site.changes for site in found.sites}


def test_the_change_is_that_of_the_cross_entropy_when_one_layer_is_pruned():
    model, images, labels = cnn().train(), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    found = nmgraph.sensitivity(model, images, labels=labels, patterns=["2:4", "1:8"])
    dense = float(F.cross_entropy(copy.deepcopy(model).eval()(images), labels))
    assert (found.criterion, found.dense, found.data) == ("cross entropy", pytest.approx(dense), "given")
    assert {name: list(c) for name, c in changes(found).items()} == {"3": ["2:4", "1:8"], "7": ["2:4", "1:8"]}
    for site in found.sites:
        for pattern, change in site.changes.items():
            pruned = copy.deepcopy(model).eval()
            layer = pruned.get_submodule(site.name)
            layer.weight.data = by_hand(layer.weight, *map(int, pattern.split(":")))
            assert change == pytest.approx(float(F.cross_entropy(pruned(images), labels)) - dense, abs=1e-6)
            assert change != 0


def test_without_labels_the_change_is_how_far_the_answer_moves():
    model, x = mlp(), torch.randn(5, 16)
    found = nmgraph.sensitivity(model, (x,), patterns="1:4")
    assert (found.criterion, found.dense) == ("relative squared error of the answer", 0)
    dense, pruned = model(x), copy.deepcopy(model)
    pruned[2].weight.data = by_hand(pruned[2].weight, 1, 4)
    moved = float((pruned(x) - dense).square().sum() / dense.square().sum())
    assert changes(found)["2"] == {"1:4": pytest.approx(moved)}


class Failing(nn.Module):
    """Raises in its third forward, whichever copy of it is called."""

    calls = 0

    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(16, 16), error

    def forward(self, x):
        Failing.calls += 1
        if Failing.calls == 5:  # tracing and watching are two of them
            raise self.error
        return self.layer(x)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ValueError("no more")])
def test_the_model_is_bit_for_bit_the_same_whatever_happens(error):
    Failing.calls = 0
    model = nn.Sequential(Failing(error) if error else nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout()).train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    parameters, draws = [id(p) for p in model.parameters()], torch.get_rng_state()

    def measure():
        return nmgraph.sensitivity(model, torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))

    if error is None:
        measure()
    else:
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else nmgraph.NMGraphError):
            measure()
        assert Failing.calls == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == parameters
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_forward_that_keeps_things_does_not_see_the_forwards_before():
    model, x = Recorder(), torch.randn(3, 16)
    both = nmgraph.sensitivity(model, x, patterns=["2:4", "1:4"])
    alone = nmgraph.sensitivity(model, x, patterns=["1:4"])
    assert changes(both)["layer"]["1:4"] == changes(alone)["layer"]["1:4"]
    assert (model.calls, float(model.count)) == (0, 0)


def test_a_forward_that_draws_draws_alike():
    model, x = NeverTheSame(), torch.ones(3, 16)
    found = [nmgraph.sensitivity(model, x, patterns=["1:4"]) for _ in range(2)]
    assert found[0] == found[1]


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=16, n_embd=32, n_layer=1, n_head=2))


def images():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (resnet, images), (convnext, images), (deit, images), (swin, images), (Encoder, lambda: torch.randn(2, 5, 32)),
        (gpt2, lambda: {"input_ids": torch.randint(0, 100, (2, 8))}),
    ],
)  # fmt: skip
def test_every_site_of_a_real_network_changes_the_answer_as_its_own_zeros_do(make, inputs):
    model, given = make().eval(), inputs()

    def answer(of):
        found = of(**given).logits if isinstance(given, dict) else of(given)
        return found.double()

    class Logits(nn.Module):  # what else transformers answers with is left away
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs).logits

    whole = Logits() if isinstance(given, dict) else model
    found = nmgraph.sensitivity(whole, given, patterns=["1:4"])
    dense = answer(model)
    assert len(found.sites) > 3
    for site in found.sites[:: max(1, len(found.sites) // 6)]:
        pruned = copy.deepcopy(whole)
        parameters = dict(pruned.named_parameters())
        weight = parameters.get(site.name, parameters.get(f"{site.name}.weight"))
        weight.data = by_hand(weight, 1, 4, site.axis)
        moved = answer(pruned.model if isinstance(given, dict) else pruned)
        expected = float((moved - dense).square().sum() / dense.square().sum())
        assert site.changes["1:4"] == pytest.approx(expected, rel=1e-3), site.name


def test_attention_and_every_kind_of_layer_is_pruned_where_its_weight_lies():
    found = nmgraph.sensitivity(Encoder().eval(), torch.randn(2, 5, 32), patterns=["2:4", "1:16"])
    assert [site.name for site in found.sites][:2] == [
        "encoder.layers.0.self_attn.in_proj_weight",
        "encoder.layers.0.self_attn.out_proj",
    ]
    assert all(change > 0 for site in found.sites for change in site.changes.values())


def test_a_transposed_convolution_is_pruned_along_its_input_channels():
    model, x = nn.Sequential(nn.ConvTranspose2d(8, 4, 3)), torch.randn(2, 8, 5, 5)
    (site,) = nmgraph.sensitivity(model, x, patterns=["2:8"]).sites
    dense, pruned = model(x), copy.deepcopy(model)
    pruned[0].weight.data = by_hand(pruned[0].weight, 2, 8, axis=0)
    assert site.axis == 0
    assert site.changes == {"2:8": pytest.approx(float((pruned(x) - dense).square().sum() / dense.square().sum()))}


def test_flat_blocks_are_measured_as_such():
    model, x = cnn(), torch.randn(2, 3, 8, 8)
    by_axis = [nmgraph.sensitivity(model, x, patterns=["1:4"], block_axis=axis) for axis in ("channels", "flat")]
    assert [site.axis for site in by_axis[1].sites if site.name == "3"] == ["flat"]
    assert changes(by_axis[0])["3"] != changes(by_axis[1])["3"]


def test_a_shared_weight_is_pruned_wherever_it_is_held_and_counted_once():
    model, tokens = TiedLanguageModel(), torch.randint(0, 24, (2, 6))
    left = nmgraph.sensitivity(model, tokens, patterns=["2:4"])
    assert list(changes(left)) == ["body"]
    found = nmgraph.sensitivity(model, tokens, patterns=["2:4"], include=["head"])
    assert list(changes(found)) == ["body", "head"]
    dense, pruned = model(tokens), copy.deepcopy(model)
    pruned.head.weight.data = by_hand(pruned.head.weight, 2, 4)
    assert pruned.embedding.weight is pruned.head.weight
    moved = float((pruned(tokens) - dense).square().sum() / dense.square().sum())
    assert changes(found)["head"]["2:4"] == pytest.approx(moved)
    assert found.macs == 12 * (16 * 16 + 16 * 24)
    assert found.bytes == 4 * (24 * 16 + 16 * 16 + 16)


def test_bfloat16_models_are_measured():
    found = nmgraph.sensitivity(mlp().bfloat16(), torch.randn(4, 16, dtype=torch.bfloat16), patterns=["2:4"])
    assert [site.bytes for site in found.sites] == [2 * 16 * 16, 2 * 16 * 8]
    assert all(0 < site.changes["2:4"] < 1 for site in found.sites)


def test_a_layer_that_no_pattern_fits_is_tried_with_usual_ones():
    found = nmgraph.sensitivity(nn.Sequential(nn.Linear(30, 16), nn.Linear(16, 4)), torch.randn(2, 30))
    assert {name: list(c) for name, c in changes(found).items()} == {"0": ["1:2"], "1": ["2:4", "1:4", "1:8", "1:16"]}


def test_patterns_that_the_method_can_not_take_are_left_out():
    found = nmgraph.sensitivity(mlp(), torch.randn(2, 16), patterns=["2:4", "8:16"], method="lbc")
    assert found.patterns == ("2:4",)
    assert nmgraph.sensitivity(mlp(), torch.randn(2, 16), patterns=["2:4", "8:16"], method="srste").patterns == (
        "2:4",
        "8:16",
    )


def test_layers_left_dense_are_not_measured():
    found = nmgraph.sensitivity(cnn(), torch.randn(2, 3, 8, 8), skip=["3"])
    assert list(changes(found)) == ["7"]


class WithOwnLoss(nn.Module):
    """Answers as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"logits": logits} | ({} if labels is None else {"loss": F.mse_loss(logits, labels)})


class WithLossOfEach(WithOwnLoss):
    def forward(self, x, labels=None):
        return {"loss": self.layer(x) - (0 if labels is None else labels)}


class WithLogits(WithOwnLoss):
    def forward(self, x):
        return {"logits": self.layer(x)}


@pytest.mark.parametrize(
    ("model", "labels", "criterion"),
    [
        (WithOwnLoss(), torch.randn(3, 4), "the model's own loss"),
        (WithLogits(), torch.tensor([0, 1, 3]), "cross entropy"),
        (WithOwnLoss(), None, "relative squared error of the answer"),
    ],
)
def test_labels_go_to_the_model_if_it_takes_them(model, labels, criterion):
    found = nmgraph.sensitivity(model, {"x": torch.randn(3, 16)}, labels=labels, patterns=["2:4"])
    assert found.criterion == criterion
    assert changes(found)["layer"]["2:4"] != 0


class Logarithm(nn.Module):
    """Answers with a number as long as no weight is missing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        self.layer.weight.data = torch.tensor([[2.0, 2.0, -3.0, 2.0]])

    def forward(self, x):
        return self.layer(x).log()


@pytest.mark.parametrize(
    ("model", "inputs", "options", "message"),
    [
        (mlp(), torch.full((1, 16), float("nan")), {}, "the dense model: relative squared error of the answer is nan. Give data that is scaled as the model expects it, or measure in float32 (model.float())."),
        (nn.Sequential(nn.Linear(4, 4, bias=False)), torch.zeros(1, 4), {}, "the dense model answers with only zeros, from which nothing can move. Give other data"),
        (mlp(), torch.randn(2, 16), {"labels": torch.tensor([0, 9])}, "labels of the shape [2] (torch.int64) do not fit an answer of the shape [2, 8]"),
        (mlp(), torch.randn(2, 16), {"labels": torch.tensor([0, 1, 2])}, "Give one whole number below 8 for each prediction, or leave the labels away."),
        (mlp(), torch.full((2, 16), float("inf")), {"labels": torch.tensor([0, 1])}, "the dense model: cross entropy is nan. Give data that is scaled as the model expects it"),
        (mlp(), torch.randn(2, 16), {"patterns": ["1:32"], "skip": ["*"]}, "Sequential has no layer that converts to 1:32"),
        (mlp(), torch.randn(2, 16), {"labels": [0, 1]}, "labels are a list; they must be a tensor, one label for each prediction."),
        (WithLossOfEach(), torch.randn(2, 16), {"labels": torch.randn(2, 4)}, "the loss of the model's answer has the shape [2, 4], and has to be one number. Leave the labels away"),
        (mlp(), torch.randn(2, 16), {"patterns": []}, 'there is no pattern to measure. Give some, for example patterns=["2:4", "1:4"].'),
    ],
)  # fmt: skip
def test_what_can_not_be_measured_is_said(model, inputs, options, message):
    with pytest.raises(ConversionError, match=re.escape(message)):
        nmgraph.sensitivity(model, inputs, **options)


def test_a_layer_whose_loss_is_not_finite_is_named():
    with pytest.raises(ConversionError) as raised:
        nmgraph.sensitivity(Logarithm(), torch.ones(1, 4), patterns=["1:4"])
    assert str(raised.value).startswith("layer pruned to 1:4: relative squared error of the answer is nan. Give data")


def test_progress_tells_how_far_it_is():
    heard = []
    nmgraph.sensitivity(mlp(), torch.randn(2, 16), patterns=["2:4", "1:4"], progress=heard.append)
    assert heard == ["tracing", *(f"measuring: {i} of 4" for i in range(4))]
