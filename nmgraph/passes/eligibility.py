"""Find the sites of a model and judge each. Nothing is changed here: a refusal is a value with a reason."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from nmgraph.layers.kinds import has_own_forward, is_layer, is_transposed_convolution, layer_axis
from nmgraph.layers.masked import site_name
from nmgraph.layers.recipe import Recipe
from nmgraph.nm.grouping import FLAT, Axis
from nmgraph.passes.products import LOOKUP, Use
from nmgraph.passes.refusals import QUANTIZATION, Refusal, Surroundings, grouped, layer_obstacle, weight_obstacle
from nmgraph.passes.trace import Uses

_ATTENTION_KEYS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CELL_KEYS = ("weight_ih", "weight_hh")
_EXPERT_KEYS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_CELL_FORWARDS = (nn.RNNCell.forward, nn.LSTMCell.forward, nn.GRUCell.forward)
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.quantizable")


@dataclass(frozen=True)
class Site:
    """One place that holds a prunable weight.

    Attributes:
        name: its qualified name: that of the parameter, with a final ``.weight`` left away.
        kind: class of the module, or the function that multiplies by the parameter.
        shape: of the weight.
        module: which holds it, where that is known.
        key: name of the parameter in the module.
        axis: its reduction axis.
        groups: of a transposed convolution, which divide its reduction axis.
        calls: how often one forward calls it, where known.
        macs: multiply-accumulate operations with it in one forward, where known.
        obstacle: what forbids its conversion whatever the pattern.
        default: why it is converted only on request.
        read_by: what multiplies by the layer's weight without calling the layer, where known.
        bare: whether a forward multiplies by the parameter itself, in a module of no known kind.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    module: nn.Module | None = None
    key: str = "weight"
    axis: Axis = 1
    groups: int = 1
    calls: int | None = None
    macs: int | None = None
    obstacle: Refusal | None = None
    default: Refusal | None = None
    read_by: str = ""
    bare: bool = False

    @property
    def parameter(self) -> nn.Parameter | None:
        """The weight, where it is an ordinary parameter."""
        return None if self.module is None else self.module._parameters.get(self.key)

    @property
    def is_layer(self) -> bool:
        """Tell whether it is the weight of a layer of a known kind."""
        return self.module is not None and self.key == "weight" and is_layer(self.module)

    def axis_for(self, block_axis: str) -> Axis:
        """Give the reduction axis: ``flat`` is another one only where there is a kernel larger than 1."""
        has_kernel = self.is_layer and self.axis == 1 and math.prod(self.shape[2:]) > 1
        return FLAT if block_axis == FLAT and has_kernel else self.axis

    def length(self, axis: Axis) -> int:
        """Give the length of the reduction axis, of one group."""
        if len(self.shape) < 2:
            return 0
        return math.prod(self.shape[1:]) if axis == FLAT else self.shape[axis] // self.groups


def find_sites(model: nn.Module, uses: Uses) -> list[Site]:
    """List every linear- or conv-like site once, in the model's order."""
    around = Surroundings.of(model)
    products: dict[str, list[Use]] = defaultdict(list)
    for use in uses.products:
        products[use.parameter].append(use)
    found = [
        replace(site, calls=uses.calls.get(path), macs=uses.macs.get(f"{path}.{site.key}".lstrip(".")))
        for path, module in model.named_modules()
        for site in _sites_of(path, module, around, products)
    ]
    names = {site.name for site in found}
    unknown = (_unknown(name, model) for name in uses.unfollowed)
    return _with_shared_axes(found + [site for site in unknown if site is not None and site.name not in names])


