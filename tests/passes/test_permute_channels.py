"""Channels are permuted where the graph shows that nobody minds, and nowhere else.

Most tests replace the search by random orders: whatever the order, the answer has to stay.
"""

import copy
import io
import json

import pytest
import torch
import torchvision
from models import Branching, convnext, deit, resnet, swin
from rich.console import Console
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.models.vision_transformer import VisionTransformer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import nmgraph
from nmgraph.cli import app
from nmgraph.errors import ConversionError
from nmgraph.layers.masked import masked_modules, unmask_all
from nmgraph.layers.recipe import Recipe
from nmgraph.methods import make_method
from nmgraph.nm.channel_permutation import ChannelOrder
from nmgraph.nm.pattern import Pattern
from nmgraph.passes import permute_channels
from nmgraph.passes.manifest import Manifest
from nmgraph.passes.permutation_report import PermutationReport
from nmgraph.passes.permute_channels import plan_permutation
from nmgraph.passes.rewrite import Selection

IMAGES = (2, 3, 64, 64)


@pytest.fixture
def any_order(monkeypatch):
    """Let the search answer with a random order."""

    def shuffle(weights, **_):
        channels = weights[0][0].shape[1]
        assert all(w.shape[1] == channels and p.divides(channels) for w, p in weights)
        order = torch.arange(channels).roll(1) if channels < 3 else torch.randperm(channels)
        return ChannelOrder(order, 1.0, 2.0, 3.0, 4.0)

    monkeypatch.setattr(permute_channels, "best_order", shuffle)


def unlike(model):
    """Give every parameter and statistic values of its own, so that nothing looks like its neighbour; no dropout."""
    with torch.no_grad():
        for module in model.modules():
            for key, p in module.named_parameters(recurse=False):
                if p.dim() < 2:
                    p.copy_(torch.rand_like(p) + 0.5 if key == "weight" else torch.randn_like(p) * 0.3)
                elif not p.any() or key in ("layer_scale", "gamma"):
                    p.normal_()
            for key, b in module.named_buffers(recurse=False):
                if key == "running_mean":
                    b.normal_()
                elif key == "running_var":
                    b.uniform_(0.5, 1.5)
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def answers(model, *inputs):
    """Run copies of the model in both modes, with one seed."""
    found = []
    for training in (False, True):
        torch.manual_seed(0)
        with torch.no_grad():
            found += [t for t in tree_leaves(copy.deepcopy(model).train(training)(*inputs)) if torch.is_tensor(t)]
    return found


def decisions(model, pattern="2:4", **selection):
    recipe = Recipe(make_method("srste"), Pattern.parse(pattern))
    return nmgraph.api.plan(model, recipe, Selection(**selection)).decisions


def permuted(model, *inputs, calls=None, pattern="2:4", **selection):
    """Permute in double precision, hold the answers to what they were, and give the report."""
    model = unlike(model).double()
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    keys = {key: value.shape for key, value in model.state_dict().items()}
    parameters, before = list(model.parameters()), answers(model, *inputs)
    plan = plan_permutation(model, decisions(model, pattern, **selection), calls)
    plan.apply()
    after = answers(model, *inputs)
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9 * float(one.abs().max()))
    assert {key: value.shape for key, value in model.state_dict().items()} == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    return plan.report


def vit():
    return VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=8
    )


def written(report):
    """Give the regions that a layer writes."""
    return [r for r in report.regions if r.writers]


