"""Hook the methods of a model's layers to an optimizer."""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from nmgraph.errors import TrainingError
from nmgraph.layers.hardware import follow
from nmgraph.layers.masked import MaskedWeight, masked_weights
from nmgraph.layers.sharding import local, reshard
from nmgraph.methods.contract import Clock
from nmgraph.training.optimizer_state import clear_moments
from nmgraph.training.ranks import require_equal_ranks
from nmgraph.training.step import all_finite, update_weight
from nmgraph.training.wrapped_optimizers import chain_of

_log = logging.getLogger("nmgraph")

_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()  # one hook for all, which keeps none alive


class Controller:
    """Runs every layer's ``update`` once per optimizer step, just before it.

    All state lives in the model's buffers, so there is nothing to save here, and nothing of the optimizer is
    changed. Made by ``nmgraph.attach``; a later one takes the layers over.

    Attributes:
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        self.total_steps = _count(total_steps)
        self._optimizers = _optimizers_in(optimizer, model)
        reshard(model)
        self._weights = _weights_trained_by(self._optimizers, model)
        self._first = next(iter(self._weights.values()))  # all of them count the same steps
        self._clocks: dict[str, tuple[Tensor, int, int]] = {}  # buffer, its version, the step it holds
        self._fresh, self._updated = True, False
        self._frozen: set[str] = set()
        self._said: set[str] = set()
        for weight in self._weights.values():
            weight.shard_state()
        self._take_over()
        for method in {weight.told.method for weight in self._weights.values()}:
            missing = method.too_short(self.total_steps)
            if missing:
                _log.warning("%s in %d steps: %s.", method.name, self.total_steps, missing)
        self._follow_masks()
        self._hook = self._optimizers[-1].register_step_pre_hook(self._before_step)
        self._looked_at: weakref.WeakSet[Optimizer] = weakref.WeakSet(self._optimizers)
        _watch_all_optimizers()
        _controllers.add(self)

    @property
    def step(self) -> int:
        """Optimizer steps done so far, those before a resume included."""
        return int(self._first.clock[0])

    @property
    def weights(self) -> dict[str, MaskedWeight]:
        """The weights that it updates, by site."""
        return dict(self._weights)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps)

    def update(self) -> None:
        """Do what belongs to the coming step now, instead of in ``optimizer.step``.

        To be called where gradients are clipped: after ``scaler.unscale_(optimizer)``, and before
        ``clip_grad_norm_``. Criteria that look at gradients then see them unclipped.
        """
        if not self._updated:
            self._updated = self._update()

    def check_ranks(self, group: Any = None) -> None:
        """Make sure that all processes have the same masks and the same schedule. All of them have to call it.

        Args:
            group: of ``torch.distributed``, those that train the same model; by default all processes.

        Raises:
            TrainingError: naming the first layer that differs, and where.
        """
        require_equal_ranks(self._weights, group)

    def observe(self, callback: Callable[[int], None]) -> RemovableHandle:
        """Call back after every step of the optimizer in which the layers took theirs, with the number of steps done."""
        seen = self._steps_done

        def after_step(*_: Any) -> None:
            nonlocal seen
            if self._steps_done != seen:
                seen = self._steps_done
                callback(seen)

        return self._optimizers[-1].register_step_post_hook(after_step)

    def detach(self) -> None:
        """Stop updating: masks stay as they are, and the optimizer is as it was before ``attach``."""
        self._release(list(self._weights))

    def __repr__(self) -> str:
        return f"Controller({len(self._weights)} sparse layers, step {self.step} of {self.total_steps})"

    @property
    def _steps_done(self) -> int:
        """The same as ``step``, without a look at the device."""
        return next((step for _, _, step in self._clocks.values()), 0)

    def _take_over(self) -> None:
        for name, weight in self._weights.items():
            previous = weight.training.attached.get(weight.site)
            if isinstance(previous, Controller):
                previous._release([n for n, own in previous._weights.items() if own == weight])
            weight.training.attached[weight.site] = self
            self._read_clock(name, weight)

    def _release(self, names: Iterable[str]) -> None:
        for name in names:
            weight = self._weights.pop(name)
            del weight.training.attached[weight.site]
            follow(weight, claimed=False)
        if not self._weights:
            self._hook.remove()
            _controllers.discard(self)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._take_step()
            return None
        # This step's gradient does not exist before the closure ran.
        wrapped = _then_once(self._anew(closure), self._take_step)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _anew(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Let a closure multiply by weights as they are: between two calls an optimizer may write where nothing counts it."""

        def wrapped() -> Any:
            for weight in self._weights.values():
                if weight.hardware is not None:
                    weight.hardware.forget()
            return closure()

        return wrapped

    @torch.no_grad()
    def _take_step(self) -> None:
        # A fused optimizer under GradScaler unscales, and skips, inside its kernel: the gradient here is scaled.
        if any(bool(found) for found in self._told_by_scaler("found_inf")):
            return
        if not self._updated and not self._update():
            self._say("the gradient is NaN or infinite: masks are left as they are at such steps.")
        self._updated = False
        for name, weight in self._weights.items():
            self._fresh |= self._read_clock(name, weight)
            weight.clock[0] += 1
            clock, _, step = self._clocks[name]
            self._clocks[name] = (clock, clock._version, step + 1)
        self._follow_masks()

    def _follow_masks(self) -> None:
        """Let products run on sparse tensor cores once methods say that their masks are N:M."""
        claimed: dict[tuple[Any, ...], bool] = {}
        for name, weight in self._weights.items():
            if weight.hardware is None:
                continue
            told, step = weight.told, self._clocks[name][2]
            kind = told.method, told.pattern, step
            if kind not in claimed:
                work = told.method.work(told.pattern, Clock(step, self.total_steps, 0.0))
                # Shares that are sums of many come out a bit above what they mean.
                claimed[kind] = work.forward <= told.pattern.density * (1 + 1e-9)
            follow(weight, claimed[kind])

    @torch.no_grad()
    def _update(self) -> bool:
        """Update all weights; tell whether the gradient allowed for it."""
        moved = [self._read_clock(name, weight) for name, weight in self._weights.items()]
        self._fresh = self._fresh or any(moved)
        if not all_finite(self._weights.values()):
            self._fresh = True  # what has been left out is made up for
            return False
        scale = next(iter(self._told_by_scaler("grad_scale")), 1.0)
        # An outer optimizer has all groups; those inside ZeroRedundancyOptimizer hold what this process steps.
        groups = {id(p): group for o in reversed(self._optimizers) for group in o.param_groups for p in group["params"]}
        for name, weight in self._weights.items():
            if weight.raw.requires_grad:
                self._update_weight(name, weight, groups.get(id(weight.raw)), scale)
                self._frozen.discard(name)
            else:
                self._frozen.add(name)  # its mask stands, too; what it has missed is made up for later
        self._fresh = False
        return True

    def _update_weight(self, name: str, weight: MaskedWeight, group: dict[str, Any] | None, scale: Any) -> None:
        if group is None:
            self._say(
                f"{name}: the optimizer does not hold its weight any more, which was replaced after attach. Make the "
                "optimizer from the model as it is now, and attach again."
            )
            weight.shard_state()
            group = {"lr": 0.0}
        clock = Clock(self._clocks[name][2], self.total_steps, group["lr"], self._fresh or name in self._frozen)
        # What turns the gradient as it stands into that of the loss that goes down.
        restart = update_weight(weight, clock, scale * (-1.0 if group.get("maximize") else 1.0))
        if restart is not None:
            local(weight.raw).masked_fill_(restart, 0.0)
            self._say_left(name, clear_moments(self._optimizers, weight.raw, restart))

    def _told_by_scaler(self, name: str) -> list[Any]:
        told = (getattr(optimizer, name, None) for optimizer in self._optimizers)
        return [value for value in told if value is not None]

    def _read_clock(self, name: str, weight: MaskedWeight) -> bool:
        """Read a clock again if loading or moving has changed it behind our back; tell whether it had."""
        clock = weight.clock
        known = self._clocks.get(name)
        if known is not None and known[0] is clock and known[1] == clock._version:
            return False
        step, total = clock.tolist()
        same = known is not None and known[2] == step and total == self.total_steps  # DDP sends buffers round
        if total not in (0, self.total_steps):
            _log.warning(
                "%s was %d of %d steps through its schedule; total_steps is %d now, so it goes on at %.1f%%.",
                name, step, total, self.total_steps, 100 * min(1.0, step / self.total_steps),
            )  # fmt: skip
        clock[1] = self.total_steps
        self._clocks[name] = (clock, clock._version, step)
        return not same

    def _say(self, message: str) -> None:
        """Warn, once."""
        if message not in self._said:
            self._said.add(message)
            _log.warning("%s", message)

    def _say_left(self, name: str, moments: list[str] | None) -> None:
        kind = type(self._optimizers[-1])
        if moments:
            self._say(
                f"{kind.__name__} keeps {', '.join(moments)} encoded, or for several weights at once: of weights that begin "
                "anew they are not cleared."
            )
        elif moments is None and self._clocks[name][2] and not kind.__module__.startswith("torch.optim"):
            self._say(
                f"{kind.__name__} has no state of {name} where torch's optimizers have it: if it keeps moments elsewhere, "
                "those of weights that begin anew are not cleared."
            )

    def _notice(self, optimizer: Optimizer) -> None:
        """Warn if another optimizer steps a weight of ours."""
        if optimizer in self._looked_at:
            return
        self._looked_at.add(optimizer)
        ours = {id(weight.raw): name for name, weight in self._weights.items()}
        taken = next((ours[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in ours), None)
        if taken is not None:
            self._say(
                f"{taken}: its weight is stepped by a {type(optimizer).__name__} that is not the optimizer attached, so its "
                "masks are not updated. Attach again: nmgraph.attach(model, optimizer, total_steps=...)."
            )


@cache
def _watch_all_optimizers() -> None:
    register_optimizer_step_pre_hook(_notice)


def _notice(optimizer: Optimizer, *_: Any) -> None:
    for controller in list(_controllers):
        controller._notice(optimizer)


def _optimizers_in(optimizer: Any, model: Any) -> list[Optimizer]:
    if isinstance(optimizer, Optimizer) and isinstance(model, nn.Module):
        return chain_of(optimizer)
    raise TrainingError(
        f"attach takes a model and a torch optimizer, not a {type(model).__name__} and a {type(optimizer).__name__}: "
        "nmgraph.attach(model, optimizer, total_steps=...)."
    )


def _weights_trained_by(optimizers: list[Optimizer], model: nn.Module) -> dict[str, MaskedWeight]:
    weights = masked_weights(model)
    if not weights:
        raise TrainingError(
            f"{type(model).__name__} has no sparse layer. Convert it first: nmgraph.convert(model, method=...)."
        )
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    held = {name: weight for name, weight in weights.items() if id(weight.raw) in trained}
    if not held:
        raise TrainingError(
            f"the optimizer trains none of the {len(weights)} sparse weights ({next(iter(weights))}, ...). "
            "Make it from the parameters() of this very model."
        )
    others = [name for name in weights if name not in held]
    if others:
        _log.warning(
            "%d sparse layers are not trained by this optimizer, and keep their masks unless another one is attached: %s",
            len(others), ", ".join(others[:4]),
        )  # fmt: skip
    return held


def _count(total_steps: Any) -> int:
    try:
        count = 0 if isinstance(total_steps, bool) else operator.index(total_steps)
    except TypeError:
        count = 0
    if count < 1:
        raise TrainingError(
            f"total_steps={total_steps!r} must be the number of optimizer steps of the whole run: 1 or more."
        )
    return count


def _then_once(closure: Callable[[], Any], action: Callable[[], None]) -> Callable[[], Any]:
    """Call the closure, and after its first call the action: some optimizers evaluate it many times a step."""
    pending = True

    def wrapped() -> Any:
        nonlocal pending
        loss = closure()
        if pending:
            pending = False
            action()
        return loss

    return wrapped
