"""What an optimizer forgets of a weight that begins anew, for every optimizer of torch.optim."""

import copy
import inspect
import math

import pytest
import torch
from handles import nm
from torch import nn

import nmgraph
from nmgraph.training.optimizer_state import clear_moments

optim = torch.optim

# Name: how to make it, and the moments that it keeps of every single weight.
OPTIMIZERS = {
    "sgd": (lambda p: optim.SGD(p, lr=0.05, momentum=0.9), {"momentum_buffer"}),
    "sgd-nesterov": (lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True), {"momentum_buffer"}),
    "sgd-fused": (lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True), {"momentum_buffer"}),
    "sgd-foreach": (lambda p: optim.SGD(p, lr=0.05, momentum=0.9, foreach=True), {"momentum_buffer"}),
    "adam": (lambda p: optim.Adam(p, lr=0.01), {"exp_avg", "exp_avg_sq"}),
    "adam-fused": (lambda p: optim.Adam(p, lr=0.01, fused=True), {"exp_avg", "exp_avg_sq"}),
    "adam-foreach": (lambda p: optim.Adam(p, lr=0.01, foreach=True), {"exp_avg", "exp_avg_sq"}),
    "adam-tensor-lr": (lambda p: optim.Adam(p, lr=torch.tensor(0.01)), {"exp_avg", "exp_avg_sq"}),
    "adam-amsgrad": (lambda p: optim.Adam(p, lr=0.01, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "adamw": (lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1), {"exp_avg", "exp_avg_sq"}),
    "adamw-fused-amsgrad": (
        lambda p: optim.AdamW(p, lr=0.01, fused=True, amsgrad=True),
        {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    ),
    "adamax": (lambda p: optim.Adamax(p, lr=0.01), {"exp_avg", "exp_inf"}),
    "nadam": (lambda p: optim.NAdam(p, lr=0.01), {"exp_avg", "exp_avg_sq"}),
    "radam": (lambda p: optim.RAdam(p, lr=0.01), {"exp_avg", "exp_avg_sq"}),
    "rmsprop": (
        lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
    "rprop": (lambda p: optim.Rprop(p, lr=0.01), {"prev"}),
    "adagrad": (lambda p: optim.Adagrad(p, lr=0.05), {"sum"}),
    "adagrad-fused": (lambda p: optim.Adagrad(p, lr=0.05, fused=True), {"sum"}),
    "adadelta": (lambda p: optim.Adadelta(p, lr=1.0), {"square_avg", "acc_delta"}),
    "asgd": (lambda p: optim.ASGD(p, lr=0.05), {"ax"}),
    "adafactor": (lambda p: optim.Adafactor(p, lr=0.01), set()),
    "lbfgs": (lambda p: optim.LBFGS(p, lr=0.05, max_iter=3), set()),
}
if hasattr(optim, "Muon"):
    OPTIMIZERS["muon"] = (lambda p: optim.Muon(p, lr=0.02), {"momentum_buffer"})
KINDS = pytest.mark.parametrize(("make", "moments"), OPTIMIZERS.values(), ids=OPTIMIZERS)


def test_every_optimizer_of_torch_is_in_the_table():
    known = {cls for cls in vars(optim).values() if inspect.isclass(cls) and issubclass(cls, optim.Optimizer)}
    tested = {type(make([nn.Parameter(torch.ones(4, 4))])) for make, _ in OPTIMIZERS.values()}
    assert known - tested == {optim.Optimizer, optim.SparseAdam}  # which takes sparse gradients alone


def stepped(make, steps=3):
    """Give a parameter and an optimizer that has taken some steps with it."""
    parameter = nn.Parameter(torch.randn(4, 8))
    optimizer = make([parameter])
    target = torch.randn(4, 8)

    def closure():
        optimizer.zero_grad()
        loss = (parameter - target).pow(2).mul(torch.rand(4, 8) + 0.5).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return parameter, optimizer


@KINDS
def test_moments_of_restarted_weights_are_zero_and_all_else_stays(make, moments):
    parameter, optimizer = stepped(make)
    restart = torch.rand(4, 8) < 0.4
    before = copy.deepcopy(optimizer.state[parameter])
    clear_moments([optimizer], parameter, restart)
    after = optimizer.state[parameter]
    assert before.keys() == after.keys()
    if not before.keys() - {"step"}:
        pytest.fail("the optimizer keeps nothing, so this test shows nothing")
    for name, value in after.items():
        if name in moments:
            assert before[name][restart].any() or name == "ax"  # ASGD's average begins after a million steps
            assert torch.equal(value, before[name].masked_fill(restart, 0.0)), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name
        else:
            assert same(value, before[name]), name


def same(one, other):
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@KINDS
def test_a_parameter_that_was_never_stepped_stays_without_state(make, moments):
    parameter = nn.Parameter(torch.randn(4, 8))
    optimizer = make([parameter])
    known = set(optimizer.state)  # some keep a state from the beginning
    clear_moments([optimizer], parameter, torch.ones(4, 8, dtype=torch.bool))
    assert set(optimizer.state) == known


def test_averages_of_weights_are_reset_too():
    parameter = nn.Parameter(torch.ones(4, 8))
    optimizer = optim.ASGD([parameter], lr=0.05, t0=0)
    for _ in range(3):
        parameter.grad = torch.ones(4, 8)
        optimizer.step()
    restart = torch.eye(4, 8, dtype=torch.bool)
    assert optimizer.state[parameter]["ax"].all()
    clear_moments([optimizer], parameter, restart)
    assert torch.equal(optimizer.state[parameter]["ax"] == 0, restart)


def test_the_sum_of_adagrad_begins_again_at_its_initial_value():
    parameter, optimizer = stepped(lambda p: optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1))
    restart = torch.eye(4, 8, dtype=torch.bool)
    clear_moments([optimizer], parameter, restart)
    sums = optimizer.state[parameter]["sum"]
    assert (sums[~restart] > 0.1).all()
    assert torch.equal(sums[restart], torch.full((4,), 0.1))


@pytest.mark.parametrize("shape", [(8, 16, 1, 1), (8, 16, 3, 1), (1, 16)], ids=str)
def test_adafactor_stays_finite_where_its_factors_have_the_shape_of_the_weight(shape):
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = optim.Adafactor([parameter], lr=0.01)
    restart = torch.rand(shape) < 0.5
    for _ in range(3):
        parameter.grad = torch.randn(shape).masked_fill(restart, 0.0)
        if optimizer.state:
            clear_moments([optimizer], parameter, restart)
        optimizer.step()
        assert parameter.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=["plain", "foreach"])
