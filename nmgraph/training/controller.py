"""Hook the methods of a model's layers to an optimizer."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nmgraph.errors import TrainingError
from nmgraph.layers.masked import MaskedWeight, masked_weights
from nmgraph.methods.contract import Clock
from nmgraph.nm.grouping import canonical, restore
from nmgraph.training.optimizer_state import clear_moments

_log = logging.getLogger("nmgraph")


class Controller:
    """Runs every layer's ``update`` once per optimizer step, just before it.

    All state lives in the model's buffers, so there is nothing to save here, and nothing of the optimizer is
    changed. Made by ``nmgraph.attach``; a later one takes the layers over.

    Attributes:
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int) -> None:
        self.total_steps = _count(total_steps)
        self._optimizer = optimizer
        self._weights = _weights_trained_by(optimizer, model)
        self._first = next(iter(self._weights.values()))  # all of them count the same steps
        self._clocks: dict[str, tuple[Tensor, int, int]] = {}  # buffer, its version, the step it holds
        self._fresh = True
        self._take_over()
        for method in {weight.told.method for weight in self._weights.values()}:
            missing = method.too_short(self.total_steps)
            if missing:
                _log.warning("%s in %d steps: %s.", method.name, self.total_steps, missing)
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    @property
    def step(self) -> int:
        """Optimizer steps done so far, those before a resume included."""
        return int(self._first.clock[0])

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps)

    def detach(self) -> None:
        """Stop updating: masks stay as they are, and the optimizer is as it was before ``attach``."""
        self._release(list(self._weights))

    def __repr__(self) -> str:
        return f"Controller({len(self._weights)} sparse layers, step {self.step} of {self.total_steps})"

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
        if not self._weights:
            self._hook.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._update()
            return None
        wrapped = _then_once(closure, self._update)  # this step's gradient does not exist before the closure ran
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    @torch.no_grad()
    def _update(self) -> None:
        # A fused optimizer under GradScaler unscales, and skips, inside its kernel: the gradient here is scaled.
        found_inf = getattr(self._optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        scale = getattr(self._optimizer, "grad_scale", None)
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        moved = [self._read_clock(name, weight) for name, weight in self._weights.items()]
        fresh, self._fresh = self._fresh or any(moved), False
        for name, weight in self._weights.items():
            step, group = self._advance_clock(name, weight), groups.get(id(weight.raw), {"lr": 0.0})
            # What turns the gradient as it stands into that of the loss that goes down.
            factor = (1.0 if scale is None else scale) * (-1.0 if group.get("maximize") else 1.0)
            restart = _update_weight(weight, Clock(step, self.total_steps, group["lr"], fresh), factor)
            if restart is not None:
                weight.raw.masked_fill_(restart, 0.0)
                clear_moments(self._optimizer, weight.raw, restart)

    def _read_clock(self, name: str, weight: MaskedWeight) -> bool:
        """Read a clock again if loading or moving has changed it behind our back; tell whether it had."""
        clock = weight.clock
        known = self._clocks.get(name)
        if known is not None and known[0] is clock and known[1] == clock._version:
            return False
        step, total = clock.tolist()
        if total not in (0, self.total_steps):
            _log.warning(
                "%s was %d of %d steps through its schedule; total_steps is %d now, so it goes on at %.1f%%.",
                name, step, total, self.total_steps, 100 * min(1.0, step / self.total_steps),
            )  # fmt: skip
        clock[1] = self.total_steps
        self._clocks[name] = (clock, clock._version, step)
        return True

    def _advance_clock(self, name: str, weight: MaskedWeight) -> int:
        clock, _, step = self._clocks[name]
        clock[0] += 1
        self._clocks[name] = (clock, clock._version, step + 1)
        return step


def _weights_trained_by(optimizer: Optimizer, model: nn.Module) -> dict[str, MaskedWeight]:
    if not isinstance(model, nn.Module) or not hasattr(optimizer, "register_step_pre_hook"):
        raise TrainingError(
            f"attach takes a model and a torch optimizer, not a {type(model).__name__} and a {type(optimizer).__name__}: "
            "nmgraph.attach(model, optimizer, total_steps=...)."
        )
    weights = masked_weights(model)
    if not weights:
        raise TrainingError(
            f"{type(model).__name__} has no sparse layer. Convert it first: nmgraph.convert(model, method=...)."
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
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


def _update_weight(weight: MaskedWeight, clock: Clock, factor: float | Tensor) -> Tensor | None:
    """Update one weight; ``factor`` times the gradient of the loss is what stands in ``grad``.

    Returns:
        bool in the weight's shape, which weights begin anew; None if none do.
    """
    raw, told = weight.raw, weight.told
    # A layer that took no part in this step has no gradient; its schedule goes on all the same.
    grad = torch.zeros_like(raw) if raw.grad is None else _over(raw.grad, factor)
    grad_OSC = canonical(grad, told.reduction_axis)
    update = told.method.update(weight.raw_OSC, grad_OSC, weight.state, told.pattern, clock)
    weight.state = update.state
    if raw.grad is not None and update.grad is not grad_OSC:
        raw.grad.copy_(restore(update.grad, tuple(raw.shape), told.reduction_axis) * factor)
    return None if update.restart is None else restore(update.restart, tuple(raw.shape), told.reduction_axis)


def _over(grad: Tensor, factor: float | Tensor) -> Tensor:
    return grad if isinstance(factor, float) and factor == 1.0 else grad / factor


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
