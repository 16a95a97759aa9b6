"""Fold masks into weights, and give every layer its own class back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nmgraph.errors import ConversionError, UnfinishedError
from nmgraph.layers.masked import MaskedWeight, masked_weights, unmask_all
from nmgraph.nm.grouping import restore
from nmgraph.nm.masks import check_blocks, magnitude, prune_further
from nmgraph.passes.rewrite import finish

_log = logging.getLogger("nmgraph")

TAKE_MASKS = "The average of a trained model takes that model's masks first: nmgraph.integrations.averages.take_masks(average, model)."


def require_finished(model: nn.Module) -> None:
    """Refuse a model whose masks are not N:M yet.

    Raises:
        UnfinishedError: naming each unfinished layer, with what is missing.
    """
    weights = masked_weights(model)
    _require_values(weights)
    unfinished = {
        name: missing
        for name, weight in weights.items()
        if not (_at_end(weight) or _is_blended(weight)) and (missing := weight.unfinished())
    }
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
        + ("" if step else f" {TAKE_MASKS}")
    )  # fmt: skip


def require_whole_recipes(model: nn.Module) -> None:
    """Refuse a model whose buffers an average has blended.

    Raises:
        ConversionError: naming the first layer.
    """
    for name, weight in masked_weights(model).items():
        if _is_blended(weight):
            raise ConversionError(f"{name}: an average has blended its nm_ buffers. {TAKE_MASKS}")


def _at_end(weight: MaskedWeight) -> bool:
    """Tell whether training is over; in an average what a method counts in floats may lag behind."""
    step, total = weight.clock.tolist()
    return bool(step >= total > 0)


def _is_blended(weight: MaskedWeight) -> bool:
    """Tell whether an average has reached into the buffers, as it shows: bytes of the recipe were rounded, too."""
    return not torch.equal(weight.recipe.cpu(), weight.told.to_tensor())


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


def fold(model: nn.Module, *, blended: bool = False) -> tuple[str, ...]:
    """Make every masked layer ordinary again, in place: exact zeros in its parameter, its own class, no buffers of ours.

    Unfinished masks are brought to their end by what the method knows. What share of the weights' magnitude all masks
    keep is logged; as a warning where an average has blended them.

    Args:
        model: a converted model.
        blended: whether an average may have blended its buffers. Masks that are N:M all the same did not move meanwhile.

    Returns:
        The names of the changed layers.
    """
    weights = masked_weights(model)
    _require_values(weights)
    anew = [name for name, weight in weights.items() if _is_blended(weight) or (blended and weight.unfinished())]
    magnitudes = {}
    for name, weight in weights.items():
        told, raw = weight.told, weight.raw
        with torch.no_grad():
            w_OSC = weight.raw_OSC
            state = _concluded(weight, name in anew)
            folded_OSC = told.method.operand(w_OSC, state, told.pattern).forward
            magnitudes[name] = magnitude(w_OSC * (folded_OSC != 0)), magnitude(w_OSC)
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
    _log_kept(magnitudes, anew)
    unmask_all(model)
    finish(model)
    return tuple(weights)


def _concluded(weight: MaskedWeight, blended: bool) -> Any:
    """Give the state of a weight whose training is over.

    Of a state that an average has blended, floats are averages still, and a mask is all that was ever kept; other
    numbers mean nothing, and are as at conversion.
    """
    told, w_OSC, state = weight.told, weight.raw_OSC, weight.state
    if blended:
        average = {name: t for name, t in state._asdict().items() if t.is_floating_point() or t.dtype == torch.bool}
        state = told.method.init(w_OSC, told.pattern)._replace(**average)
    state = told.method.conclude(w_OSC, state, told.pattern)
    if blended and told.method.unfinished(w_OSC, state, told.pattern):
        state = state._replace(mask=prune_further(w_OSC, state.mask, told.pattern, told.pattern.n))
    return state


def _log_kept(magnitudes: Mapping[str, tuple[float, float]], anew: list[str]) -> None:
    """Say what share of the weights' magnitude the masks keep, and in which layer least."""
    shares = {name: kept / whole if whole else 1.0 for name, (kept, whole) in magnitudes.items()}
    worst = min(shares, key=lambda name: shares[name])
    whole = sum(whole for _, whole in magnitudes.values())
    share = sum(kept for kept, _ in magnitudes.values()) / whole if whole else 1.0
    said = f"masks keep {share:.1%} of the weights' magnitude; least in {worst}, {shares[worst]:.1%}"
    if anew:
        _log.warning(
            "%d layers (%s, ...): an average has blended their nm_ buffers, so their masks were chosen anew; all %s. %s",
            len(anew), anew[0], said, TAKE_MASKS,
        )  # fmt: skip
    else:
        _log.info("the %s", said)
