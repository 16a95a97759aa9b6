"""Prune one layer at a time, once, by magnitude, and see how much worse the model answers.

What is measured is harm before any training (Sun et al., "DominoSearch: Find Layer-wise Fine-grained N:M Sparse Schemes
from Dense Neural Networks", NeurIPS 2021, choose patterns per layer in that spirit, by another criterion). The model
itself is never changed: every forward runs in a fresh copy of its structure that shares all parameters but the pruned one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from nmgraph.errors import ConversionError, first_line
from nmgraph.layers.recipe import Recipe
from nmgraph.nm.grouping import Axis, canonical, restore_like
from nmgraph.nm.masks import largest
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.eligibility import judge
from nmgraph.passes.rewrite import Decision
from nmgraph.passes.structure import copy_structure, share_parameters

USUAL_PATTERNS = ("2:4", "1:4", "1:8", "1:16")
OWN_LOSS, CROSS_ENTROPY, MOVED = "the model's own loss", "cross entropy", "relative squared error of the answer"


@dataclass(frozen=True)
class SiteHarm:
    """What pruning one site alone does.

    Attributes:
        name: of the site.
        kind: class of the layer, or the function that multiplies by the parameter.
        shape: of the weight.
        axis: its reduction axis, or ``flat``.
        bytes: of the dense weight.
        macs: multiply-accumulate operations with it in one forward; 0 if that does not call it.
        on_request: whether it is only converted if it is included.
        changes: of the loss, by pattern, in the order in which they were asked for.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    axis: Axis
    bytes: int
    macs: int
    on_request: bool
    changes: dict[str, float]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def worst(self) -> float:
        """The largest change."""
        return max(self.changes.values())


@dataclass(frozen=True)
class Sensitivity:
    """How much worse a model answers when one site is pruned, for every site that converts.

    Attributes:
        criterion: what is compared.
        dense: its value for the dense model; 0 for what is relative to the dense answer.
        data: where the inputs come from; ``given``, if their values are not made up.
        macs: multiply-accumulate operations with all weights in one forward, those that stay dense included.
        bytes: of all parameters.
        sites: in the model's order.
    """

    criterion: str
    dense: float
    data: str
    macs: int
    bytes: int
    sites: tuple[SiteHarm, ...]

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns that were tried on some site."""
        return tuple(dict.fromkeys(pattern for site in self.sites for pattern in site.changes))

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    def __str__(self) -> str:
        dense = "" if self.criterion == MOVED else f", {self.dense:.4g} dense"
        return f"one layer pruned at a time, by magnitude, untrained: change of {self.criterion}{dense}"

    def __rich__(self) -> Table:
        table = Table(title=escape(str(self)), title_justify="left", header_style="bold")
        for column in ("site", "shape", "weights", "operations", *self.patterns):
            table.add_column(
                column,
                overflow="fold",
                no_wrap=column != "site",
                justify="left" if column in ("site", "shape") else "right",
            )
        for site in sorted(self.sites, key=lambda site: -site.worst):
            changes = (f"{site.changes[p]:+.3g}" if p in site.changes else "-" for p in self.patterns)
            shape = "x".join(map(str, site.shape))
            operations = f"{site.macs / self.macs:.1%}" if self.macs else "-"
            table.add_row(escape(site.name) or "(root)", shape, f"{site.weights:,}", operations, *changes)
        table.caption_justify = "left"
        table.caption = escape(f"Data: {self.data}. ") + (
            "Harm before training says little of harm after it."
            if self.data == "given"
            else "[yellow]These are no data of the model's own, and tell little: give some (--data FILE)."
        )
        return table


def measure(
    model: nn.Module,
    decisions: Sequence[Decision],
    patterns: Sequence[Pattern],
    run: Callable[[nn.Module], Any],
    *,
    labels: Tensor | None = None,
    data: str = "given",
    progress: Callable[[str], None],
) -> Sensitivity:
    """Prune each site that converts to each pattern in turn, and compare the loss with the dense one.

    A site that none of the patterns fits is tried with the usual ones that do.

    Args:
        model: dense; it is not changed, whatever happens.
        decisions: what ``convert`` would make of every site, at one of the patterns.
        patterns: to try.
        run: calls a model on the data, without gradients.
        labels: of the data, for the cross entropy where the answer has no loss of its own; without them answers are compared.
        data: where the data comes from, in words; ``given`` if its values are not made up.
        progress: called with how many forwards are done.

    Raises:
        ConversionError: if nothing could be pruned, the labels do not fit the answer, or a loss is not finite.
    """
    tried = {d.site.name: (d, list(_fitting(d, patterns))) for d in _candidates(decisions)}
    tried = {name: (d, recipes) for name, (d, recipes) in tried.items() if recipes}
    if not tried:
        raise ConversionError(
            f"{type(model).__name__} has no layer that converts to {', '.join(map(str, patterns))}, so there is nothing to measure. "
            "`nmgraph inspect` says why of each layer."
        )
    total, done = sum(len(recipes) for _, recipes in tried.values()), 0
    answer = _answer(model, run)
    criterion, loss_of = _criterion(answer, labels)
    dense = loss_of(answer)
    _require_finite(dense, "the dense model", criterion)
    sites = []
    for name, (decision, recipes) in tried.items():
        changes = {}
        for recipe in recipes:
            progress(f"measuring: {done} of {total}")
            loss = loss_of(_answer(model, run, decision, recipe))
            _require_finite(loss, f"{name or '(root)'} pruned to {recipe.pattern}", criterion)
            changes[str(recipe.pattern)], done = loss - dense, done + 1
        sites.append(_site(decision, recipes[0], changes))
    macs = {id(d.site.parameter) if d.site.parameter is not None else d.site.name: d.site.macs or 0 for d in decisions}
    size = sum(_bytes(p) for p in model.parameters())
    return Sensitivity(criterion, dense, data, sum(macs.values()), size, tuple(sites))


def _candidates(decisions: Sequence[Decision]) -> Iterator[Decision]:
    """Leave those that convert, or that stay dense because of nothing but their pattern; each parameter once."""
    seen: set[int] = set()
    for d in decisions:
        if d.refusal in (None, judge(d.site, d.recipe)) and id(d.site.parameter) not in seen:
            seen.add(id(d.site.parameter))
            yield d


def _fitting(decision: Decision, patterns: Sequence[Pattern]) -> Iterator[Recipe]:
    """List what a site may become."""
    site, told = decision.site, decision.recipe
    fits = [p for p in patterns if p.divides(decision.length)] or told.pattern.fitting(decision.length)
    for recipe in (replace(told, pattern=p) for p in fits):
        refusal = judge(site, recipe, included=decision.refusal is None)
        if refusal is None and told.method.refusal(recipe.pattern) is None:
            yield recipe


def _answer(
    model: nn.Module, run: Callable[[nn.Module], Any], decision: Decision | None = None, recipe: Recipe | None = None
) -> Any:
    """Run a copy in evaluation mode, with one parameter pruned wherever it is held; draws are the same each time."""
    weight = None if decision is None else decision.site.parameter
    pruned = None if weight is None or recipe is None else _pruned(weight, recipe)

    def become(tensor: Tensor) -> Tensor:
        return pruned if pruned is not None and tensor is weight else share_parameters(tensor)

    copy = copy_structure(model, become).eval()
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return run(copy)


def _pruned(weight: nn.Parameter, recipe: Recipe) -> nn.Parameter:
    w_OSC = canonical(weight.detach(), recipe.reduction_axis)
    kept = restore_like(weight, largest(w_OSC, recipe.pattern), recipe.reduction_axis)
    return nn.Parameter(kept, requires_grad=weight.requires_grad)


def _criterion(dense_answer: Any, labels: Tensor | None) -> tuple[str, Callable[[Any], float]]:
    """Choose what to compare: a loss of the model's own, the cross entropy, or the answer itself."""
    if labels is None:
        return MOVED, _moved_from(_floating(dense_answer))
    if _field(dense_answer, "loss") is not None:
        return OWN_LOSS, _own_loss
    return CROSS_ENTROPY, lambda answer: _cross_entropy(answer, labels)