def test_step_sizes_of_rprop_stay_so_that_a_restarted_weight_can_move(options):
    parameter, optimizer = stepped(lambda p: optim.Rprop(p, lr=0.01, **options))
    sizes = optimizer.state[parameter]["step_size"].clone()
    restart = torch.ones(4, 8, dtype=torch.bool)
    clear_moments([optimizer], parameter, restart)
    assert torch.equal(optimizer.state[parameter]["step_size"], sizes)
    before = parameter.detach().clone()
    parameter.grad = torch.ones(4, 8)
    optimizer.step()
    assert torch.equal(parameter.detach(), before - sizes)


def test_a_moment_in_another_memory_format_is_cleared_at_the_right_places():
    parameter = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    restart = torch.rand(8, 4, 3, 3) < 0.5
    clear_moments([optimizer], parameter, restart)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"] == 0, restart)


# --- through a method that restarts weights: BAME, whose gains are made large by small weights

TOTAL = 24
OPTIONS = {"t_i": 0.25, "t_f": 0.9, "interval": 3, "freeze_oscillating": 0.0, "freeze_large": 0.0}


class Run:
    """A sparse layer trained by an optimizer, and what it looked like between ``update`` and the step."""

    def __init__(self, make):
        self.model = nmgraph.convert(nn.Linear(16, 8, bias=False), method="bame", gain="adam", **OPTIONS)
        with torch.no_grad():
            nm(self.model).raw.mul_(1e-3)
        self.optimizer = make(self.model.parameters())
        nmgraph.attach(self.model, self.optimizer, total_steps=TOTAL)
        self.optimizer.register_step_pre_hook(self.look)  # after attach's own
        self.seen, self.loss = [], None

    def look(self, optimizer, args, kwargs):
        if not args[1:]:
            self.note()
            return None
        closure, first = args[1], []

        def noting():
            loss = closure()
            if not first:
                first.append(loss)
                self.note()
            return loss

        return (args[0], noting, *args[2:]), kwargs

    def note(self):
        raw = nm(self.model).raw
        state = {k: v.clone() for k, v in self.optimizer.state.get(raw, {}).items() if isinstance(v, torch.Tensor)}
        self.seen.append((raw.detach().clone(), raw.grad.clone(), nm(self.model).mask().clone(), state))

    def closure(self):
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(len(self.seen))
        x = torch.randn(16, 16, generator=generator)
        loss = (self.model(x) - torch.sin(3 * x[:, :8] + x[:, 8:])).square().mean()
        loss.backward()
        self.loss = loss.item()
        return loss

    def train(self, each=lambda before, after: None):
        """Call ``each(mask before, weight after)`` once per step."""
        for _ in range(TOTAL):
            mask = nm(self.model).mask().clone()
            if isinstance(self.optimizer, optim.LBFGS):
                self.optimizer.step(self.closure)
            else:
                self.closure()
                self.optimizer.step()
            each(mask, nm(self.model).raw.detach())


