"""Find the sites of a model and judge each. Nothing is changed here: a refusal is a value with a reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from nmgraph.layers.masked import LAYERS, Masked
from nmgraph.layers.recipe import Recipe
from nmgraph.nm.grouping import FLAT, Axis
from nmgraph.passes.structure import copy_structure
from nmgraph.passes.trace import Uses

_OTHER_WEIGHTS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.ConvTranspose1d, ("weight",)),
    (nn.ConvTranspose2d, ("weight",)),
    (nn.ConvTranspose3d, ("weight",)),
    (nn.Bilinear, ("weight",)),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    (nn.RNNBase, ("weight_",)),
    (nn.RNNCellBase, ("weight_",)),
)


@dataclass(frozen=True)
class Refusal:
    """Why a site stays dense, and what would change that."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class Site:
    """One place that holds a prunable weight.

    Attributes:
        name: its qualified name.
        kind: class of the layer, or the function that multiplies by the parameter.
        shape: of the weight.
        layer: the layer, where there is one that can be converted.
        calls: how often one forward calls it, where known.
        obstacle: what forbids its conversion whatever the pattern.
        read_by: what multiplies by the layer's weight without calling the layer, where known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    layer: nn.Module | None
    calls: int | None
    obstacle: Refusal | None
    read_by: str = ""

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.shape[1] if len(self.shape) > 1 else 0

    def axis(self, block_axis: str) -> Axis:
        """Give the reduction axis: ``flat`` is another one only where the kernel is larger than 1."""
        return FLAT if block_axis == FLAT and math.prod(self.shape[2:]) > 1 else 1

    def length(self, axis: Axis) -> int:
        """Give the length of the reduction axis."""
        return math.prod(self.shape[1:]) if axis == FLAT else self.channels


def find_sites(model: nn.Module, uses: Uses) -> list[Site]:
    """List every linear- or conv-like site once, in the model's order."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    sites = [s for name, module in model.named_modules() for s in _sites_of(name, module, owners, uses)]
    readers = {name.removesuffix(".weight"): function for name, function in uses.functional}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            readers[f"{name}.out_proj".lstrip(".")] = "MultiheadAttention"
    sites = [replace(s, read_by=readers.get(s.name, "")) for s in sites]
    taken = {f"{s.name}.weight" for s in sites} | {s.name for s in sites}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, function in dict(uses.functional).items():
        if name in taken or name not in parameters or _is_layer_weight(model, name):
            continue
        refusal = Refusal(
            f"{function} multiplies by this parameter directly", "hold it in an nn.Linear or nn.Conv layer"
        )
        sites.append(Site(name, function, tuple(parameters[name].shape), None, None, refusal))
    return sites


def judge(site: Site, recipe: Recipe) -> Refusal | None:
    """Say why the site cannot be converted by the recipe; None if it can."""
    if site.obstacle is not None:
        return site.obstacle
    length, pattern = site.length(recipe.reduction_axis), recipe.pattern
    if not pattern.divides(length):
        what = "flat weight" if recipe.reduction_axis == FLAT else "input channel"
        fits = pattern.fitting(length)
        remedy = f"choose {fits[0]} for it" if fits else "no usual pattern fits"
        return Refusal(pattern.misfit(length, "input feature" if len(site.shape) == 2 else what), remedy)
    if recipe.method.splits_backward and site.layer is not None and _own_forwards(site.layer):
        return Refusal(
            f"{type(site.layer).__name__} has a forward of its own, which takes no backward mask",
            "choose a method without one, such as srste",
        )
    return None


def _sites_of(name: str, module: nn.Module, owners: Counter[int], uses: Uses) -> Iterator[Site]:
    kind = type(module).__name__
    if isinstance(module, LAYERS):
        parametrized = parametrize.is_parametrized(module) or module._parameters.get("weight") is None
        weight = None if parametrized else module._parameters["weight"]
        lazy = weight is not None and torch.nn.parameter.is_lazy(weight)
        shape = () if weight is None or lazy else tuple(weight.shape)
        yield Site(name, kind, shape, module, uses.calls.get(name), _obstacle(module, weight, owners))
        return
    for base, prefixes in _OTHER_WEIGHTS:
        if isinstance(module, base):
            for key, parameter in module._parameters.items():
                if parameter is not None and key.startswith(prefixes):
                    site = name if key == "weight" else f"{name}.{key}".lstrip(".")
                    refusal = Refusal(f"weights of {base.__name__} are not converted yet", "it stays dense")
                    shape = () if torch.nn.parameter.is_lazy(parameter) else tuple(parameter.shape)
                    yield Site(site, kind, shape, None, uses.calls.get(name), refusal)
            return


