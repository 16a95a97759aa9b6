"""Find the sites of a model and judge each. Nothing is changed here: a refusal is a value with a reason."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nmgraph.layers.kinds import is_layer, is_transposed_convolution, layer_axis, layer_base
from nmgraph.layers.masked import PREFIX, Masked, site_name
from nmgraph.layers.recipe import Recipe
from nmgraph.nm.grouping import FLAT, Axis
from nmgraph.passes.products import LOOKUP, Use
from nmgraph.passes.structure import copy_structure
from nmgraph.passes.trace import Uses

_ATTENTION_KEYS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CELL_KEYS = ("weight_ih", "weight_hh")
_EXPERT_KEYS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_TORCHS_OWN = {*nn.Module().__dict__, "_flat_weights", "_flat_weight_refs"}
_CELL_FORWARDS = (nn.RNNCell.forward, nn.LSTMCell.forward, nn.GRUCell.forward)
_PRUNABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.quantizable")


@dataclass(frozen=True)
class Refusal:
    """Why a site stays dense, and what would change that."""

    reason: str
    remedy: str


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
    holders, held = _holders(model), _held_elsewhere(model)
    adapters = _adapters(model)
    products: dict[str, list[Use]] = defaultdict(list)
    for use in uses.products:
        products[use.parameter].append(use)
    sites: dict[str, Site] = {}
    for path, module in model.named_modules():
        for site in _sites_of(path, module, holders, products):
            if site.name not in sites:
                adapted = _adapter_refusal(path, adapters)
                obstacle, default = site.obstacle or _foreign_obstacle(site, held), site.default
                if adapted is not None and path.startswith(tuple(f"{a}.base_layer" for a in adapters)):
                    default = adapted
                elif adapted is not None:
                    obstacle = obstacle or adapted
                name = f"{path}.{site.key}".lstrip(".")
                sites[site.name] = replace(
                    site, calls=uses.calls.get(path), macs=uses.macs.get(name), obstacle=obstacle, default=default
                )
    for name in uses.unfollowed:
        _add_unknown(name, model, sites)
    return _with_shared_axes(sites.values())


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
    if site.default is not None and not (included and pattern.divides(length)):
        return site.default
    if not pattern.divides(length):
        what = "flat weight" if recipe.reduction_axis == FLAT else "input channel"
        fits = pattern.fitting(length)
        remedy = f"choose {fits[0]} for it" if fits else "no usual pattern fits"
        return Refusal(pattern.misfit(length, "input feature" if len(site.shape) == 2 else what), remedy)
    if recipe.method.splits_backward and site.is_layer and site.module is not None and _own_forwards(site.module):
        return Refusal(
            f"{type(site.module).__name__} has a forward of its own, which takes no backward mask",
            "choose a method without one, such as srste",
        )
    return None


def _sites_of(
    path: str, module: nn.Module, holders: Mapping[int, list[str]], products: Mapping[str, list[Use]]
) -> Iterator[Site]:
    """List the sites that a module itself holds: of its kind, then those that a forward multiplies by."""
    kind = type(module).__name__
    if is_layer(module):
        parametrized = parametrize.is_parametrized(module, "weight") or module._parameters.get("weight") is None
        weight = None if parametrized else module._parameters["weight"]
        site = Site(path, kind, _shape(weight), module, axis=layer_axis(module))
        if is_transposed_convolution(module):
            site = replace(site, groups=int(module.groups))  # type: ignore[arg-type]
        readers = [use.function for use in products.get(f"{path}.weight".lstrip("."), ())]
        if path.rpartition(".")[2] == "out_proj" and kind == "NonDynamicallyQuantizableLinear":
            readers = ["MultiheadAttention"]
        obstacle = _obstacle(module, weight) or _weight_obstacle(weight) or _own_forward_obstacle(module)
        default = _default(module, weight, holders) or _read_otherwise(site, products)
        yield replace(site, obstacle=obstacle, default=default, read_by=readers[0] if readers else "")
        known: dict[str, Axis | Refusal] = {"weight": 1}
    else:
        known = dict(_known_parameters(module))
    if type(module).__module__.startswith(_QUANTIZED) and callable(getattr(module, "weight", None)):
        yield Site(path, kind, tuple(module.weight().shape), obstacle=_QUANTIZATION)  # type: ignore[operator]
        return
    for key, weight in module._parameters.items():
        if weight is None or (key == "weight" and is_layer(module)):
            continue
        name = f"{path}.{key}".lstrip(".")
        site = Site(site_name(path, key), kind, _shape(weight), module, key)
        if key in known:
            axis = known[key]
            yield _judged(
                replace(site, axis=axis) if not isinstance(axis, Refusal) else replace(site, obstacle=axis),
                weight,
                holders,
            )
        elif multiplied := [use for use in products.get(name, ()) if use.function != "embedding"]:
            embedded = any(use.function == "embedding" for use in products[name])
            site = replace(site, kind=multiplied[0].function, bare=True, **_along(multiplied))
            yield _judged(site, weight, holders, embedded=embedded)


def _known_parameters(module: nn.Module) -> Iterator[tuple[str, Axis | Refusal]]:
    """List the weights of modules that are no layers themselves: their reduction axes, or what forbids them."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention) and kind.forward is nn.MultiheadAttention.forward:
        yield from ((key, 1) for key in _ATTENTION_KEYS)
    elif isinstance(module, nn.RNNCellBase) and kind.forward in _CELL_FORWARDS:
        yield from ((key, 1) for key in _CELL_KEYS)
    elif isinstance(module, nn.RNNBase):
        fused = Refusal(
            f"{type(module).__name__} runs in a fused kernel that keeps a list of its weights",
            "it stays dense; nn.LSTMCell, nn.GRUCell and nn.RNNCell can be converted",
        )
        yield from ((key, fused) for key in module._parameters if key.startswith("weight_"))
    elif isinstance(module, nn.Bilinear):
        yield "weight", Refusal("Bilinear sums over two inputs at once", "it stays dense")
    elif isinstance(getattr(module, "is_transposed", None), bool):  # the experts of Hugging Face's mixtures
        axis = -2 if module.is_transposed else -1
        yield from ((key, axis) for key in _EXPERT_KEYS if _is_stack(module._parameters.get(key)))


