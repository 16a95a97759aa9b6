"""Decide what each site becomes, then make it so."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import fx, nn

from nmgraph.errors import ConversionError, MethodError, PatternError
from nmgraph.layers.masked import Training, follow, masked_modules, sparsify, unmask
from nmgraph.layers.recipe import Recipe
from nmgraph.methods.asp import ASP
from nmgraph.nm.grouping import FLAT
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.eligibility import Site, judge
from nmgraph.passes.manifest import Entry, Manifest
from nmgraph.passes.refusals import Refusal
from nmgraph.passes.structure import owner_of
from nmgraph.passes.trace import Uses

ENDS = ("stem", "head")


@dataclass(frozen=True)
class Selection:
    """Which sites become what.

    Attributes:
        skip: globs of sites to leave dense.
        include: globs of sites to convert that are left dense by default: grouped, frozen or shared ones.
        layers: patterns by glob; of several that match, the last one counts.
        keep_dense: ``stem`` and ``head``, the layers at the model's ends, to leave dense.
        block_axis: ``channels``, blocks run along input channels, or ``flat``, along the kernel window and then
            over channels.

    Raises:
        ConversionError: for another word.
    """

    skip: Sequence[str] = ()
    include: Sequence[str] = ()
    layers: Mapping[str, Pattern] = field(default_factory=dict)
    keep_dense: Sequence[str] = ()
    block_axis: str = "channels"

    def __post_init__(self) -> None:
        for end in self.keep_dense:
            if end not in ENDS:
                raise ConversionError(f"keep_dense knows stem and head, not {end!r}. Name other layers with skip.")
        if self.block_axis not in ("channels", FLAT):
            raise ConversionError(f"there is no block axis {self.block_axis!r}. Use channels, or flat.")


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
        method: name of the training method.
        decisions: one per site, in the model's order.
        untraced: what the trace could not follow.
        calls: how often a run called each module, where there was one.
    """

    method: str
    decisions: tuple[Decision, ...]
    untraced: dict[str, str]
    calls: Mapping[str, int] | None = None

    @property
    def recipes(self) -> dict[str, Recipe]:
        """What the sites to convert become, by name."""
        return {d.site.name: d.recipe for d in self.decisions if d.refusal is None}

    def manifest(self, inputs: tuple[tuple[tuple[int, ...], str, str], ...] = ()) -> Manifest:
        """Give the record of it."""
        return Manifest(self.method, tuple(d.entry() for d in self.decisions), inputs, self.untraced)


@dataclass(frozen=True)
class Decision:
    """What one site shall be: converted by the recipe, or left dense because of the refusal."""

    site: Site
    recipe: Recipe
    refusal: Refusal | None

    @property
    def length(self) -> int:
        """Give the length of its reduction axis."""
        return self.site.length(self.recipe.reduction_axis)

    def entry(self) -> Entry:
        """Give the manifest's entry."""
        site, refusal = self.site, self.refusal
        return Entry(
            name=site.name,
            kind=site.kind,
            shape=site.shape,
            pattern=str(self.recipe.pattern),
            converted=refusal is None,
            how=self._how() if refusal is None else "",
            axis=self.recipe.reduction_axis,
            fits=tuple(map(str, self.recipe.pattern.fitting(self.length))),
            calls=site.calls,
            macs=site.macs,
            reason=refusal.reason if refusal else "",
            remedy=refusal.remedy if refusal else "",
        )

    def _how(self) -> str:
        if self.site.parameter is not None and not self.site.parameter.requires_grad:
            return "in place; frozen, so its mask by magnitude is fixed"
        if self.recipe.method.splits_backward and not self.site.is_layer:
            return "in place; the input gradient uses the forward mask"
        if self.recipe.method.splits_backward and self.site.read_by:
            return f"in place; where {self.site.read_by} reads its weight, the input gradient uses the forward mask"
        return "in place"


def decide(sites: Sequence[Site], uses: Uses, recipe: Recipe, selection: Selection) -> list[Decision]:
    """Judge every site under the recipe, or under the pattern that the selection gives it.

    Args:
        sites: all sites of the model.
        uses: how they are used.
        recipe: method and default pattern.
        selection: which of them become what.

    Raises:
        ConversionError: for a glob that matches no site.
        PatternError: if a site asked for by its full name does not fit its pattern.
        MethodError: if the method does not support a pattern.
    """
    names = [s.name for s in sites]
    for glob in [*selection.skip, *selection.include, *selection.layers]:
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob.rstrip(".*"), names, n=3, cutoff=0.3) or names[:3]
            inside = [n for n in names if n.startswith(f"{glob}.")]
            hint = f"To name all in it, write {glob}.*" if inside else f"Near: {', '.join(near)}"
            raise ConversionError(f"no layer is named {glob!r}. {hint}")
    ends = {end: getattr(uses, end) for end in selection.keep_dense}
    return _each_parameter_once([_decide(site, ends, recipe, selection) for site in sites])


