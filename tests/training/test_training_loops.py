"""A converted model in the loops people write: it learns, and its masks end at N:M."""

import copy
import io

import pytest
import torch
from handles import nm
from torch import nn
from torch.nn import functional as F

import nmgraph
from nmgraph.layers.masked import masked_weights
from nmgraph.methods import METHODS

STEPS = 30

both = pytest.mark.parametrize("method", METHODS)
optimizers = pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    ],
    ids=["sgd", "adamw", "fused adamw"],
)


def network(method, seed=1, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16), nn.ReLU())
    return nmgraph.convert(net.append(nn.Linear(16, 4)), method=method, **options)


def batch(step, size=32):
    """Draw noise around one of four fixed images each."""
    images = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1000 + step)
    y = torch.randint(4, (size,), generator=generator)
    return 0.5 * images[y] + torch.randn(size, 8, 4, 4, generator=generator), y


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def loss_of(model, step):
    x, y = batch(step)
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)


def take_step(model, optimizer, step):
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


@torch.no_grad()
def held_out(model):
    """Measure the loss on batches that no loop sees."""
    return sum(loss_of(model, 10_000 + i).item() for i in range(4)) / 4


def assert_learned(model, before):
    assert held_out(model) < 0.5 * before
    finished = nmgraph.finalize(model)
    assert nmgraph.verify(finished).holds
    assert held_out(finished) == pytest.approx(held_out(model))


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def trained(method, make=sgd, steps=STEPS):
    model = network(method)
    optimizer = make(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(steps):
        take_step(model, optimizer, step)
    return model, optimizer


@both
@optimizers
def test_a_converted_model_learns_and_ends_at_its_pattern(method, make):
    model = network(method)
    before = held_out(model)
    optimizer = make(model.parameters())
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        take_step(model, optimizer, step)
    assert_learned(model, before)


@both
@optimizers
def test_it_learns_under_autocast(method, make):
    model = network(method)
    before = held_out(model)
    optimizer = make(model.parameters())
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
    assert_learned(model, before)


@both
def test_accumulated_gradients_count_as_one_step(method):
    whole, _ = trained(method)
    model = network(method)
    optimizer = sgd(model)
    controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in zip(*(t.chunk(4) for t in batch(step)), strict=True):
            (F.cross_entropy(model(x), y) / 4).backward()
        optimizer.step()
    assert controller.step == STEPS
    assert held_out(model) == pytest.approx(held_out(whole), rel=0.05)
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@both
def test_a_copy_trains_as_the_original_would(method):
    model, optimizer = trained(method, steps=7)
    twin = copy.deepcopy(model)
    twin_optimizer = sgd(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    nmgraph.attach(twin, twin_optimizer, total_steps=STEPS)
    kept = copy.deepcopy(model)
    for step in range(7, STEPS):
        take_step(twin, twin_optimizer, step)
    assert same(model, kept)
    for step in range(7, STEPS):
        take_step(model, optimizer, step)
    assert same(model, twin)


@both
def test_an_attached_model_can_be_pickled_whole_and_trained_on(method):
    model, optimizer = trained(method, steps=7)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    read_optimizer = sgd(read)
    read_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    nmgraph.attach(read, read_optimizer, total_steps=STEPS)
    for step in range(7, STEPS):
        take_step(model, optimizer, step)
        take_step(read, read_optimizer, step)
    assert same(model, read)


@both
def test_a_compiled_model_is_attached_as_it_is(method):
    torch._dynamo.reset()
    plain, _ = trained(method, steps=8)
    model = network(method)
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(compiled)
    nmgraph.attach(compiled, optimizer, total_steps=STEPS)
    for step in range(8):
        take_step(compiled, optimizer, step)
    assert same(model, plain)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_it_trains_on_after_a_change_of_dtype(method, dtype, attached):
    model = network(method)
    before = held_out(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    if attached == "after":
        model.to(dtype)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        if step == 5:
            model.to(dtype)
        take_step(model, optimizer, step)
    assert all(p.dtype == dtype for p in model.parameters())
    assert_learned(model, before)


@both
def test_two_models_trained_by_turns_equal_each_alone(method):
    def start(which):
        model = network(method, seed=which, pattern=("2:4", "1:4")[which])
        optimizer = sgd(model)
        nmgraph.attach(model, optimizer, total_steps=12 + which)
        return model, optimizer

    alone = []
    for which in range(2):
        model, optimizer = start(which)
        for step in range(12):
            take_step(model, optimizer, step)
        alone.append(model)
    together = [start(which) for which in range(2)]
    for step in range(12):
        for model, optimizer in together:
            take_step(model, optimizer, step)
    assert all(same(model, other) for (model, _), other in zip(together, alone, strict=True))


@both
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    ],
    ids=["sgd", "fused sgd", "adam", "fused adam"],
)
def test_a_step_that_the_grad_scaler_skips_has_never_been(method, make):
    def run(overflows):
        model = network(method)
        optimizer = make(model.parameters())
        controller = nmgraph.attach(model, optimizer, total_steps=12)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**8)
        for step in range(12):
            for overflow in [True, False] if step in overflows else [False]:
                optimizer.zero_grad()
                scaler.scale(loss_of(model, step) * (torch.inf if overflow else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
        assert controller.step == 12
        return model

    # Scales are powers of two, so that scaling and unscaling are exact.
    assert same(run(()), run((2, 5, 6)))  # 5 is the last step of LBC's removal


@both
@pytest.mark.parametrize(
    "call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)], ids=["positional", "keyword"]
)
def test_a_closure_gives_what_a_plain_step_gives(method, call):
    plain, _ = trained(method)
    model = network(method)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert call(optimizer, closure).item() > 0
    assert same(model, plain)


@both
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_maximizing_the_negative_is_minimizing(method, make):
    def run(sign):
        model = network(method)
        optimizer = make(model.parameters(), lr=0.05, weight_decay=0.0, maximize=sign < 0)
        nmgraph.attach(model, optimizer, total_steps=12)
        for step in range(12):
            optimizer.zero_grad()
            (sign * loss_of(model, step)).backward()
            optimizer.step()
        return model

    assert same(run(1.0), run(-1.0))


@both
def test_lbfgs_which_evaluates_many_times_updates_once_per_step(method):
    model = network(method)
    before = held_out(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    controller = nmgraph.attach(model, optimizer, total_steps=8)
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = sum(loss_of(model, step) for step in range(4))
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
    assert evaluations > 16
    assert controller.step == 8
    if method not in ("bame", "gradual", "tmask"):  # where a mask jumps, the curvature gathered so far is untrue
        assert_learned(model, before)


@both
def test_training_beyond_the_last_step_keeps_the_pattern(method):
    model, optimizer = trained(method)
    masks = {name: nm(layer).mask() for name, layer in masked_weights(model).items()}
    for step in range(STEPS, STEPS + 5):
        take_step(model, optimizer, step)
    assert nm(model[0]).clock.tolist() == [STEPS + 5, STEPS]
    assert nmgraph.verify(nmgraph.finalize(model)).holds
    if method == "lbc":
        assert all(torch.equal(nm(layer).mask(), masks[name]) for name, layer in masked_weights(model).items())


@pytest.mark.parametrize("silent", [range(5, 6), range(6), range(3, 8), range(4, 12)])
def test_a_layer_without_gradients_for_some_steps_ends_at_its_pattern_too(silent):
    # As with layer drop, or an expert that no token was sent to.
    model = nmgraph.convert(nn.ModuleDict({"always": nn.Linear(16, 4), "sometimes": nn.Linear(16, 4)}), method="lbc")
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=12)
    for step in range(12):
        optimizer.zero_grad()
        x = torch.randn(8, 16)
        y = model["always"](x) if step in silent else model["always"](x) + model["sometimes"](x)
        y.square().mean().backward()
        optimizer.step()
    assert {name: nm(layer).unfinished() for name, layer in masked_weights(model).items()} == {
        "always": None,
        "sometimes": None,
    }


def test_a_nan_in_one_gradient_does_not_poison_the_scores(caplog):
    model = network("lbc")
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if step == 3:
            nm(model[3]).raw.grad[0, :5] = torch.nan
            nm(model[3]).raw.grad[1, 7] = torch.inf
            before = copy.deepcopy(model.state_dict())
        optimizer.step()
        if step == 3:  # the optimizer has taken it, so the weights are lost
            after = model.state_dict()
            assert not after["3.weight"].isfinite().all()
            assert all(torch.equal(before[n], after[n]) for n in after if ".nm_" in n and not n.endswith("nm_clock"))
            for parameter in model.parameters():
                parameter.data.nan_to_num_(0.0, 0.0, 0.0)
    assert caplog.messages == ["the gradient is NaN or infinite: masks are left as they are at such steps."]
    for layer in masked_weights(model).values():
        assert torch.isfinite(nm(layer).state.accumulator).all()
        assert torch.isfinite(nm(layer).state.velocity).all()
        assert nm(layer).unfinished() is None


@both
def test_a_channels_last_model_learns_as_well(method):
    model = network(method)
    before = held_out(model)
    model = model.to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        take_step(model, optimizer, step)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_learned(model, before)


@both
def test_pruned_weights_stay_zero_in_the_answer_whatever_momentum_and_decay_do(method):
    model, optimizer = trained(method)
    for step in range(3):
        take_step(model, optimizer, step)
        for layer in masked_weights(model).values():
            assert torch.equal(layer.operand().forward == 0, ~layer.mask())