def _obstacle(layer: nn.Module, weight: nn.Parameter | None, owners: Counter[int]) -> Refusal | None:
    if isinstance(layer, Masked):
        return Refusal("it is converted already", "start from the dense model")
    if type(layer).__module__.startswith("torch.ao."):
        return Refusal("it is a quantization layer", "prune first, then prepare for quantization")
    if weight is None:
        return Refusal(
            "its weight is computed by a parametrization (weight_norm, spectral_norm, ...)",
            "remove it first (parametrize.remove_parametrizations, or remove_weight_norm for the older kind)",
        )
    if torch.nn.parameter.is_lazy(weight):
        return Refusal("it is lazy and has no shape yet", "run the model once before converting")
    if weight.numel() == 0:
        return Refusal("it has no weights", "leave it out of the model")
    if not weight.is_floating_point():
        return Refusal(f"its weight is {weight.dtype}", "prune before quantizing")
    if owners[id(weight)] > 1:
        return Refusal("its weight is shared with another module", "untie the weights first")
    if not weight.requires_grad:
        return Refusal("its weight is frozen (requires_grad=False)", "unfreeze it before converting")
    if getattr(layer, "groups", 1) > 1:
        return Refusal(
            f"it is a grouped convolution (groups={layer.groups})",
            "sparse tensor cores don't take these; it stays dense",
        )
    return _own_forward_obstacle(layer)


def _own_forward_obstacle(layer: nn.Module) -> Refusal | None:
    """Try a layer with a forward of its own on a sparse weight: do the zeros reach its product?"""
    if not _own_forwards(layer):
        return None
    keep_dense = "it stays dense; use a plain layer if it should not"
    try:
        given, seen = _weights_seen(layer)
    except Exception as error:
        # The layer's code is foreign; whatever it raises, the layer stays as it is.
        return Refusal(f"{type(layer).__name__} could not be tried on a sparse weight ({error})", keep_dense)
    if not seen:
        return Refusal(f"{type(layer).__name__} does not multiply by its weight in F.linear or F.conv", keep_dense)
    for used in seen:
        if used.shape != given.shape or bool((used[given == 0] != 0).any()):
            return Refusal(
                f"{type(layer).__name__} computes with a function of its weight that fills the zeros", keep_dense
            )
    return None


def _own_forwards(layer: nn.Module) -> list[str]:
    base = next(kind for kind in LAYERS if isinstance(layer, kind))
    return [f for f in ("forward", "_conv_forward") if getattr(type(layer), f, None) is not getattr(base, f, None)]


class _WeightSpy(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.conv1d, F.conv2d, F.conv3d):
            self.seen.append((args[1] if len(args) > 1 else kwargs["weight"]).detach())
        return func(*args, **kwargs)


def _weights_seen(layer: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Run a stand-in of the layer on the CPU with a sparse weight; give that weight, and those multiplied by."""
    stand_in = copy_structure(
        layer, lambda t: nn.Parameter(torch.ones(t.shape)) if isinstance(t, nn.Parameter) else torch.ones(t.shape)
    )
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        getattr(stand_in, hooks).clear()
    weight = stand_in._parameters["weight"]
    assert weight is not None
    spread = torch.linspace(0.5, 1.5, weight.numel()).reshape(weight.shape)
    given = spread * (torch.arange(weight.shape[1]) % 2 == 0).reshape(1, -1, *[1] * (weight.dim() - 2))
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
    return given, spy.seen


def _is_layer_weight(model: nn.Module, parameter: str) -> bool:
    path, _, key = parameter.rpartition(".")
    return key == "weight" and isinstance(model.get_submodule(path), LAYERS)