def _decide(site: Site, ends: Mapping[str, Sequence[str]], recipe: Recipe, selection: Selection) -> Decision:
    globs = [glob for glob in selection.layers if fnmatchcase(site.name, glob)]
    pattern = selection.layers[globs[-1]] if globs else recipe.pattern
    frozen = site.parameter is not None and not site.parameter.requires_grad
    recipe = Recipe(ASP() if frozen else recipe.method, pattern, site.axis_for(selection.block_axis))
    included = site.name in selection.layers or any(fnmatchcase(site.name, glob) for glob in selection.include)
    refusal = judge(site, recipe, included=included)
    end = next((end for end, names in ends.items() if site.name in names), None)
    if any(fnmatchcase(site.name, glob) for glob in selection.skip):
        refusal = Refusal("left dense on request", "")
    elif site.name in selection.layers:  # asked for by its full name
        if refusal is not None:
            nothing_fits = site.obstacle is None and not pattern.fitting(site.length(recipe.reduction_axis))
            instead = "Leave" if nothing_fits else f"{refusal.remedy[0].upper()}{refusal.remedy[1:]}, or leave"
            raise PatternError(
                f"{site.name}: {refusal.reason}, so it can't become {pattern}. {instead} it dense with --skip {site.name}."
            )
    elif end is not None:
        refusal = Refusal(f"left dense as the model's {end}", "")
    unsupported = None if refusal else recipe.method.refusal(pattern)
    if unsupported:
        raise MethodError(f"{site.name}: {unsupported}")
    return Decision(site, recipe, refusal)


def _each_parameter_once(decisions: list[Decision]) -> list[Decision]:
    """Of the converted sites that share a parameter, leave the first; the others are masked with it."""
    first: dict[int, str] = {}
    apart = []
    for d in decisions:
        if d.refusal is None and first.setdefault(id(d.site.parameter), d.site.name) != d.site.name:
            d = replace(
                d, refusal=Refusal(f"its weight is that of {first[id(d.site.parameter)]}, and masked there", "")
            )
        apart.append(d)
    return apart


def restrict(decisions: Sequence[Decision], graph_module: nn.Module) -> Iterator[Decision]:
    """Leave of the decisions on a model those on its graph: modules that no node calls are not in it."""
    reached = dict(graph_module.named_modules())
    for d in decisions:
        path = d.site.name if d.site.key == "weight" else d.site.name.rpartition(".")[0]
        called = path in reached and path != "" and isinstance(reached[path], type(d.site.module))
        if d.refusal is None and not called and not d.site.is_layer:
            d = replace(d, refusal=Refusal("the graph multiplies by this parameter itself", 'use mode="auto"'))
        if d.refusal is not None or called:
            yield d


def require_some(decisions: Sequence[Decision], model: nn.Module) -> None:
    """Refuse a conversion that would convert nothing.

    Raises:
        ConversionError: if the model has no site that could be pruned at all.
        PatternError: if sites are dense only because of the pattern; says which, and which M would fit.
    """
    if any(d.refusal is None for d in decisions):
        return
    if not decisions:
        raise ConversionError(
            f"{type(model).__name__} has no weight that multiplies its input, so there is nothing to make sparse."
        )
    misfits = [
        d for d in decisions if not (d.site.obstacle or d.site.default) and not d.recipe.pattern.divides(d.length)
    ]
    if misfits:

        def fitting(d: Decision) -> str:
            fits = d.recipe.pattern.fitting(d.length)
            return f"fits {', '.join(map(str, fits))}" if fits else "fits no usual pattern"

        lines = [
            f"{d.site.name}: {d.length} {'flat weights' if d.recipe.reduction_axis == FLAT else 'input channels'} ({fitting(d)})"
            for d in misfits[:8]
        ]
        more = f"\n  and {len(misfits) - 8} more" if len(misfits) > 8 else ""
        raise PatternError(
            f"the pattern {misfits[0].recipe.pattern} divides no layer of {type(model).__name__}:\n  "
            + "\n  ".join(lines) + more + "\nChoose a pattern that fits with --pattern."
        )  # fmt: skip
    lines = [f"{d.site.name}: {d.refusal.reason}" for d in decisions[:8] if d.refusal]
    raise ConversionError(f"no layer of {type(model).__name__} can be converted:\n  " + "\n  ".join(lines))


def require_finite(decisions: Sequence[Decision]) -> None:
    """Refuse weights whose magnitudes cannot be ranked.

    Raises:
        ConversionError: naming the first layer with a NaN or an infinity.
    """
    for d in decisions:
        weight = d.site.parameter if d.refusal is None else None
        if weight is None or weight.is_meta:
            continue
        extremes = torch.stack(torch.aminmax(weight.detach()))  # NaN is passed on; cheaper than asking every weight
        if not bool(torch.isfinite(extremes).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise ConversionError(
                f"{d.site.name}: {bad} of {weight.numel()} weights are NaN or infinite. Start from a checkpoint taken "
                f"before training diverged, or leave the layer dense with --skip {d.site.name}."
            )


def rewrite(model: nn.Module, recipes: Mapping[str, Recipe]) -> tuple[str, ...]:
    """Make the named sites sparse-trainable, in place; all of them or, on an error, none.

    Args:
        model: a module, or a GraphModule.
        recipes: what each site becomes, by qualified name.

    Returns:
        The names of the changed sites.
    """
    training = Training()
    before = set(masked_modules(model))
    sharers = _sharers(model)
    try:
        for name, recipe in recipes.items():
            module, key = owner_of(model, name)
            weight = sparsify(module, key, name, recipe, training)
            for other, its_key in sharers[id(weight.raw)]:
                if other is not module:
                    follow(other, its_key, weight)
    except BaseException:
        for module in set(masked_modules(model)) - before:
            unmask(module)
        raise
    finish(model)
    return tuple(recipes)


def _sharers(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Find who holds each parameter, by its id."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            found[id(parameter)].append((module, key))
    return found


def finish(model: nn.Module) -> None:
    """Leave a GraphModule linted and recompiled, as every pass must; other modules have no graph."""
    if isinstance(model, fx.GraphModule):
        model.graph.lint()
        model.recompile()