class UNet(nn.Module):
    """Concatenates what it kept with what it upsamples by a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(1, 32), nn.PReLU(32))
        self.up = nn.ConvTranspose2d(32, 24, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(40, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.SiLU())
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        kept = self.down(x)
        return self.head(self.last(torch.cat([self.up(self.middle(kept)), kept], dim=1)))


MODELS = {
    "resnet18": (torchvision.models.resnet18, 12, 12),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 27, 27),
    "densenet121": (torchvision.models.densenet121, 120, 120),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False), 59, 61),  # two flattened
    "squeezenet": (torchvision.models.squeezenet1_1, 25, 25),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, 18, 36),  # views mix the channels of the others
    "convnext": (convnext, 6, 6),
    "vit": (vit, 2, 5),  # hidden layers of the MLPs
    "swin": (swin, 4, 10),
    "deit": (deit, 2, 9),
    "regnet": (torchvision.models.regnet_y_400mf, 13, 45),  # grouped convolutions
    "unet": (UNet, 4, 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_networks_answer_alike_in_both_modes_whatever_the_order(name, any_order):
    make, done, regions = MODELS[name]
    images = torch.randn(2, 3, 32, 32) if name == "deit" else torch.randn(2, 3, 96, 96) if name == "googlenet" else None
    report = permuted(make(), torch.randn(IMAGES) if images is None else images)
    assert (len(report.permuted), len(report.regions)) == (done, regions)
    assert all(r.reason for r in report.regions if not r.permuted)


def test_unet_is_permuted_also_where_a_concatenation_is_read(any_order):
    regions = {r.readers: r for r in permuted(UNet(), torch.randn(IMAGES)).permuted}
    assert regions["last.0",].writers == ("up",)
    assert regions["middle.0", "last.0"].writers == ("down.0",)
    assert regions["head",].channels == 16


def test_transposed_convolution_is_permuted_on_the_side_that_it_reads(any_order):
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2), nn.Conv2d(12, 4, 1))
    report = permuted(model, torch.randn(2, 4, 5, 5))
    assert ("2",) in [r.writers for r in report.permuted]


class Scaled(nn.Module):
    """Scales channels, gates them, splits them and joins them again."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(8, 32), nn.Linear(8, 16), nn.Linear(16, 4)
        self.norm, self.scale = nn.LayerNorm(32), nn.Parameter(torch.ones(1, 32))

    def forward(self, x):
        left, right = (self.norm(self.first(x)) * self.scale).chunk(2, dim=-1)
        return self.last(left * torch.sigmoid(right) + 0.5 * F.silu(self.gate(x)))


def test_gates_scales_and_splits_are_followed(any_order):
    report = permuted(Scaled(), torch.randn(3, 5, 8))
    (region,) = report.permuted
    assert (region.writers, region.readers, region.channels) == (("first", "gate"), ("last",), 16)


def test_layer_called_twice_in_one_order_is_permuted(any_order):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.last(self.again(torch.relu(self.again(torch.relu(self.first(x))))))

    report = permuted(Twice(), torch.randn(3, 8))
    assert [r.readers for r in report.permuted] == [("again", "last")]


# What must stop a region. Each body is put between a layer that writes 16 channels and one that reads what comes.


class Between(nn.Module):
    def __init__(self, body, entering=16, norm=None, extra=None):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(entering, 4, 1)
        self.norm = norm or nn.Identity()
        self.table = nn.Parameter(torch.randn(16))
        self.extra, self.body = extra, body

    def forward(self, x):
        return self.body(self, x)


def stopped(body, **parts):
    report = permuted(Between(body, **parts), torch.randn(2, 4, 16, 16))
    assert report.permuted == ()
    return [r.reason for r in report.regions if "first" in r.writers]


STOPS = {
    "view": lambda m, x: m.last(m.first(x).view(2, 16, 16, 16)),
    "roll": lambda m, x: m.last(m.first(x).roll(1, 1)),
    "flip": lambda m, x: m.last(torch.flip(m.first(x), [1])),
    "index": lambda m, x: m.last(m.first(x)[:, torch.arange(15, -1, -1)]),
    "slice": lambda m, x: m.last(F.pad(m.first(x)[:, :8], [0, 0, 0, 0, 0, 8])),
    "pad of channels": lambda m, x: m.last(F.pad(m.first(x)[:, 1:], [0, 0, 0, 0, 1, 0])),
    "softmax of channels": lambda m, x: m.last(torch.softmax(m.first(x), 1) * m.first(x).mean(1, keepdim=True)),
    "cumulative sum": lambda m, x: m.last(m.first(x).cumsum(1)),
    "channels as positions": lambda m, x: m.last(m.first(x).transpose(1, 2)),
    "groups": lambda m, x: m.last(m.norm(m.first(x))),
    "table on the last axis": lambda m, x: m.last(m.first(x) + m.table) + m.last(m.first(x) * m.table.view(16, 1, 1)),
    "input": lambda m, x: m.last(m.first(x) + x.repeat(1, 4, 1, 1)),
    "output": lambda m, x: (h := m.first(x), m.last(h)),
    "output in a dict": lambda m, x: {"y": m.last(h := m.first(x)), "h": [h]},
    "arange": lambda m, x: m.last(m.first(x) + torch.arange(16.0, dtype=x.dtype).view(16, 1, 1)),
    "product": lambda m, x: m.last((m.first(x).flatten(2).transpose(1, 2) @ torch.ones(16, 16, dtype=x.dtype).triu())
                                   .transpose(1, 2).reshape(2, 16, 16, 16)),
    "square kernel product": lambda m, x: m.last(torch.matmul(m.first(x).permute(0, 2, 3, 1), torch.eye(16, dtype=x.dtype))
                                                 .permute(0, 3, 1, 2)),
    "setitem": lambda m, x: set_first(m, m.first(x)),
    "foreign reader of a weight": lambda m, x: m.last(F.conv2d(x, m.first.weight, padding=1) + m.first(x)),
    "positions scaled by a bias": lambda m, x: m.last(m.first(x)) * m.first.bias.sum() + m.first.bias[0],
    "two orders of one layer": lambda m, x: m.last(m.first(x)) + m.last(m.first(x).flip(1)),
    "unrelated input of a layer": lambda m, x: m.last(m.first(x)) + m.last(x.repeat(1, 4, 1, 1)),
    "concatenation with an input": lambda m, x: m.last(torch.cat([x, m.first(x)[:, :, :, :]], 1)[:, 4:]),
    "concatenation that cuts blocks": lambda m, x: m.extra(torch.cat([m.first(x), m.norm(x)], 1)),
}  # fmt: skip


