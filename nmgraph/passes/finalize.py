"""Fold masks into weights, and give every layer its own class back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nmgraph.errors import ConversionError, UnfinishedError
from nmgraph.layers.masked import MaskedWeight, masked_weights, unmask_all
from nmgraph.nm.grouping import restore
from nmgraph.nm.masks import check_blocks
from nmgraph.passes.rewrite import finish


def require_finished(model: nn.Module) -> None:
    """Refuse a model whose masks are not N:M yet.

    Raises:
        UnfinishedError: naming each unfinished layer, with what is missing.
    """
    weights = masked_weights(model)
    _require_values(weights)
    for name, weight in weights.items():
        if not torch.equal(weight.recipe.cpu(), weight.told.to_tensor()):
            raise UnfinishedError(
                f"{name}: its nm_ buffers were changed from outside. A model's average has to leave buffers alone: "
                "AveragedModel(model, use_buffers=False)."
            )
    unfinished = {name: missing for name, weight in weights.items() if (missing := weight.unfinished())}
    if not unfinished:
        return
    name = next(iter(unfinished))
    step, total = weights[name].clock.tolist()
    others = any(int(other.clock[1]) for other in weights.values())
    never = "the attached optimizer does not train its weight" if others else "it was never trained with attach"
    where = f"{step:,} of {total:,} steps are done" if total else never
    shown = [f"{n}: {missing}" for n, missing in list(unfinished.items())[:4]]
    more = f"\n  and {len(unfinished) - 4} more layers" if len(unfinished) > 4 else ""
    raise UnfinishedError(
        f"{len(unfinished)} layers are not N:M yet ({weights[name].told}; {where}):\n  " + "\n  ".join(shown) + more
        + "\nTrain to the end, or use --force (force=True) to prune now by what the method knows."
    )  # fmt: skip


def _require_values(weights: Mapping[str, MaskedWeight]) -> None:
    """Refuse a model without values.

    Raises:
        ConversionError: naming the first weight on the meta device.
    """
    for name, weight in weights.items():
        if weight.raw.is_meta:
            raise ConversionError(
                f"{name} is on the meta device, where weights have no values. Load a checkpoint first: "
                "model.load_state_dict(state, assign=True)."
            )


def fold(model: nn.Module) -> tuple[str, ...]:
    """Make every masked layer ordinary again, in place: exact zeros in its parameter, its own class, no buffers of ours.

    Unfinished masks are brought to their end by what the method knows.

    Returns:
        The names of the changed layers.
    """
    weights = masked_weights(model)
    _require_values(weights)
    for name, weight in weights.items():
        told, raw = weight.told, weight.raw
        with torch.no_grad():
            w_OSC = weight.raw_OSC
            state = told.method.conclude(w_OSC, weight.state, told.pattern)
            folded_OSC = told.method.operand(w_OSC, state, told.pattern).forward
            # + 0.0 turns a negative zero into a plain one.
            raw.copy_(restore(folded_OSC, tuple(raw.shape), told.reduction_axis) + 0.0)
            check = check_blocks(weight.raw_OSC, told.pattern)
        if not bool(torch.isfinite(raw.detach()).all()):
            raise ConversionError(
                f"{name}: the trained weights are NaN or infinite, so there is nothing to finalize. Go back to a "
                "checkpoint taken before training diverged."
            )
        if not check.holds:
            raise UnfinishedError(
                f"{name}: block {check.worst} keeps {check.worst_count}, {told.pattern} allows {told.pattern.n}."
            )
    unmask_all(model)
    finish(model)
    return tuple(weights)
