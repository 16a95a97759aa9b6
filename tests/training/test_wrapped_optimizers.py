"""Optimizers that hold another one, that are replaced, and that keep their moments elsewhere."""

import copy
import gc

import pytest
import timm.optim
import torch
from handles import nm
from ranks import on_ranks
from timm.optim.lookahead import Lookahead
from torch import nn, optim
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_pre_hooks

import nmgraph
from nmgraph.layers.masked import masked_weights

STEPS = 8


class SAM(optim.Optimizer):
    """Sharpness-aware minimization (Foret et al., 2021) in the form in which most code has it."""

    def __init__(self, parameters, base, rho=0.05, **options):
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
            p.grad = None

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p].pop("old"))
        self.base_optimizer.step()


def network(method="bame", **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return nmgraph.convert(net, method=method, **({"interval": 2} if method == "bame" else {}), **options)


def loss_of(model, step, rows=slice(None)):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator)
    return F.cross_entropy(model(x[rows]), y[rows])


def train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def adamw(model):
    return optim.AdamW(model.parameters(), lr=0.02)


def test_every_step_of_sam_counts_once_and_its_moments_are_cleared():
    model = network()
    optimizer = SAM(model.parameters(), optim.SGD, lr=0.05, momentum=0.9)
    controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.first_step()
        loss_of(model, step).backward()
        optimizer.second_step()
    assert controller.step == STEPS
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_lookahead_around_an_optimizer_counts_every_step_once():
    model = network("lbc")
    optimizer = Lookahead(adamw(model), alpha=0.5, k=2)
    controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer)
    assert controller.step == STEPS
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_an_optimizer_of_timm_trains_without_a_word(caplog):
    model = network()
    optimizer = timm.optim.Lamb(model.parameters(), lr=0.02)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer)
    assert caplog.messages == []
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def with_zero(rank, world):
    models, moments = [network(), network()], []
    models[0] = DistributedDataParallel(models[0])
    optimizers = [
        ZeroRedundancyOptimizer(models[0].parameters(), optim.AdamW, lr=0.02),
        adamw(models[1]),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step).backward()  # the same rows on all ranks, so that the mean is that of one
            optimizer.step()
            controller.check_ranks()
        inner = getattr(optimizer, "optim", optimizer)
        moments.append({n: inner.state[p]["exp_avg"] for n, p in model.named_parameters() if p in inner.state})
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(one, other), name
    kept = {name.removeprefix("module."): moment for name, moment in moments[0].items()}
    assert 0 < len(kept) < len(moments[1])  # each rank has a part of the state
    assert all(torch.equal(moment, moments[1][name]) for name, moment in kept.items())


def test_zero_redundancy_trains_as_one_optimizer_does_and_clears_moments_where_they_are():
    on_ranks(2, with_zero)


def test_a_replaced_optimizer_is_said_once(caplog):
    model = network()
    nmgraph.attach(model, adamw(model), total_steps=STEPS)
    other = optim.SGD(model.parameters(), lr=0.05)
    train(model, other)
    assert caplog.messages == [
        "0: its weight is stepped by a SGD that is not the optimizer attached, so its masks are not updated. Attach again: "
        "nmgraph.attach(model, optimizer, total_steps=...)."
    ]
    controller = nmgraph.attach(model, other, total_steps=STEPS)
    train(model, other)
    assert controller.step == STEPS
    assert len(caplog.messages) == 1


def test_optimizers_of_other_weights_are_left_in_peace(caplog):
    model, other = network(), nn.Linear(3, 3)
    nmgraph.attach(model, adamw(model), total_steps=STEPS)
    optimizer = adamw(other)
    for _ in range(2):
        other(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert caplog.messages == []


def test_a_detached_controller_no_longer_looks_at_optimizers(caplog):
    gc.collect()
    before = len(_global_optimizer_pre_hooks)
    model = network()
    nmgraph.attach(model, adamw(model), total_steps=STEPS).detach()
    assert len(_global_optimizer_pre_hooks) == before
    train(model, adamw(model))
    assert caplog.messages == []


def test_a_model_that_is_gone_leaves_no_hook_behind():
    gc.collect()
    before = len(_global_optimizer_pre_hooks)
    model = network()
    optimizer = adamw(model)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    del model, optimizer
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == before


def test_shared_moments_that_cannot_be_cleared_are_named(caplog):
    model = network()
    optimizer = optim.Adafactor(model.parameters(), lr=0.02)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer)
    assert caplog.messages == [
        "Adafactor keeps row_var, col_var encoded, or for several weights at once: of weights that begin anew they are not "
        "cleared."
    ]


class Hidden(optim.SGD):
    """An optimizer that keeps its averages to itself."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.averages = {}

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.averages[p] = 0.9 * self.averages.get(p, 0.0) + p.grad
        return super().step(closure)


def test_an_optimizer_without_state_of_a_weight_is_named(caplog):
    model = network()
    optimizer = Hidden(model.parameters(), lr=0.05)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer)
    assert caplog.messages[0] == (
        "Hidden has no state of 0 where torch's optimizers have it: if it keeps moments elsewhere, those of weights that "
        "begin anew are not cleared."
    )


def test_a_criterion_sees_the_unclipped_gradient_if_it_is_asked_before_clipping():
    model = network("lbc")
    clipped, asked = copy.deepcopy(model), copy.deepcopy(model)
    for each, limit, ask in ((model, None, False), (asked, 1e-3, True), (clipped, 1e-3, False)):
        optimizer = optim.SGD(each.parameters(), lr=0.05)
        controller = nmgraph.attach(each, optimizer, total_steps=STEPS)
        loss_of(each, 0).backward()
        if ask:
            controller.update()
            controller.update()  # once a step, however often it is asked
        if limit:
            nn.utils.clip_grad_norm_(each.parameters(), limit)
        optimizer.step()
        assert controller.step == 1
    scores = [nm(each[0]).state.velocity for each in (model, asked, clipped)]
    assert torch.equal(scores[0], scores[1])
    assert scores[0].abs().sum() > 10 * scores[2].abs().sum()


def test_asked_early_a_run_equals_one_that_was_not():
    runs = []
    for ask in (True, False):
        model = network()
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if ask:
                controller.update()
            optimizer.step()
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_step_that_a_scaler_skips_after_it_was_asked_has_never_been():
    model = network("lbc")
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(loss_of(model, 0) * torch.inf).backward()
    scaler.unscale_(optimizer)
    controller.update()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if "total" not in name)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        controller.update()
        scaler.step(optimizer)
        scaler.update()
    assert controller.step == STEPS
    assert all(weight.unfinished() is None for weight in masked_weights(model).values())


@pytest.mark.parametrize("method", ["lbc", "bame", "srste", "bimask", "rigl"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_leaves_masks_and_says_so_once(method, value, caplog):
    model = network(method, **({"interval": 2} if method in ("bimask", "rigl") else {}))
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    controller = nmgraph.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        broken = step in (2, 4)  # those of an interval's update
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        (loss_of(model, step) * (value if broken else 1.0)).backward()
        optimizer.step()
        if broken:
            after = model.state_dict()
            own = [name for name in after if ".nm_" in name and not name.endswith("nm_clock")]
            assert all(torch.equal(before[name], after[name]) for name in own)
            model.load_state_dict({n: before[n] if n.endswith(("weight", "bias")) else after[n] for n in after})
    assert controller.step == STEPS
    assert caplog.messages == ["the gradient is NaN or infinite: masks are left as they are at such steps."]
    assert nmgraph.verify(nmgraph.finalize(model)).holds
