"""Layers that multiply by a masked weight.

A layer is made sparse in place, by giving it a subclass of its own class in which ``weight`` is a property: whoever
reads it - the layer's forward, an attention that takes ``out_proj.weight`` for itself, ``F.linear(x, fc.weight)`` -
gets the masked weight, differentiable. The raw parameter stays in ``_parameters["weight"]``, so that the
optimizer and ``state_dict`` see it under its old key. Everything else about the layer, its identity included,
stays as it was. (``torch.nn.utils.parametrize`` changes classes in the same way.)

What a method remembers, where training stands and what the layer was told to be are buffers named ``nm_*``: they
travel in ``state_dict``, move with ``.to()`` and are copied by ``deepcopy``.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nmgraph.layers.input_gradient import split_forward
from nmgraph.layers.recipe import Recipe
from nmgraph.methods.contract import Operand
from nmgraph.nm.grouping import canonical, restore

PREFIX = "nm_"
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that can be masked, with the input channels of a group at axis 1 of the weight."""

_CLASSES: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}  # one class for all layers of a kind


class Training:
    """What the layers of one conversion share about their training. A copy of a model starts anew."""

    def __init__(self) -> None:
        self.attached: dict[str, object] = {}  # the controller of each site
        self.warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Training:
        copied: Training = memo.setdefault(id(self), Training())
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Training, ()


