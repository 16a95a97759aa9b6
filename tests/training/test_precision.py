"""Precisions, compilers, recomputation and freezing in training: masks move as they would without."""

import copy

import pytest
import torch
from handles import nm
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from variants import VARIANTS

import nmgraph
from nmgraph.errors import TrainingError
from nmgraph.layers.masked import masked_weights

STEPS = 12

every = pytest.mark.parametrize("variant", VARIANTS)
few = pytest.mark.parametrize(
    "variant", ["lbc", "srste", "bame", "bimask"]
)  # scores, none, restarts, a backward weight


class Network(nn.Module):
    """Two blocks that may be computed again in backward."""

    def __init__(self, recompute=lambda block, x: block(x)):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)
        self.recompute = recompute

    def forward(self, x):
        return self.head(self.recompute(self.second, self.recompute(self.first, x)))


def network(variant, *arguments, dtype=torch.float32):
    torch.manual_seed(1)
    method, options = VARIANTS[variant]
    return nmgraph.convert(Network(*arguments).to(dtype), method=method, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 8, 4, 4, generator=generator, dtype=torch.float32)
    y = torch.randint(4, (8,), generator=generator)
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype).requires_grad_()).float(), y)


def take_step(model, optimizer, step):
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def trained(variant, *arguments, steps=STEPS, forward=lambda model: model):
    model = network(variant, *arguments)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    called = forward(model)
    for step in range(steps):
        take_step(called, optimizer, step)
    return model, optimizer


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# --- precision