def _own_loss(answer: Any) -> float:
    loss = _field(answer, "loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
        raise ConversionError(
            f"the loss of the model's answer has the {what}, and has to be one number. Leave the labels away: its answers are "
            "compared then."
        )
    return float(loss)


def _cross_entropy(answer: Any, labels: Tensor) -> float:
    logits = _field(answer, "logits")
    logits = answer if logits is None else logits
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ConversionError(
            f"the model answers with a {type(logits).__name__}, which holds no logits for the labels. Leave the labels away: "
            "its answers are compared then."
        )
    try:
        return float(F.cross_entropy(logits.float(), labels.to(logits.device)))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConversionError(
            f"labels of the shape {list(labels.shape)} ({labels.dtype}) do not fit an answer of the shape {list(logits.shape)}: "
            f"{first_line(error).rstrip('.')}. Give one whole number below {logits.shape[min(1, logits.dim() - 1)] if logits.dim() else 0} for "
            "each prediction, or leave the labels away."
        ) from error


def _moved_from(dense: list[Tensor]) -> Callable[[Any], float]:
    whole = sum(float(t.double().square().sum()) for t in dense)
    if not whole:
        what = "only zeros" if dense else "no floating-point tensor"
        raise ConversionError(
            f"the dense model answers with {what}, from which nothing can move. Give other data, or labels and a model with logits."
        )

    def moved(answer: Any) -> float:
        found = _floating(answer)
        if [t.shape for t in found] != [t.shape for t in dense]:
            raise ConversionError(
                "the model answers with other shapes once a layer is pruned, so that answers can't be compared. Give labels."
            )
        return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, dense, strict=True)) / whole

    return moved


def _floating(answer: Any) -> list[Tensor]:
    return [t for t in tree_leaves(answer) if isinstance(t, Tensor) and t.is_floating_point()]


def _field(answer: Any, name: str) -> Any:
    return answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)


def _require_finite(loss: float, of: str, criterion: str) -> None:
    if not math.isfinite(loss):
        raise ConversionError(
            f"{of}: {criterion} is {loss}. Give data that is scaled as the model expects it, or measure in float32 (model.float())."
        )


def _site(decision: Decision, recipe: Recipe, changes: dict[str, float]) -> SiteHarm:
    site = decision.site
    assert site.parameter is not None
    return SiteHarm(
        site.name, site.kind, site.shape, recipe.reduction_axis, _bytes(site.parameter), site.macs or 0,
        site.default is not None, changes,
    )  # fmt: skip


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()