class Masked(nn.Module):
    """Mixin in front of a layer's own class; made by :func:`sparsify`, undone by :func:`unmask`."""

    nm_base: ClassVar[type[nn.Module]]

    nm_site: str
    nm_told: Recipe
    nm_training: Training
    nm_at_gradient: float | None
    nm_clock: Tensor
    nm_recipe: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight this layer multiplies by: masked, in the shape and dtype of the raw parameter."""
        try:
            return self.nm_operand().forward
        except AttributeError as error:
            # nn.Module would answer an AttributeError with the raw, dense parameter.
            raise RuntimeError(f"{self.nm_site}: the masked weight could not be computed: {error}") from error

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # nn.Module takes Parameters before they come here; DataParallel gives its replicas plain tensors.
        self._parameters["weight"] = value  # type: ignore[assignment]

    @property
    def nm_raw(self) -> nn.Parameter:
        """The dense parameter that the optimizer trains."""
        raw = self._parameters.get("weight")
        if raw is None:
            raise RuntimeError(
                f"{self.nm_site}: its weight was taken away after conversion, by a parametrization such as weight_norm. "
                "Finalize the model first, or leave the layer dense."
            )
        return raw

    @property
    def nm_state(self) -> Any:
        """The method's state: a NamedTuple of this layer's buffers."""
        kind: Any = self.nm_told.method.state_type
        return kind(**{name: self._buffers[PREFIX + name] for name in kind._fields})

    @nm_state.setter
    def nm_state(self, state: Any) -> None:
        for name, value in state._asdict().items():
            buffer = self._buffers[PREFIX + name]
            assert buffer is not None
            if buffer is not value:
                buffer.copy_(value)

    @property
    def nm_raw_OSC(self) -> Tensor:
        """The raw parameter as ``w_OSC``."""
        return canonical(self.nm_raw, self.nm_told.reduction_axis)

    def nm_operand(self) -> Operand:
        """Compute what this layer multiplies by, each in the raw parameter's shape and memory format."""
        told, raw = self.nm_told, self.nm_raw
        forward, backward = told.method.operand(self.nm_raw_OSC, self.nm_state, told.pattern)
        forward = self._nm_in_own_shape(forward, raw)
        if not torch.compiler.is_compiling():
            self._nm_watch_training(forward)
        return Operand(forward, None if backward is None else self._nm_in_own_shape(backward, raw))

    def nm_mask(self) -> Tensor:
        """Compute the current forward mask: bool, in the raw parameter's shape; training on does not change it."""
        told = self.nm_told
        mask_OSC = told.method.mask(self.nm_raw_OSC.detach(), self.nm_state, told.pattern)
        return self._nm_in_own_shape(mask_OSC, self.nm_raw).clone()

    def nm_unfinished(self) -> str | None:
        """Say what is missing until the mask is N:M; None when it is."""
        told = self.nm_told
        return told.method.unfinished(self.nm_raw_OSC.detach(), self.nm_state, told.pattern)

    def extra_repr(self) -> str:
        """Add pattern and method to what the layer says of itself."""
        return f"{super().extra_repr()}, {self.nm_told.pattern} {self.nm_told.method.name}"

    def _nm_in_own_shape(self, t_OSC: Tensor, raw: Tensor) -> Tensor:
        out = restore(t_OSC, tuple(raw.shape), self.nm_told.reduction_axis)
        # A mask is sorted along C; without this, a convolution would be handed a channels_last weight, choose other
        # kernels for it, and answer with another memory format than the layer had before. For 1x1 kernels, too,
        # where is_contiguous() is true of both.
        if _has_plain_strides(raw):
            return out.reshape(-1).view(raw.shape)
        if raw.dim() == 4:
            return out.contiguous(memory_format=torch.channels_last)
        return out

    def _nm_watch_training(self, operand: Tensor) -> None:
        """Warn once if the weight has changed since a gradient came back, and no optimizer runs the method's steps."""
        shared, method = self.nm_training, self.nm_told.method
        if not (self.training and operand.requires_grad and method.needs_attach):
            return
        if not isinstance(self.nm_raw, nn.Parameter):
            return  # called with other weights, through torch.func
        if shared.warned or self.nm_site in shared.attached:
            return
        if self.nm_at_gradient is None or self.nm_at_gradient == self._nm_fingerprint():
            operand.register_hook(self._nm_note_gradient)  # type: ignore[no-untyped-call]
            return
        shared.warned = True
        warnings.warn(
            f"{self.nm_site} is trained with the method {method.name}, but no optimizer is attached: "
            f"{method.unattached}. After making the optimizer, add: "
            "nmgraph.attach(model, optimizer, total_steps=...)",
            stacklevel=4,
        )

    def _nm_note_gradient(self, gradient: Tensor) -> None:
        self.nm_at_gradient = self._nm_fingerprint()

    def _nm_fingerprint(self) -> float:
        # Not the tensor's version: fused optimizers do not count it up.
        return float(self.nm_raw.detach().flatten()[:256].double().sum())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        floats = {
            k: b for k, b in self._buffers.items() if k.startswith(PREFIX) and b is not None and b.is_floating_point()
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # model.half() and .to(bfloat16) are about weights; scores and averages would drown in so few bits.
        for key, before in floats.items():
            after = self._buffers[key]
            if after is not None and after.dtype != before.dtype:
                self._buffers[key] = before.to(device=after.device)
        self.nm_at_gradient = None
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        theirs = state_dict.get(f"{prefix}nm_recipe")
        if theirs is not None and not torch.equal(theirs.cpu(), self.nm_told.to_tensor()):
            error_msgs.append(
                f"{self.nm_site} was trained as {Recipe.describe_tensor(theirs)}, but this model is converted as "
                f"{self.nm_told}. Convert it the same way before loading."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.nm_at_gradient = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on the fly, so a pickle names the layer's own class and makes it again.
        state = {**self.__dict__, "nm_at_gradient": None}
        return _rebuild, (self.nm_base, self.nm_told.method.splits_backward), state


class SplitMasked(Masked):
    """Masked layer whose input gradient uses a weight of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the masked weight; send the input gradient through the backward one."""
        operand = self.nm_operand()
        if operand.backward is None:
            raise RuntimeError(f"{self.nm_site}: {self.nm_told.method.name} promised a backward weight and gave none.")
        return split_forward(self, x, operand.forward, operand.backward)  # type: ignore[arg-type]


def sparsify(layer: nn.Module, site: str, recipe: Recipe, training: Training) -> None:
    """Make a layer with a ``weight`` parameter sparse-trainable, in place.

    Args:
        layer: any Linear, Conv1d/2d/3d or subclass.
        site: its qualified name, for messages.
        recipe: what it shall be.
        training: shared by all layers of a model.
    """
    raw = layer._parameters["weight"]
    assert raw is not None
    assert not isinstance(layer, Masked)
    with torch.no_grad():
        # A method may look at values, which a weight on the meta device has not.
        weight = torch.zeros_like(raw, device="cpu") if raw.is_meta else raw
        state = recipe.method.init(canonical(weight, recipe.reduction_axis), recipe.pattern)
    for name, value in state._asdict().items():
        layer.register_buffer(PREFIX + name, value.to(raw.device))
    layer.register_buffer("nm_clock", torch.zeros(2, dtype=torch.int64, device=raw.device))  # steps done, total
    layer.register_buffer("nm_recipe", recipe.to_tensor().to(raw.device))
    layer.nm_site, layer.nm_told, layer.nm_training, layer.nm_at_gradient = site, recipe, training, None  # type: ignore[assignment]
    layer.__class__ = _masked_class(type(layer), recipe.method.splits_backward)


def unmask(layer: Masked) -> None:
    """Give a layer its own class back, in place; its parameter stays dense."""
    for name in [name for name in layer._buffers if name.startswith(PREFIX)]:
        delattr(layer, name)
    layer.__class__ = layer.nm_base  # type: ignore[assignment]
    for name in ("nm_site", "nm_told", "nm_training", "nm_at_gradient"):
        delattr(layer, name)


def masked_layers(model: nn.Module) -> dict[str, Masked]:
    """Find all masked layers by qualified name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Masked)}


def _masked_class(base: type[nn.Module], splits_backward: bool) -> type[nn.Module]:
    key = (base, splits_backward)
    if key not in _CLASSES:
        mixin: type[nn.Module] = SplitMasked if splits_backward else Masked
        # The base's own __module__: tracers take torch.nn's layers as leaves by it, and must go on doing so.
        names = {"nm_base": base, "__module__": base.__module__}
        _CLASSES.setdefault(key, type(f"NM{base.__name__}", (mixin, base), names))
    return _CLASSES[key]


def _has_plain_strides(t: Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


def _rebuild(base: type[nn.Module], splits_backward: bool) -> nn.Module:
    cls = _masked_class(base, splits_backward)
    return cls.__new__(cls)
