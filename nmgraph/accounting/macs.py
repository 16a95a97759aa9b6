"""Multiply-accumulate operations (MACs; two FLOPs each) of a model's layers, forward and backward apart.

Shapes come from a forward under fake tensors, so they are those of the real model, whatever its forward does, and
nothing is computed unless a forward asks for values. A backward costs each weight as much as the forward, twice: once for the gradient of its input,
if something before it is trained, and once for its own, if it is trained itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from nmgraph.layers.kinds import is_layer
from nmgraph.layers.masked import site_name, unmask_all
from nmgraph.passes.structure import copy_structure, owner_of, share_parameters
from nmgraph.passes.watch import Watched, fake_copy, fake_tensors, watch_itself


class Macs(NamedTuple):
    """MACs of one training step.

    Attributes:
        forward: of ``Y = X Wᵀ``.
        input_gradient: of ``dX = dY W``.
        weight_gradient: of ``dW = dYᵀ X``.
    """

    forward: int
    input_gradient: int
    weight_gradient: int


@dataclass(frozen=True)
class ModelMacs:
    """MACs of a dense model for the inputs it was run on.

    Attributes:
        layers: by site.
        elsewhere: products without a weight, such as those of attention.
    """

    layers: Mapping[str, Macs]
    elsewhere: Macs

    @property
    def total(self) -> Macs:
        """All of them."""
        return Macs(*(sum(column) for column in zip(*self.layers.values(), self.elsewhere, strict=True)))


def count_macs(model: nn.Module, run: Callable[[nn.Module], Any]) -> ModelMacs:
    """Count the MACs of a model, as if it were dense.

    Args:
        model: dense or converted, on any device, also meta; it is not changed.
        run: runs the copy of the model that it is given; a second time, with values, if shapes are not enough for its forward.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> count_macs(net, lambda model: model(torch.ones(10, 8))).layers["1"]
        Macs(forward=80, input_gradient=80, weight_gradient=80)
    """
    dense = copy_structure(model, share_parameters)
    unmask_all(dense)
    try:
        with fake_tensors() as fakes:
            copied = fake_copy(dense, fakes).eval()
            seen = _watch_with_gradients(copied, run)
    except Exception:
        if any(p.is_meta for p in dense.parameters()):
            raise
        # A forward that asks for values, such as which tokens go to an expert, says more with them, or why it fails.
        copied = copy_structure(dense, share_parameters).eval()
        seen = _watch_with_gradients(copied, run)
    names: dict[int, list[tuple[nn.Module, str, str]]] = {}  # of each parameter
    for name in seen.macs:
        owner, key = owner_of(copied, name)
        names.setdefault(id(owner._parameters[key]), []).append((owner, name.removesuffix(key).rstrip("."), key))
    layers: dict[str, Macs] = {}
    for same in names.values():
        # One that an embedding shares with a layer is the layer's.
        owner, path, key = next((place for place in same if is_layer(place[0])), same[0])
        name, parameter = f"{path}.{key}".lstrip("."), owner._parameters[key]
        assert parameter is not None
        macs = seen.macs[name]
        layers[site_name(path, key)] = Macs(macs, seen.reached_macs[name], macs * parameter.requires_grad)
    left = seen.all_macs - sum(m.forward for m in layers.values())
    return ModelMacs(layers, Macs(left, 2 * left, 0))


def _watch_with_gradients(model: nn.Module, run: Callable[[nn.Module], Any]) -> Watched:
    """Watch a run whose forward computes gradients, also where its caller has turned them off."""
    model.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None)
    with torch.enable_grad():
        return watch_itself(model, run)
