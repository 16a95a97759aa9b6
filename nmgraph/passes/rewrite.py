"""Decide what each site becomes, then make it so."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx, nn

from nmgraph.errors import ConversionError, MethodError, PatternError
from nmgraph.layers.masked import Training, sparsify, unmask
from nmgraph.layers.recipe import Recipe
from nmgraph.nm.pattern import Pattern
from nmgraph.passes.eligibility import Refusal, Site, judge
from nmgraph.passes.manifest import Entry, Manifest


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    Attributes:
        method: name of the training method.
        decisions: one per site, in the model's order.
        untraced: what the trace could not follow.
    """

    method: str
    decisions: tuple[Decision, ...]
    untraced: dict[str, str]

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

    def entry(self) -> Entry:
        """Give the manifest's entry."""
        site, refusal = self.site, self.refusal
        return Entry(
            name=site.name,
            kind=site.kind,
            shape=site.shape,
            pattern=str(self.recipe.pattern),
            converted=refusal is None,
            how="in place" if refusal is None else "",
            calls=site.calls,
            reason=refusal.reason if refusal else "",
            remedy=refusal.remedy if refusal else "",
        )


def decide(sites: Sequence[Site], recipe: Recipe, skip: Sequence[str], layers: Mapping[str, Pattern]) -> list[Decision]:
    """Judge every site under the recipe, or under the pattern that ``layers`` gives it.

    Args:
        sites: all sites of the model.
        recipe: method and default pattern.
        skip: globs of sites to leave dense.
        layers: patterns by glob; of several that match, the last one counts.

    Raises:
        ConversionError: for a glob that matches no site.
        PatternError: if a site asked for by its full name does not fit its pattern.
        MethodError: if the method does not support a pattern.
    """
    names = [s.name for s in sites]
    for glob in [*skip, *layers]:
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob.rstrip(".*"), names, n=3, cutoff=0.3) or names[:3]
            inside = [n for n in names if n.startswith(f"{glob}.")]
            hint = f"To name all in it, write {glob}.*" if inside else f"Near: {', '.join(near)}"
            raise ConversionError(f"no layer is named {glob!r}. {hint}")
    decisions = []
    for site in sites:
        globs = [glob for glob in layers if fnmatchcase(site.name, glob)]
        pattern = layers[globs[-1]] if globs else recipe.pattern
        refusal = judge(site, pattern)
        if any(fnmatchcase(site.name, glob) for glob in skip):
            refusal = Refusal("left dense on request", "")
        elif refusal is not None and site.name in layers:
            nothing_fits = site.obstacle is None and not pattern.fitting(site.channels)
            instead = "Leave" if nothing_fits else f"{refusal.remedy[0].upper()}{refusal.remedy[1:]}, or leave"
            raise PatternError(
                f"{site.name}: {refusal.reason}, so it can't become {pattern}. {instead} it dense with --skip {site.name}."
            )
        unsupported = None if refusal else recipe.method.refusal(pattern)
        if unsupported:
            raise MethodError(f"{site.name}: {unsupported}")
        decisions.append(Decision(site, Recipe(recipe.method, pattern), refusal))
    return decisions


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
            f"{type(model).__name__} has no Linear or convolution layer, so there is nothing to make sparse."
        )
    misfits = [d for d in decisions if d.site.obstacle is None and judge(d.site, d.recipe.pattern) is not None]
    if misfits:

        def fitting(d: Decision) -> str:
            fits = d.recipe.pattern.fitting(d.site.channels)
            return f"fits {', '.join(map(str, fits))}" if fits else "fits no usual pattern"

        lines = [f"{d.site.name}: {d.site.channels} input channels ({fitting(d)})" for d in misfits[:8]]
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
        weight = d.site.layer._parameters["weight"] if d.refusal is None and d.site.layer is not None else None
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
    done: list[nn.Module] = []
    try:
        for name, recipe in recipes.items():
            layer = model.get_submodule(name)
            sparsify(layer, name, recipe, training)
            done.append(layer)
    except BaseException:
        for layer in done:
            unmask(layer)  # type: ignore[arg-type]
        raise
    finish(model)
    return tuple(recipes)


def finish(model: nn.Module) -> None:
    """Leave a GraphModule linted and recompiled, as every pass must; other modules have no graph."""
    if isinstance(model, fx.GraphModule):
        model.graph.lint()
        model.recompile()