@KINDS
def test_pruned_and_grown_weights_stand_at_zero_before_the_step_without_moments(make, moments):
    run, restarted = Run(make), {"pruned": 0, "grown": 0}

    def each(before, _):
        raw, grad, mask, state = run.seen[-1]
        restart = mask ^ before
        restarted["pruned"] += int((before & restart).sum())
        restarted["grown"] += int((mask & restart).sum())
        assert not raw[restart].any()
        assert not grad[~mask].any()
        for name in moments & state.keys():
            assert not state[name][restart].any(), name
        if "prev" in state:
            assert (state["step_size"] > 0).all()

    run.train(each)
    assert all(moments <= state.keys() for *_, state in run.seen[1:])
    assert restarted["grown"] >= 5
    assert restarted["pruned"] >= 5


@KINDS
def test_training_goes_on_with_finite_values_and_grown_weights_move(make, moments):
    run, grown_in_all = Run(make), 0

    def each(before, after):
        nonlocal grown_in_all
        _, grad, mask, _ = run.seen[-1]
        grown = mask & ~before & (grad != 0)
        grown_in_all += int(grown.sum())
        assert after.isfinite().all()
        assert after[grown].all()

    run.train(each)
    assert grown_in_all >= 5
    assert math.isfinite(run.loss)
    for value in run.optimizer.state[nm(run.model).raw].values():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=["plain", "fused", "foreach"])
def test_a_grown_weight_begins_its_averages_anew_under_adam(options):
    run, compared = Run(lambda p: optim.Adam(p, lr=0.01, betas=(0.9, 0.99), **options)), 0

    def each(before, after):
        nonlocal compared
        _, grad, mask, _ = run.seen[-1]
        grown = mask & ~before
        state = run.optimizer.state[nm(run.model).raw]
        torch.testing.assert_close(state["exp_avg"][grown], 0.1 * grad[grown])
        torch.testing.assert_close(state["exp_avg_sq"][grown], 0.01 * grad[grown].square())
        compared += int(grown.sum())

    run.train(each)
    assert compared >= 5