def set_first(m, h):
    h[:, 0] = 0
    return m.last(h)


@pytest.mark.parametrize("name", STOPS)
def test_what_is_not_certain_stops(name, any_order):
    parts = {}
    if name == "groups":
        parts["norm"] = nn.GroupNorm(4, 16)
    if name == "concatenation that cuts blocks":
        parts |= {"norm": nn.Conv2d(4, 6, 1), "extra": nn.Sequential(nn.ReLU(), nn.Conv2d(22, 4, 1))}
    if name == "square kernel product":
        parts["entering"] = 16
    reasons = stopped(STOPS[name], **parts)
    assert all(reasons)


def test_flatten_stops_unless_one_position_is_left(any_order):
    def model(size):
        return nn.Sequential(
            nn.Conv2d(4, 16, 3), nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(16 * size**2, 8), nn.Linear(8, 4)
        )

    assert [r.readers for r in permuted(model(1), torch.randn(2, 4, 8, 8)).permuted] == [("3",), ("4",)]
    report = permuted(model(2), torch.randn(2, 4, 8, 8))
    assert [r.readers for r in report.permuted] == [("4",)]


def test_reader_of_part_of_a_block_stops(any_order):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(16, 4)

        def forward(self, x):
            return self.last(torch.cat([self.one(x), self.two(x)], -1))

    assert [r.reason for r in written(permuted(Cut(), torch.randn(3, 8)))] == [
        "last reads it as channels 0 to 5, which cuts blocks of 4",
        "last reads it as channels 6 to 15, which cuts blocks of 4",
    ]


def chain(*between):
    return nn.Sequential(nn.Linear(8, 16), *between, nn.Linear(16, 4))


def test_tied_hooked_parametrized_and_borrowed_layers_stop(any_order):
    tied = chain(nn.ReLU())
    tied.embedding = nn.Embedding(16, 8)
    tied[0].weight = tied.embedding.weight

    class Tied(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.embedding = inner, nn.Embedding(16, 8)
            inner[0].weight = self.embedding.weight

        def forward(self, x):
            return self.inner(self.embedding(torch.arange(3)) + x)

    watched = chain(nn.ReLU())
    watched[1].register_forward_hook(lambda module, args, out: out.flip(-1))
    normed = chain(nn.ReLU())
    nn.utils.parametrizations.weight_norm(normed[0])
    shared = chain(nn.ReLU()).double()  # which copies no tensor any more later on
    shared[0].bias = nn.Parameter(shared[2].weight.detach()[0])
    masked_gradient = chain(nn.ReLU())
    masked_gradient[0].weight.register_hook(lambda gradient: gradient * torch.arange(16)[:, None])
    patched = chain(nn.ReLU())
    patched[1].forward = lambda x: x.flip(-1)
    for model in (Tied(chain(nn.ReLU())), watched, normed, shared, masked_gradient, patched):
        report = permuted(model, torch.randn(3, 8))
        assert not report.permuted, report


def test_hook_on_a_container_stops(any_order):
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4))
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    assert not permuted(model, torch.randn(3, 8)).permuted


def test_table_that_no_state_dict_holds_stops(any_order):
    class WithTable(nn.Module):
        def __init__(self, persistent):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
            self.register_buffer("table", torch.rand(16), persistent=persistent)

        def forward(self, x):
            return self.last(self.first(x) * self.table)

    assert len(permuted(WithTable(True), torch.randn(3, 8)).permuted) == 1
    report = permuted(WithTable(False), torch.randn(3, 8))
    assert [r.reason for r in written(report)] == ["table is in no state_dict"]


