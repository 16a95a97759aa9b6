"""One update of one weight, wherever its parts lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nmgraph.layers.masked import MaskedWeight
from nmgraph.layers.sharding import agreed, is_sharded, local, part_of, whole
from nmgraph.methods.contract import Clock
from nmgraph.nm.grouping import canonical, restore


def update_weight(weight: MaskedWeight, clock: Clock, factor: float | Tensor) -> Tensor | None:
    """Update one weight; ``factor`` times the gradient of the loss is what stands in ``grad``.

    Of a sharded weight each process updates its own part. If the method looks across blocks at this step, the
    weight is gathered for it, and all processes come to the same result.

    Returns:
        bool in the shape of this process's part, which weights begin anew; None if none do.
    """
    raw, told = weight.raw, weight.told
    axis = told.reduction_axis
    across = is_sharded(raw) and told.method.update_looks_across(clock)
    seen = whole if across else local
    w = seen(raw.detach())
    # A layer that took no part in this step has no gradient; its schedule goes on all the same.
    grad = torch.zeros_like(w) if raw.grad is None else _over(seen(raw.grad), factor)
    grad_OSC = canonical(grad, axis)
    state = told.method.state_type(**{name: seen(tensor) for name, tensor in weight.state._asdict().items()})
    update = told.method.update(canonical(w, axis), grad_OSC, state, told.pattern, clock)

    def own_part(like: Tensor, value: Tensor) -> Tensor:
        return part_of(like, value) if across else value

    weight.state = update.state._make(map(own_part, weight.state, update.state))
    if raw.grad is not None and update.grad is not grad_OSC:
        local(raw.grad).copy_(own_part(raw, restore(update.grad, tuple(w.shape), axis) * factor))
    return None if update.restart is None else own_part(raw, restore(update.restart, tuple(w.shape), axis))


def all_finite(weights: Iterable[MaskedWeight]) -> bool:
    """Tell whether no gradient of these weights is NaN or infinite, on any process that has a part of one."""
    raws = [weight.raw for weight in weights]
    if not raws:
        return True
    grads = [local(raw.grad) for raw in raws if raw.grad is not None]
    # One number of each: that of a sum is the quickest to find that an infinity or a NaN cannot leave finite.
    sums = [grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    device = local(raws[0]).device
    broken = torch.stack(
        [torch.zeros((), device=device), *(s.isfinite().logical_not().float().to(device) for s in sums)]
    )
    return not bool(agreed(broken.amax(), [raw for raw in raws if is_sharded(raw)]))


def _over(grad: Tensor, factor: float | Tensor) -> Tensor:
    return grad if isinstance(factor, float) and factor == 1.0 else grad / factor