def _is_stack(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.dim() == 3


def _along(products: list[Use]) -> dict[str, Any]:
    """Say along which axis bare products sum, or what forbids one."""
    axes = {use.axis for use in products}
    function = products[0].function
    if function == LOOKUP:
        refusal = Refusal("it is a table that rows are looked up in, by products with ones and zeros", "it stays dense")
        return {"obstacle": refusal}
    if any(use.computed for use in products):
        refusal = Refusal(
            f"{function} multiplies by something computed from this parameter, where its zeros may not be zeros",
            "it stays dense; multiply by the parameter itself if it should not",
        )
        return {"obstacle": refusal}
    if len(axes) > 1 or None in axes:
        what = "along more than one of its axes" if len(axes) > 1 else "so that no blocks along one of its axes follow"
        return {"obstacle": Refusal(f"{function} sums {what}", "it stays dense; use a parameter for each product")}
    groups = max(use.groups for use in products)
    default = {"default": _grouped(groups)} if groups > 1 else {}
    axis = axes.pop()
    return {"axis": axis, "groups": groups if axis == 0 else 1, **default}


def _judged(site: Site, weight: nn.Parameter, holders: Mapping[int, list[str]], *, embedded: bool = False) -> Site:
    default = site.default or _default(site.module, weight, holders)
    if isinstance(site.module, fx.GraphModule):  # whose copies are made anew from its graph
        copied = Refusal("a GraphModule holds it itself, whose copies would lose its mask", "hold it in a submodule")
        return replace(site, obstacle=copied)
    if embedded and default is None:
        default = Refusal(
            "it is the table of an embedding, too", "ask for it with --include to prune the table with it"
        )
    return replace(site, obstacle=site.obstacle or _weight_obstacle(weight), default=default)


def _add_unknown(name: str, model: nn.Module, sites: dict[str, Site]) -> None:
    """List a parameter of a module that could not be followed, if it could be a weight."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    weight, site = module._parameters[key], site_name(path, key)
    if weight is None or site in sites or sum(size > 1 for size in _shape(weight)) < 2:
        return
    if isinstance(module, nn.Embedding):
        return
    refusal = Refusal(
        f"the forward of {type(module).__name__} can't be followed, so it is not known whether it is a weight",
        "give example inputs (--input): a run shows what is multiplied",
    )
    sites[site] = Site(site, type(module).__name__, _shape(weight), module, key, obstacle=refusal)


def _shape(weight: nn.Parameter | None) -> tuple[int, ...]:
    return () if weight is None or torch.nn.parameter.is_lazy(weight) else tuple(weight.shape)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Find the modules that hold each parameter, by its id."""
    holders: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                holders[id(p)].append(path or "(root)")
    return holders


def _with_shared_axes(sites: Iterable[Site]) -> list[Site]:
    """Refuse sites that share a parameter and sum over different axes of it."""
    found = list(sites)
    axes: dict[int, set[Axis]] = defaultdict(set)
    for site in found:
        if site.parameter is not None:
            axes[id(site.parameter)].add(site.axis)
    refusal = Refusal("its weight is shared by layers that sum over different axes of it", "untie the weights")
    return [
        replace(s, obstacle=s.obstacle or refusal) if s.parameter is not None and len(axes[id(s.parameter)]) > 1 else s
        for s in found
    ]


def _held_elsewhere(model: nn.Module) -> set[int]:
    """Find parameters that a module also keeps in an attribute, list or dict of its own, where no mask would reach them."""
    held = set()
    for module in model.modules():
        own = {key: value for key, value in module.__dict__.items() if key not in _TORCHS_OWN}
        held |= {id(leaf) for leaf in tree_leaves(own) if isinstance(leaf, nn.Parameter)}
    return held


def _foreign_obstacle(site: Site, held: set[int]) -> Refusal | None:
    """Say what the module that holds a site does with it that no mask would survive."""
    if id(site.parameter) in held:
        return Refusal(
            "a module keeps it in an attribute of its own, too, where it would be read without its mask",
            "read it as a parameter of its module",
        )
    if site.key.startswith(PREFIX):
        return Refusal(f"its name begins with {PREFIX}, as the names of masks do", "rename it")
    if site.is_layer and site.module is not None and "lora_A" in site.module._parameters:
        return Refusal(
            "it is a layer with an adapter, and merging that would fill its zeros", "merge the adapter first"
        )
    return None


def _read_otherwise(site: Site, products: Mapping[str, list[Use]]) -> Refusal | None:
    """Say if a layer's weight is also multiplied by along another axis, or written to, or is a table."""
    for use in products.get(f"{site.name}.weight".lstrip("."), ()):
        if use.axis not in (None, site.axis):
            return Refusal(
                f"{use.function} multiplies by its weight, too, along axis {use.axis}, where it would not be N:M",
                "ask for it with --include",
            )
    return None


def _adapters(model: nn.Module) -> list[str]:
    """Find the modules in which a low-rank adapter stands beside a layer, as PEFT makes them."""
    return [path for path, m in model.named_modules() if {"base_layer", "lora_A"} <= set(m._modules.keys())]


def _adapter_refusal(path: str, adapters: list[str]) -> Refusal | None:
    owner = next((a for a in adapters if path.startswith(f"{a}.")), None)
    if owner is None:
        return None
    return Refusal(
        f"it is part of {owner}, a layer with an adapter, and merging that would fill its zeros",
        "merge the adapters first (merge_and_unload)",
    )


_QUANTIZATION = Refusal("it is a quantization layer", "prune first, then prepare for quantization")


def _obstacle(layer: nn.Module, weight: nn.Parameter | None) -> Refusal | None:
    if isinstance(layer, Masked):
        return Refusal("it is converted already", "start from the dense model")
    if type(layer).__module__.startswith("torch.ao."):
        return _QUANTIZATION
    if weight is None:
        return Refusal(
            "its weight is computed by a parametrization (weight_norm, spectral_norm, ...)",
            "remove it first (parametrize.remove_parametrizations, or remove_weight_norm for the older kind)",
        )
    return None


def _weight_obstacle(weight: nn.Parameter | None) -> Refusal | None:
    if weight is None:
        return None
    if torch.nn.parameter.is_lazy(weight):
        return Refusal("it is lazy and has no shape yet", "run the model once before converting")
    if weight.numel() == 0:
        return Refusal("it has no weights", "leave it out of the model")
    if weight.dtype not in _PRUNABLE:
        return Refusal(f"its weight is {weight.dtype}", "prune in 16, 32 or 64 bit floating point, before quantizing")
    return None


def _default(module: nn.Module | None, weight: nn.Parameter | None, holders: Mapping[int, list[str]]) -> Refusal | None:
    """Say why a site is converted only on request."""
    if weight is None:
        return None
    if len(names := holders[id(weight)]) > 1:
        return Refusal(
            f"its weight is shared by {' and '.join(names)}",
            "untie the weights, or ask for it with --include: then all of them are masked",
        )
    if not weight.requires_grad:
        return Refusal(
            "its weight is frozen (requires_grad=False)",
            "unfreeze it, or ask for it with --include: then it gets a fixed mask by magnitude",
        )
    groups = getattr(module, "groups", 1) if module is not None and is_layer(module) else 1
    return _grouped(groups) if groups > 1 else None


def _grouped(groups: int) -> Refusal:
    return Refusal(
        f"it is a grouped convolution (groups={groups})",
        "sparse tensor cores don't take these; ask for it with --include where M divides a group's channels",
    )


def _own_forward_obstacle(layer: nn.Module) -> Refusal | None:
    """Try a layer with a forward of its own on a sparse weight: do the zeros reach its product?"""
    if not _own_forwards(layer):
        return None
    keep_dense = "it stays dense; use a plain layer if it should not"
    try:
        given, seen, changed = _weights_seen(layer)
    except Exception as error:
        # The layer's code is foreign; whatever it raises, the layer stays as it is.
        return Refusal(f"{type(layer).__name__} could not be tried on a sparse weight ({error})", keep_dense)
    if not seen:
        return Refusal(f"{type(layer).__name__} does not multiply by its weight in F.linear or F.conv", keep_dense)
    if changed:
        return Refusal(f"{type(layer).__name__} changes its weight in its forward", keep_dense)
    for used in seen:
        if used.shape != given.shape or bool((used[given == 0] != 0).any()):
            return Refusal(
                f"{type(layer).__name__} computes with a function of its weight that fills the zeros", keep_dense
            )
    return None


def _own_forwards(layer: nn.Module) -> list[str]:
    base = layer_base(layer)
    return [f for f in ("forward", "_conv_forward") if getattr(type(layer), f, None) is not getattr(base, f, None)]


_MULTIPLY = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip


class _WeightSpy(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MULTIPLY:
            self.seen.append((args[1] if len(args) > 1 else kwargs["weight"]).detach())
        return func(*args, **kwargs)


def _weights_seen(layer: nn.Module) -> tuple[Tensor, list[Tensor], bool]:
    """Run a stand-in of the layer on the CPU with a sparse weight; give that weight, those multiplied by, and whether it changed."""
    stand_in = copy_structure(
        layer, lambda t: nn.Parameter(torch.ones(t.shape)) if isinstance(t, nn.Parameter) else torch.ones(t.shape)
    )
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(stand_in, hooks).clear()
    weight = stand_in._parameters["weight"]
    assert weight is not None
    spread = torch.linspace(0.5, 1.5, weight.numel()).reshape(weight.shape)
    axis = layer_axis(layer)
    shape = [-1 if place == axis else 1 for place in range(weight.dim())]
    given = spread * (torch.arange(weight.shape[axis]) % 2 == 0).reshape(shape)
    with torch.no_grad():
        weight.copy_(given)
    if isinstance(layer, nn.Linear):
        x = torch.ones(2, layer.in_features)
    else:
        conv: Any = layer
        sizes = [d * (k - 1) + 4 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        x = torch.ones(1, conv.in_channels, *sizes)
    with torch.no_grad(), _WeightSpy() as spy:
        stand_in(x)
    after = stand_in._parameters["weight"]
    return given, spy.seen, after is None or not torch.equal(after, given)