def judge(site: Site, recipe: Recipe, *, included: bool = False) -> Refusal | None:
    """Say why the site cannot be converted by the recipe; None if it can.

    Args:
        site: any.
        recipe: what it would be.
        included: asked for, though it is left dense by default.
    """
    if site.obstacle is not None:
        return site.obstacle
    length, pattern = site.length(recipe.reduction_axis), recipe.pattern
    if site.default is not None and not included:
        return site.default
    if not pattern.divides(length):
        what = "flat weight" if recipe.reduction_axis == FLAT else "input channel"
        fits = pattern.fitting(length)
        remedy = f"choose {fits[0]} for it" if fits else "no usual pattern fits"
        return Refusal(pattern.misfit(length, "input feature" if len(site.shape) == 2 else what), remedy)
    if (
        recipe.method.splits_backward
        and site.is_layer
        and site.module is not None
        and has_own_forward(type(site.module))
    ):
        return Refusal(
            f"{type(site.module).__name__} has a forward of its own, which takes no backward mask",
            "choose a method without one, such as srste",
        )
    return None


def _sites_of(path: str, module: nn.Module, around: Surroundings, products: Mapping[str, list[Use]]) -> Iterator[Site]:
    """List the sites that a module itself holds: of its kind, then those that a forward multiplies by."""
    kind = type(module).__name__
    if type(module).__module__.startswith(_QUANTIZED) and callable(getattr(module, "weight", None)):
        yield Site(path, kind, tuple(module.weight().shape), obstacle=QUANTIZATION)  # type: ignore[operator]
        return
    if is_layer(module):
        yield _layer_site(path, module, around, products.get(f"{path}.weight".lstrip("."), []))
    known = dict(_known_parameters(module))
    for key, weight in module._parameters.items():
        if weight is None or (key == "weight" and is_layer(module)):
            continue
        uses = products.get(f"{path}.{key}".lstrip("."), [])
        site = Site(site_name(path, key), kind, _shape(weight), module, key)
        if key in known:
            site = replace(site, **known[key])
        elif any(use.function != "embedding" for use in uses):
            site = replace(site, **_bare(uses, module))
        else:
            continue
        obstacle = site.obstacle or weight_obstacle(weight) or around.obstacle(path, key, module)
        yield replace(site, obstacle=obstacle, default=around.on_request(path, weight) or site.default)


def _layer_site(path: str, layer: nn.Module, around: Surroundings, uses: list[Use]) -> Site:
    """Describe the weight of a layer; ``uses`` are those of its weight without a call of the layer."""
    computed = parametrize.is_parametrized(layer, "weight") or layer._parameters.get("weight") is None
    weight = None if computed else layer._parameters["weight"]
    axis, groups = layer_axis(layer), int(getattr(layer, "groups", 1))
    # Attention reads the weight of its output projection, and no graph shows it.
    attention = type(layer).__name__ == "NonDynamicallyQuantizableLinear"
    return Site(
        path, type(layer).__name__, _shape(weight), layer, axis=axis,
        groups=groups if is_transposed_convolution(layer) else 1,
        obstacle=layer_obstacle(layer, weight) or around.obstacle(path, "weight", layer),
        default=around.on_request(path, weight) or grouped(groups) or _other_axis(axis, uses),
        read_by="MultiheadAttention" if attention else next((use.function for use in uses), ""),
    )  # fmt: skip