@every
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
def test_a_step_that_overflows_in_float16_changes_nothing_of_the_model(variant, options):
    model = network(variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-4)
    taken = attempts = 0
    while taken < STEPS:
        before, attempts = state_of(model), attempts + 1
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, taken)
        scaler.scale(loss).backward()
        overflown = any(not p.grad.isfinite().all() for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert same(state_of(model), before) == overflown
        taken += not overflown
        assert controller.step == taken
    assert attempts > STEPS
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@pytest.fixture
def narrow_default():
    """Set the default dtype of torch, as some libraries do while they make a model."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.bfloat16)
    torch.set_default_dtype(before)


@every
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])  # T-Mask's search differs
def test_the_default_dtype_has_no_say_in_a_methods_state(variant, pattern, narrow_default):
    method, options = VARIANTS[variant]
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    usual = nmgraph.convert(copy.deepcopy(net), method=method, pattern=pattern, **options).state_dict()
    narrow_default()
    found = nmgraph.convert(net, method=method, pattern=pattern, **options).state_dict()
    assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in usual.items()}
    assert same(found, usual)


@every
def test_a_model_that_is_bfloat16_from_the_beginning_keeps_its_methods_state_wider(variant, narrow_default):
    narrow_default()
    model = network(variant, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        take_step(model, optimizer, step)
    for weight in masked_weights(model).values():
        assert weight.raw.dtype == torch.bfloat16
        floats = [t.dtype for t in weight.state if t.is_floating_point()]
        assert floats == [torch.float32] * len(floats)
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@few
def test_weights_cast_in_the_forward_train_as_masters_of_the_cast_ones(variant):
    model = network(variant)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        cast = {name: p.bfloat16() for name, p in model.named_parameters()}
        x = torch.randn(8, 8, 4, 4, generator=torch.Generator().manual_seed(step))
        functional_call(model, cast, (x.bfloat16(),)).float().square().mean().backward()
        optimizer.step()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_an_optimizer_over_master_copies_is_refused():
    model = network("lbc").bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    with pytest.raises(TrainingError) as caught:
        nmgraph.attach(model, torch.optim.AdamW(masters), total_steps=STEPS)
    assert str(caught.value) == (
        "the optimizer trains none of the 4 sparse weights (first.0, ...). "
        "Make it from the parameters() of this very model."
    )


def train_through_a_copy(masters, steps, renew):
    """Give the gradients of a bfloat16 copy to its masters, and after each step renew the copy."""
    model = copy.deepcopy(masters).bfloat16()
    optimizer = sgd(masters)
    nmgraph.attach(masters, optimizer, total_steps=STEPS)
    for step in range(steps):
        model.zero_grad()
        loss_of(model, step).backward()
        for master, p in zip(masters.parameters(), model.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        renew(model)
    return model


@pytest.mark.parametrize("variant", ["lbc", "bame", "srste"])
def test_a_low_precision_copy_that_takes_its_masters_weights_alone_is_told_that_its_masks_stand(variant):
    masters = network(variant)

    @torch.no_grad()
    def renew(model):
        for master, p in zip(masters.parameters(), model.parameters(), strict=True):
            p.copy_(master)

    with pytest.warns(UserWarning, match="but no optimizer is attached"):
        train_through_a_copy(masters, 3, renew)


@few
def test_a_low_precision_copy_that_loads_its_masters_state_has_their_masks(variant):
    masters = network(variant)
    model = train_through_a_copy(masters, STEPS, lambda copied: copied.load_state_dict(masters.state_dict()))
    assert same(nm(model.head).state._asdict(), nm(masters.head).state._asdict())
    assert nmgraph.verify(nmgraph.finalize(model)).holds


# --- recomputation


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_computed_again_in_backward_change_nothing(variant, reentrant):
    plain, _ = trained(variant)
    again, optimizer = trained(variant, lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    assert same(again.state_dict(), plain.state_dict())
    assert nm(again.head).clock.tolist() == [STEPS, STEPS]
    assert optimizer.state


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", ["bame", "bimask", "gradual", "rigl", "tmask"])  # which move them at intervals
@pytest.mark.usefixtures("_fresh_compiler")
def test_masks_that_move_and_modes_that_change_compile_nothing_again(variant):
    plain, _ = trained(variant)
    model = network(variant)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(8, 8, 4, 4, requires_grad=True)
    compiled(x)
    model.eval()
    compiled(x)
    model.train()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(STEPS):
            take_step(compiled, optimizer, step)
            model.eval()
            assert torch.equal(compiled(x), model(x))
            model.train()
    assert same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("variant", ["lbc", "bimask"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_network_with_blocks_computed_again_is_one_graph_with_the_same_gradients(variant):
    model = network(variant, lambda block, x: checkpoint(block, x, use_reentrant=False))
    loss_of(model, 0).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(torch.compile(model, fullgraph=True, backend="aot_eager"), 0).backward()
    assert all(torch.allclose(p.grad, w, atol=1e-6) for p, w in zip(model.parameters(), wanted, strict=True))


@pytest.mark.parametrize("variant", ["static", *(pytest.param(v, marks=pytest.mark.slow) for v in ("srste", "bimask"))])
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_optimizer_step_runs_the_method_all_the_same(variant):
    plain, _ = trained(variant)
    model = network(variant)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    step_compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        step_compiled()
    assert same(model.state_dict(), plain.state_dict())


# --- memory formats


@every
def test_a_run_turned_to_channels_last_on_its_way_keeps_its_masks_and_ends_at_its_pattern(variant):
    model, optimizer = trained(variant, steps=5)
    masks = {name: weight.mask() for name, weight in masked_weights(model).items()}
    model.to(memory_format=torch.channels_last)
    assert all(torch.equal(weight.mask(), masks[name]) for name, weight in masked_weights(model).items())
    for step in range(5, STEPS):
        take_step(model, optimizer, step)
    assert model.first[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert nmgraph.verify(nmgraph.finalize(model)).holds


# --- freezing


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_frozen_after_the_masks_have_settled_stay_as_they_are(variant):
    model, optimizer = trained(variant)
    model.first.requires_grad_(False)
    optimizer.zero_grad()
    before = state_of(model)
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    masks = {name: weight.mask() for name, weight in masked_weights(model).items()}
    for step in range(STEPS, STEPS + 4):
        take_step(model, optimizer, step)
    after = state_of(model)
    for name in ("first.0", "first.2"):
        assert torch.equal(masked_weights(model)[name].mask(), masks[name])
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
        assert after[f"{name}.nm_clock"].tolist() == [STEPS + 4, STEPS]
    later = optimizer.state_dict()["state"]
    for index in range(4):  # first.0 and first.2, weights and biases
        assert torch.equal(later[index]["momentum_buffer"], moments[index]["momentum_buffer"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


@pytest.mark.parametrize("variant", ["bame", "gradual", "lbc", "tmask"])
def test_masks_of_layers_frozen_within_a_phase_stand_until_these_are_trained_again(variant):
    model, optimizer = trained(variant, steps=3)
    model.first.requires_grad_(False)
    optimizer.zero_grad()
    layer = masked_weights(model)["first.0"]
    mask = layer.mask()
    for step in range(3, 9):
        take_step(model, optimizer, step)
        assert torch.equal(layer.mask(), mask)
        assert layer.clock.tolist() == [step + 1, STEPS]
    model.first.requires_grad_(True)
    for step in range(9, STEPS):
        take_step(model, optimizer, step)
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@pytest.mark.parametrize("variant", ["rigl", "bame"])
@pytest.mark.parametrize("gradient", [None, 0.0], ids=["none", "zero"])
def test_without_gradients_masks_are_not_adapted(variant, gradient):
    method = VARIANTS[variant][0]
    model = nmgraph.convert(nn.Linear(32, 8), method=method, interval=2, **({"t_i": 0.0} if method == "bame" else {}))
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=40)
    mask, before = nm(model).mask(), state_of(model)
    for _ in range(20):
        if gradient is not None:
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient)
        optimizer.step()
    assert torch.equal(nm(model).mask(), mask)
    assert torch.equal(nm(model).raw, before["weight"])


@every
@pytest.mark.parametrize(
    ("frozen", "clear"), [("first", True), ("", False)], ids=["some layers", "the whole model, gradients left to stand"]
)
def test_layers_frozen_for_a_while_and_trained_on_end_at_the_pattern(variant, frozen, clear):
    model = network(variant)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    part = model.get_submodule(frozen)
    for step in range(STEPS):
        if step in (3, 9):
            if clear:
                optimizer.zero_grad()
            part.requires_grad_(step == 9)
        if frozen or not 3 <= step < 9:
            take_step(model, optimizer, step)
        else:
            loss_of(model, step)
            optimizer.step()
    assert {weight.clock.tolist()[0] for weight in masked_weights(model).values()} == {STEPS}
    assert all(p.isfinite().all() for p in model.parameters())
    assert nmgraph.verify(nmgraph.finalize(model)).holds