def test_what_only_training_does_counts(any_order):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            h = self.first(x)
            return (self.last(h), h) if self.training else self.last(h)

    assert not permuted(Auxiliary(), torch.randn(3, 8)).permuted


def test_what_an_optional_argument_does_counts(any_order):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x, mask=None, raw=False):
            h = self.first(x)
            h = h if mask is not None else h.flip(-1)
            return h if raw else self.last(h)

    assert not permuted(Optional(), torch.randn(3, 8)).permuted


def test_batch_norm_after_a_linear_layer_needs_to_know_the_rank(any_order):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    assert not permuted(flat, torch.randn(3, 8)).permuted
    known = nn.Sequential(
        nn.Conv1d(4, 8, 1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.BatchNorm1d(16),
        nn.Linear(16, 4),
    )
    assert len(permuted(known, torch.randn(3, 4, 8)).permuted) == 2


# Models that cannot be traced as a whole.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.act, self.wide = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x):
        return self.wide(self.act(self.narrow(x)))


class Outer(Branching):
    """Looks at its data, and calls its parts."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return super().forward(self.part(x))


class Loops(Outer):
    def forward(self, x):
        for layer in self.part:
            x = layer(x).flip(-1) if x.sum() > 0 else layer(x)
        return self.last(x)


class ReachesInside(Outer):
    def forward(self, x):
        if x.sum() > 1e9:
            return self.last(self.part(x))
        return self.last(self.part.wide(self.part.act(self.part.narrow(x)).flip(-1)))


def test_parts_of_a_model_without_a_graph_are_permuted(any_order):
    report = permuted(Outer(Block()), torch.rand(3, 16))
    assert [r.readers for r in report.permuted] == [("part.wide",)]


class Around(nn.Module):
    """Has a graph, but for one part; ``borrow`` also calls what is inside that part."""

    def __init__(self, borrow=False):
        super().__init__()
        self.first, self.outer, self.borrow = nn.Linear(16, 16), Outer(Block()), borrow

    def forward(self, x):
        x = self.outer.part.wide(self.outer.part.narrow(x).flip(-1)) if self.borrow else x
        return self.outer(torch.relu(self.first(x)))


def test_parts_of_a_part_without_a_graph_are_permuted_unless_others_use_them(any_order):
    assert [r.readers for r in permuted(Around(), torch.rand(3, 16)).permuted] == [("outer.part.wide",)]
    assert not permuted(Around(borrow=True), torch.rand(3, 16)).permuted


def test_hidden_layers_of_a_hugging_face_model_are_permuted(any_order):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5))
    report = permuted(model, torch.randint(0, 64, (2, 7)))
    assert [(r.writers, r.readers) for r in report.permuted] == [
        ((f"{mlp}.gate_proj", f"{mlp}.up_proj"), (f"{mlp}.down_proj",))
        for mlp in ("model.layers.0.mlp", "model.layers.1.mlp")
    ]


def test_parts_that_may_be_called_piece_by_piece_stop(any_order):
    assert permuted(ReachesInside(Block()), torch.rand(3, 16)).regions == ()
    square = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    assert permuted(Loops(square), torch.rand(3, 16)).regions == ()


def test_run_of_the_model_shows_whether_a_sequence_is_called_as_one(any_order):
    sequence = lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))  # noqa: E731
    called = {"": 1, "part": 1, "part.0": 1, "part.1": 1, "part.2": 1}
    assert permuted(Outer(sequence()), torch.rand(3, 16)).regions == ()
    assert len(permuted(Outer(sequence()), torch.rand(3, 16), calls=called).permuted) == 1
    assert permuted(Outer(sequence()), torch.rand(3, 16), calls={**called, "part": 0}).regions == ()


# Patterns, the search and the front door.


def test_every_reader_counts_under_its_own_pattern():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.one, self.two = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x):
            h = F.relu(self.first(x))
            return self.one(h) + self.two(h)

    (region,) = permuted(Siblings(), torch.randn(3, 8), layers={"two": Pattern(1, 8)}).permuted
    assert region.readers == ("one", "two")
    assert region.before < region.after <= region.ideal


def test_regions_that_nobody_reads_sparsely_stay(any_order):
    assert written(permuted(chain(nn.ReLU()), torch.randn(3, 8), skip=["2"])) == []
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    report = permuted(model, torch.randn(2, 4, 8, 8), block_axis="flat")
    assert [r.reason for r in written(report)] == ["blocks of 2 run flat"]


def test_memory_format_dtype_gradients_and_an_optimizer_made_before_stay():
    model = unlike(nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)
    model[0].bias.requires_grad_(False)
    model(torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)).float().sum().backward()
    optimizer, old = torch.optim.SGD(model.parameters(), lr=0.1), model[0].weight.detach().clone()
    gradient = model[0].weight.grad.clone()
    plan = plan_permutation(model, decisions(model))
    plan.apply()
    order = next(order for t, dim, order in plan.moves if t is model[0].weight)
    assert torch.equal(model[0].weight, old[order])
    assert torch.equal(model[0].weight.grad, gradient[order])
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.dtype == torch.bfloat16
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    plan.undo()
    assert torch.equal(model[0].weight, old)


def test_converted_model_keeps_more_and_finalizes_to_the_masked_permuted_weights():
    dense, images = unlike(resnet()), torch.randn(2, 3, 32, 32)
    plain = nmgraph.finalize(nmgraph.convert(copy.deepcopy(dense), method="srste"))
    before = answers(dense, images)
    model = nmgraph.convert(dense, method="srste", permute_channels=True, example_inputs=images)
    assert any(r.permuted for r in nmgraph.manifest(model).channel_order)
    finished = nmgraph.finalize(model)
    assert nmgraph.verify(finished).holds
    kept = [sum(float(p.detach().abs().sum()) for p in m.parameters() if p.dim() > 1) for m in (plain, finished)]
    assert kept[1] > kept[0] * 1.001
    torch.testing.assert_close(answers(finished, images), answers(model, images))
    unmasked = copy.deepcopy(model)
    unmask_all(unmasked)
    for one, other in zip(answers(unmasked, images), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5 * float(other.abs().max()))


def test_permuted_model_trains_saves_and_loads(tmp_path):
    model = nmgraph.convert(chain(nn.ReLU()), method="srste", permute_channels=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    nmgraph.attach(model, optimizer, total_steps=3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
    nmgraph.save(model, tmp_path / "m.nm.pt")
    again, x = nmgraph.load(tmp_path / "m.nm.pt"), torch.randn(4, 8)
    assert torch.equal(again(x), model(x))
    assert nmgraph.manifest(again) == nmgraph.manifest(model)
    assert nmgraph.manifest(nn.Sequential(again)).channel_order[1].readers == ("0.2",)


def test_graph_mode_is_permuted_alike():
    x, dense = torch.randn(3, 8), unlike(chain(nn.ReLU()))
    before = dense(x)
    model = nmgraph.convert(dense, method="srste", mode="graph", permute_channels=True, example_inputs=x)
    assert isinstance(model, fx.GraphModule)
    assert any(r.permuted for r in nmgraph.manifest(model).channel_order)
    torch.testing.assert_close(dense(x), before)


def test_model_that_answers_otherwise_afterwards_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(
        permute_channels, "_order_of", lambda claim, orders: torch.arange(claim.tensor.shape[claim.dim]).roll(1)
    )
    model = unlike(chain(nn.ReLU()))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ConversionError) as caught:
        nmgraph.convert(model, permute_channels=True, example_inputs=torch.randn(3, 8))
    assert str(caught.value) == (
        "Sequential answers otherwise after its channels were permuted, or answers otherwise each time; it has been left "
        "as it was. Convert it without permute_channels (--permute-channels)."
    )
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not list(masked_modules(model))


def test_manifest_without_permutations_reads_as_before():
    found = nmgraph.manifest(nmgraph.convert(chain(nn.ReLU()), method="srste", permute_channels=True))
    assert Manifest.from_json(found.to_json()) == found
    values = json.loads(found.to_json())
    del values["channel_order"]
    assert Manifest.from_json(json.dumps(values)).channel_order == ()


def test_command_shows_what_was_permuted(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(chain(nn.ReLU()), path)
    result = CliRunner().invoke(app, ["convert", str(path), "--permute-channels", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    entering, region = answer["channel_order"]
    assert entering["reason"] == "its input could not be followed to a layer"
    assert (region["writers"], region["readers"], region["permuted"]) == (["0"], ["2"], True)
    assert region["after"] > region["before"]
    shown = CliRunner().invoke(app, ["convert", str(path), "--permute-channels", "--overwrite"], env={"COLUMNS": "160"})
    assert "channel order: 1 of 2 regions permuted" in shown.stdout


def test_table_without_a_region_says_what_would_show_more():
    console = Console(width=200, file=io.StringIO())
    console.print(PermutationReport(()))
    assert "With example inputs (--input), a run shows which parts of a model are called." in " ".join(
        console.file.getvalue().split()
    )