def _known_parameters(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """List the weights of modules that are no layers themselves: along which axis they sum, or what forbids them."""
    forward = getattr(type(module), "forward", None)  # a scripted class has none
    if isinstance(module, nn.MultiheadAttention) and forward is nn.MultiheadAttention.forward:
        yield from ((key, {"axis": 1}) for key in _ATTENTION_KEYS)
    elif isinstance(module, nn.RNNCellBase) and forward in _CELL_FORWARDS:
        yield from ((key, {"axis": 1}) for key in _CELL_KEYS)
    elif isinstance(module, nn.RNNBase):
        fused = Refusal(
            f"{type(module).__name__} runs in a fused kernel that keeps a list of its weights",
            "it stays dense; nn.LSTMCell, nn.GRUCell and nn.RNNCell can be converted",
        )
        yield from ((key, {"obstacle": fused}) for key in module._parameters if key.startswith("weight_"))
    elif isinstance(module, nn.Bilinear):
        yield "weight", {"obstacle": Refusal("Bilinear sums over two inputs at once", "it stays dense")}
    elif isinstance(getattr(module, "is_transposed", None), bool):  # the experts of Hugging Face's mixtures
        axis = -2 if module.is_transposed else -1
        yield from ((key, {"axis": axis}) for key in _EXPERT_KEYS if _is_stack(module._parameters.get(key)))


def _is_stack(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.dim() == 3


def _bare(uses: list[Use], module: nn.Module) -> dict[str, Any]:
    """Say what the products with a bare parameter make of it: along which axis they sum, or what forbids that."""
    products = [use for use in uses if use.function != "embedding"]
    axes, function = {use.axis for use in products}, products[0].function
    groups = max(use.groups for use in products)
    found: dict[str, Any] = {"kind": function, "bare": True}
    if isinstance(module, fx.GraphModule):  # whose copies are made anew from its graph
        copied = Refusal("a GraphModule holds it itself, whose copies would lose its mask", "hold it in a submodule")
        return {**found, "obstacle": copied}
    if function == LOOKUP:
        reason = "it is a table that rows are looked up in, by products with ones and zeros"
        return {**found, "obstacle": Refusal(reason, "it stays dense")}
    if any(use.computed for use in products):
        reason = f"{function} multiplies by something computed from this parameter, where its zeros may not be zeros"
        remedy = "it stays dense; multiply by the parameter itself if it should not"
        return {**found, "obstacle": Refusal(reason, remedy)}
    if len(axes) > 1 or None in axes:
        what = "along more than one of its axes" if len(axes) > 1 else "so that no blocks along one of its axes follow"
        refusal = Refusal(f"{function} sums {what}", "it stays dense; use a parameter for each product")
        return {**found, "obstacle": refusal}
    table = Refusal("it is the table of an embedding, too", "ask for it with --include to prune the table with it")
    (axis,) = axes
    default = grouped(groups) or (table if len(products) < len(uses) else None)
    return {**found, "axis": axis, "groups": groups if axis == 0 else 1, "default": default}


def _other_axis(axis: Axis, uses: list[Use]) -> Refusal | None:
    """Say if a layer's weight is also multiplied by along another axis."""
    other = next((use for use in uses if use.axis not in (None, axis)), None)
    if other is None:
        return None
    return Refusal(
        f"{other.function} multiplies by its weight, too, along axis {other.axis}, where it would not be N:M",
        "ask for it with --include",
    )


def _unknown(name: str, model: nn.Module) -> Site | None:
    """Describe a parameter of a module that could not be followed; None if it could be no weight."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    weight = module._parameters[key]
    if weight is None or isinstance(module, nn.Embedding) or sum(size > 1 for size in _shape(weight)) < 2:
        return None
    refusal = Refusal(
        f"the forward of {type(module).__name__} can't be followed, so it is not known whether it is a weight",
        "give example inputs (--input): a run shows what is multiplied",
    )
    return Site(site_name(path, key), type(module).__name__, _shape(weight), module, key, obstacle=refusal)


def _shape(weight: nn.Parameter | None) -> tuple[int, ...]:
    return () if weight is None or torch.nn.parameter.is_lazy(weight) else tuple(weight.shape)


def _with_shared_axes(sites: list[Site]) -> list[Site]:
    """Refuse sites that share a parameter and sum over different axes of it."""
    axes: dict[int, set[Axis]] = defaultdict(set)
    for site in sites:
        axes[id(site.parameter)].add(site.axis)
    refusal = Refusal("its weight is shared by layers that sum over different axes of it", "untie the weights")
    shared = (site.parameter is not None and len(axes[id(site.parameter)]) > 1 for site in sites)
    return [
        replace(s, obstacle=s.obstacle or refusal) if differ else s for s, differ in zip(sites, shared, strict=True)
    ]
