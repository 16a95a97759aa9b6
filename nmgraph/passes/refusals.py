"""Why a weight stays dense: each reason with what would change it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from nmgraph.layers.masked import PREFIX, Masked
from nmgraph.passes.trial import failed_trial

_PRUNABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TORCHS_OWN = {*nn.Module().__dict__, "_flat_weights", "_flat_weight_refs"}


@dataclass(frozen=True)
class Refusal:
    """Why a site stays dense, and what would change that."""

    reason: str
    remedy: str


QUANTIZATION = Refusal("it is a quantization layer", "prune first, then prepare for quantization")
ADAPTED = "a layer with an adapter, and merging that would fill its zeros"


@dataclass(frozen=True)
class Surroundings:
    """What a model does with parameters and modules beside calling them.

    Attributes:
        holders: paths of the modules that hold a parameter, by its id.
        kept: ids of parameters that a module keeps in an attribute, list or dict, too, where no mask would reach them.
        adapted: paths of the modules in which a low-rank adapter stands beside a layer, as PEFT makes them.
    """

    holders: dict[int, list[str]]
    kept: set[int]
    adapted: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Surroundings:
        """Look at a model."""
        holders: dict[int, list[str]] = defaultdict(list)
        kept: set[int] = set()
        for path, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders[id(parameter)].append(path or "(root)")
            own = {key: value for key, value in module.__dict__.items() if key not in _TORCHS_OWN}
            kept |= {id(leaf) for leaf in tree_leaves(own) if isinstance(leaf, nn.Parameter)}
        adapted = (path for path, m in model.named_modules() if {"base_layer", "lora_A"} <= set(m._modules.keys()))
        return cls(holders, kept, tuple(adapted))

    def obstacle(self, path: str, key: str, module: nn.Module) -> Refusal | None:
        """Say what forbids to mask the parameter ``key`` of the module at ``path``."""
        if id(module._parameters.get(key)) in self.kept:
            return Refusal(
                "a module keeps it in an attribute of its own, too, where it would be read without its mask",
                "read it as a parameter of its module",
            )
        if key.startswith(PREFIX):
            return Refusal(f"its name begins with {PREFIX}, as the names of masks do", "rename it")
        if "lora_A" in module._parameters:
            return Refusal(f"it is {ADAPTED}", "merge the adapter first")
        return None if self._is_base(path) else self._adapter(path)

    def on_request(self, path: str, weight: nn.Parameter | None) -> Refusal | None:
        """Say why a weight of the module at ``path`` is masked only on request."""
        if weight is None:
            return None
        if self._is_base(path):
            return self._adapter(path)
        if len(names := self.holders[id(weight)]) > 1:
            return Refusal(
                f"its weight is shared by {' and '.join(names)}",
                "untie the weights, or ask for it with --include: then all of them are masked",
            )
        if not weight.requires_grad:
            return Refusal(
                "its weight is frozen (requires_grad=False)",
                "unfreeze it, or ask for it with --include: then it gets a fixed mask by magnitude",
            )
        return None

    def _is_base(self, path: str) -> bool:
        return path.startswith(tuple(f"{owner}.base_layer" for owner in self.adapted))

    def _adapter(self, path: str) -> Refusal | None:
        owner = next((a for a in self.adapted if path.startswith(f"{a}.")), None)
        if owner is None:
            return None
        return Refusal(f"it is part of {owner}, {ADAPTED}", "merge the adapters first (merge_and_unload)")


def layer_obstacle(layer: nn.Module, weight: nn.Parameter | None) -> Refusal | None:
    """Say what forbids to mask the weight of a layer."""
    if isinstance(layer, Masked):
        return Refusal("it is converted already", "start from the dense model")
    if type(layer).__module__.startswith("torch.ao."):
        return QUANTIZATION
    if weight is None:
        return Refusal(
            "its weight is computed by a parametrization (weight_norm, spectral_norm, ...)",
            "remove it first (parametrize.remove_parametrizations, or remove_weight_norm for the older kind)",
        )
    if getattr(layer, "weight", weight) is not weight:
        return Refusal(
            f"what {type(layer).__name__}.weight gives is computed from its parameter, which a mask would replace",
            "fold it into the parameter first, by what made it so (ModelOpt: mts.export)",
        )
    obstacle = weight_obstacle(weight)
    failed = "" if obstacle else failed_trial(layer)
    return Refusal(failed, "it stays dense; use a plain layer if it should not") if failed else obstacle


def weight_obstacle(weight: nn.Parameter) -> Refusal | None:
    """Say what forbids to mask a weight, whoever multiplies by it."""
    if torch.nn.parameter.is_lazy(weight):
        return Refusal("it is lazy and has no shape yet", "run the model once before converting")
    if weight.numel() == 0:
        return Refusal("it has no weights", "leave it out of the model")
    if weight.dtype not in _PRUNABLE:
        return Refusal(f"its weight is {weight.dtype}", "prune in 16, 32 or 64 bit floating point, before quantizing")
    return None


def grouped(groups: int) -> Refusal | None:
    """Say why a grouped convolution is converted only on request; None if it is none."""
    if groups == 1:
        return None
    return Refusal(
        f"it is a grouped convolution (groups={groups})",
        "sparse tensor cores don't take these; ask for it with --include where M divides a group's channels",
    )
