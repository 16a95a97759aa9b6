"""Modules that multiply by masked weights.

A module is made sparse in place, by giving it a subclass of its own class in which a parameter - a layer's ``weight``,
an attention's ``in_proj_weight`` - is a property: whoever reads it - the layer's forward, an attention that takes
``out_proj.weight`` for itself, ``F.linear(x, fc.weight)`` - gets the masked weight, differentiable. The raw parameter
stays in ``_parameters``, so that the optimizer and ``state_dict`` see it under its old key. Everything else about the
module, its identity included, stays as it was. (``torch.nn.utils.parametrize`` changes classes in the same way.)

What a method remembers, where training stands and what the weight was told to be are buffers named ``nm_*``: they
travel in ``state_dict``, move with ``.to()`` and are copied by ``deepcopy``. :class:`MaskedWeight` is the handle to
one parameter and its buffers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nmgraph.errors import ConversionError
from nmgraph.layers.hardware import Hardware, product
from nmgraph.layers.input_gradient import split_forward
from nmgraph.layers.kinds import is_layer
from nmgraph.layers.recipe import Recipe
from nmgraph.layers.sharding import (
    Beside,
    Layout,
    is_per_weight,
    is_sharded,
    layout_of,
    local,
    shard,
    spread,
    state_layout,
    whole,
)
from nmgraph.methods.contract import Operand
from nmgraph.nm.grouping import canonical, in_memory_order, memory_order, out_of_memory_order, restore_like

PREFIX = "nm_"
# Of fully_shard, of RowwiseParallel, of checkpoints, and of FullyShardedDataParallel, which then fails for want of it.
_SHARDING = ("reset_sharded_param", "_partition_linear_fn", "_get_fqns", "_safe_setattr_tensor_or_param")

_CLASSES: dict[
    tuple[type[nn.Module], tuple[str, ...], bool, bool], type[nn.Module]
] = {}  # one class for all modules of a kind


class Training:
    """What the sites of one conversion share about their training. A copy of a model starts anew."""

    def __init__(self) -> None:
        self.attached: dict[str, object] = {}  # the controller of each site
        self.warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Training:
        copied: Training = memo.setdefault(id(self), Training())
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Training, ()


class Note:
    """What a module knows of one of its masked parameters, besides tensors.

    Attributes:
        site: its name, for messages.
        told: what it shall be.
        training: shared by all sites of a model.
        at_gradient: a fingerprint of the weight when a gradient last came back.
        leader: where the parameter is masked, if another module shares it and this one only reads it.
        hardware: what is known of sparse tensor cores, if the layer may use them.
    """

    def __init__(
        self,
        site: str,
        told: Recipe,
        training: Training,
        leader: tuple[Masked, str] | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        self.site, self.told, self.training, self.leader, self.hardware = site, told, training, leader, hardware
        self.at_gradient: float | None = None

    def forget(self) -> None:
        """Know nothing of the weight as it was before."""
        self.at_gradient = None
        if self.hardware is not None:
            self.hardware.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Note, (self.site, self.told, self.training, self.leader, self.hardware)


class MaskedWeight:
    """One masked parameter of a module: a handle, which holds nothing itself.

    Args:
        layer: the module that owns the parameter.
        key: its name there.
    """

    __slots__ = ("key", "layer")

    def __init__(self, layer: Masked, key: str = "weight") -> None:
        self.layer, self.key = layer, key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskedWeight) and other.layer is self.layer and other.key == self.key

    __hash__ = None  # type: ignore[assignment]

    @property
    def site(self) -> str:
        """Its name in messages."""
        return self.layer.nm_notes[self.key].site

    @property
    def told(self) -> Recipe:
        """What it shall be."""
        return self.layer.nm_notes[self.key].told

    @property
    def training(self) -> Training:
        """What all sites of the model share."""
        return self.layer.nm_notes[self.key].training

    @property
    def raw(self) -> nn.Parameter:
        """The dense parameter that the optimizer trains."""
        raw = self.layer._parameters.get(self.key)
        if raw is None:
            raise RuntimeError(
                f"{self.site}: its weight was taken away after conversion, by a parametrization such as weight_norm or by "
                "FullyShardedDataParallel. Finalize the model first, or leave the layer dense; shard with fully_shard."
            )
        return raw

    @property
    def raw_OSC(self) -> Tensor:
        """The raw parameter as ``w_OSC``."""
        return canonical(self.raw, self.told.reduction_axis)

    @property
    def splits_backward(self) -> bool:
        """Whether the layer's own forward sends the input gradient through a weight of its own."""
        return self.layer.nm_splits and self.key == "weight"

    @property
    def state(self) -> Any:
        """The method's state: a NamedTuple of the module's buffers."""
        kind: Any = self.told.method.state_type
        return kind(**{name: self.buffer(name) for name in kind._fields})

    @state.setter
    def state(self, state: Any) -> None:
        for name, value in state._asdict().items():
            buffer = local(self.buffer(name))  # of a sharded one this process's part is set
            if buffer is not value:
                buffer.copy_(value)
        if self.hardware is not None:
            self.hardware.forget()

    @property
    def hardware(self) -> Hardware | None:
        """What is known of sparse tensor cores, if the layer may use them."""
        return self.layer.nm_notes[self.key].hardware

    @property
    def clock(self) -> Tensor:
        """int64 ``[2]``: steps done, steps of the whole run."""
        return self.buffer("clock")

    @property
    def recipe(self) -> Tensor:
        """What it was told to be, as the bytes that travel with the state."""
        return self.buffer("recipe")

    def operand(self) -> Operand:
        """Compute what the module multiplies by, each in the raw parameter's shape and memory format."""
        method, pattern = self.told.method, self.told.pattern
        operand = Operand(*self._as_raw(lambda w_OSC, state: method.operand(w_OSC, state, pattern)))
        self._watch_training(operand.forward)
        return operand

    def forward_weight(self) -> Tensor:
        """Compute the forward one alone."""
        method, pattern = self.told.method, self.told.pattern
        forward: Tensor
        (forward,) = self._as_raw(lambda w_OSC, state: (method.forward_weight(w_OSC, state, pattern),))
        self._watch_training(forward)
        return forward

    def _as_raw(self, compute: Callable[[Tensor, Any], tuple[Tensor | None, ...]]) -> tuple[Any, ...]:
        """Compute weights of ``w_OSC`` and the state; give them as the raw parameter is, sharded if it is."""
        told, raw = self.told, self.raw
        across = told.method.operand_looks_across
        seen = whole(raw) if across else local(raw)
        layout = self._state_layout() if is_sharded(raw) and not across else None
        found = compute(canonical(seen, told.reduction_axis), self.state_beside(layout))
        weights = tuple(None if t is None else restore_like(seen, t, told.reduction_axis) for t in found)
        return tuple(None if t is None else spread(t, raw, across) for t in weights) if is_sharded(raw) else weights

    def mask(self) -> Tensor:
        """Compute the current forward mask: bool, in the raw parameter's shape; training on does not change it.

        A mask that lies in parts on several processes is gathered, for which each of them has to ask.
        """
        told, raw = self.told, whole(self.raw.detach())
        mask_OSC = told.method.mask(canonical(raw, told.reduction_axis), self.state_beside(None), told.pattern)
        return restore_like(raw, mask_OSC, told.reduction_axis).clone()

    def gauges(self) -> dict[str, Tensor]:
        """Give what else its method shows while it trains, by name. Gathers as :meth:`mask` does."""
        told = self.told
        w_OSC = canonical(whole(self.raw.detach()), told.reduction_axis)
        return told.method.gauges(w_OSC, self.state_beside(None), told.pattern)

    def unfinished(self) -> str | None:
        """Say what is missing until the mask is N:M; None when it is. Gathers as :meth:`mask` does."""
        told = self.told
        w_OSC = canonical(whole(self.raw.detach()), told.reduction_axis)
        return told.method.unfinished(w_OSC, self.state_beside(None), told.pattern)

    def state_beside(self, layout: Layout | None) -> Any:
        """Give the state as it belongs beside a part of the weight, or beside the whole of it.

        What is gathered for that is gathered when it is asked for: an operand needs a mask, but no scores.
        """
        if layout is None and not self.state_is_sharded:
            return self.state
        return Beside(self.buffer, layout)

    @property
    def state_is_sharded(self) -> bool:
        """Tell whether the state lies in parts on several processes."""
        return any(is_sharded(self.buffer(name)) for name in self.told.method.state_type._fields)  # type: ignore[attr-defined]

    def shard_state(self) -> None:
        """Let the state lie where the parts of a sharded weight lie.

        Raises:
            TrainingError: if the weight is sharded in a way that cuts blocks.
        """
        if not is_sharded(self.raw):
            return
        layout = self._state_layout()
        for name in buffer_names(self.key, self.told):
            buffer = self.layer._buffers[name]
            assert buffer is not None
            if not (is_sharded(buffer) and layout_of(buffer) == layout):
                buffer = whole(buffer)  # tensor parallelism makes its own of all buffers
                self.layer._buffers[name] = shard(buffer, layout) if is_per_weight(buffer) else buffer

    def _state_layout(self) -> Layout:
        return state_layout(self.raw, self.told.reduction_axis, self.told.pattern.m, self.site)

    def buffer(self, name: str) -> Tensor:
        """Give one of the buffers that stand beside the parameter."""
        buffer = self.layer._buffers[_prefix(self.key) + name]
        assert buffer is not None
        return buffer

    def _watch_training(self, operand: Tensor) -> None:
        """Warn once if the weight has changed since a gradient came back, and no optimizer runs the method's steps."""
        if torch.compiler.is_compiling():
            return
        note = self.layer.nm_notes[self.key]
        shared, method = note.training, note.told.method
        if not (self.layer.training and operand.requires_grad and method.needs_attach):
            return
        if not isinstance(self.raw, nn.Parameter):
            return  # called with other weights, through torch.func
        if shared.warned or note.site in shared.attached:
            return
        if note.at_gradient is None or note.at_gradient == self._fingerprint():
            operand.register_hook(self._note_gradient)  # type: ignore[no-untyped-call]
            return
        shared.warned = True
        warnings.warn(
            f"{note.site} is trained with the method {method.name}, but no optimizer is attached: "
            f"{method.unattached}. After making the optimizer, add: "
            "nmgraph.attach(model, optimizer, total_steps=...)",
            stacklevel=5,
        )

    def _note_gradient(self, gradient: Tensor) -> None:
        self.layer.nm_notes[self.key].at_gradient = self._fingerprint()

    def _fingerprint(self) -> float:
        # Not the tensor's version: fused optimizers do not count it up.
        return float(local(self.raw.detach()).flatten()[:256].double().sum())


def class_name(module: nn.Module) -> str:
    """Name the class that a module has, or had before it became sparse."""
    return (module.nm_base if isinstance(module, Masked) else type(module)).__name__


class Masked(nn.Module):
    """Mixin in front of a module's own class; made by :func:`sparsify`, undone by :func:`unmask`."""

    nm_base: ClassVar[type[nn.Module]]
    nm_keys: ClassVar[tuple[str, ...]]
    nm_splits: ClassVar[bool] = False
    nm_accelerates: ClassVar[bool] = False

    nm_notes: dict[str, Note]

    def extra_repr(self) -> str:
        """Add patterns and method to what the module says of itself."""
        keys = [key for key, note in self.nm_notes.items() if note.leader is None]
        tolds = {key: self.nm_notes[key].told for key in keys}
        own = [f"{'' if k == 'weight' else f'{k}: '}{t.pattern} {t.method.name}" for k, t in tolds.items()]
        return ", ".join(filter(None, [super().extra_repr(), *own]))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for key, note in self.nm_notes.items():
            if not note.leader and is_sharded(self._parameters.get(key)):
                MaskedWeight(self, key).shard_state()
        own = {name: self._buffers.pop(name) for name in self._own_buffer_names()}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(own)
        for name, before in own.items():
            assert before is not None
            after = _applied(fn, before)
            # So are model.half() and .to(bfloat16); scores and averages would drown in so few bits.
            self._buffers[name] = after if after.dtype == before.dtype else before.to(device=after.device)
        for note in self.nm_notes.values():
            note.forget()
        return self

    def _own_buffer_names(self) -> list[str]:
        return [n for key, note in self.nm_notes.items() if not note.leader for n in buffer_names(key, note.told)]

    def _empty_buffers(self) -> dict[str, Tensor]:
        buffers = {name: self._buffers[name] for name in self._own_buffer_names()}
        return {name: t for name, t in buffers.items() if t is not None and t.numel() == 0}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # What writes safetensors takes all empty tensors for one shared tensor, and leaves out all but one.
        for name in self._empty_buffers():
            del destination[prefix + name]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for key, note in self.nm_notes.items():
            theirs = state_dict.get(f"{prefix}{_prefix(key)}recipe")
            if isinstance(theirs, Tensor) and not _same(theirs.cpu(), note.told.to_tensor()):
                error_msgs.append(
                    f"{note.site} was trained as {Recipe.describe_tensor(theirs)}, but this model is converted as "
                    f"{note.told}. Convert it the same way before loading."
                )
                return
            clock = state_dict.get(f"{prefix}{_prefix(key)}clock")
            if isinstance(clock, Tensor) and clock.is_floating_point():
                error_msgs.append(
                    f"{note.site}: {prefix}{_prefix(key)}clock is {clock.dtype}, which cannot count steps. Cast only weights, "
                    "or load the checkpoint as it was saved."
                )
                return
            note.forget()
            if note.hardware is not None:
                note.hardware.close()  # the masks that are loaded may be of an earlier time
        for name, buffer in self._empty_buffers().items():
            state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on the fly, so a pickle names the module's own class and makes it again.
        return _rebuild, (self.nm_base, self.nm_keys, self.nm_splits, self.nm_accelerates), self.__getstate__()  # type: ignore[no-untyped-call]


class SplitMasked(Masked):
    """Masked layer whose input gradient uses a weight of its own."""

    nm_splits = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Multiply by the masked weight; send the input gradient through the backward one."""
        x, *rest = (*args, *kwargs.values())  # torch calls the first one input, others x
        masked = MaskedWeight(self)
        operand = masked.operand()
        if operand.backward is None:
            raise RuntimeError(f"{masked.site}: {masked.told.method.name} promised a backward weight and gave none.")
        return split_forward(self, x, operand.forward, operand.backward, *rest)


class AcceleratedMasked(Masked):
    """Masked layer that multiplies on sparse tensor cores where it may and gains by it."""

    nm_accelerates = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Multiply by the masked weight."""
        y = product(MaskedWeight(self), *args, *kwargs.values())
        return super().forward(*args, **kwargs) if y is None else y


def sparsify(layer: nn.Module, key: str, site: str, recipe: Recipe, training: Training) -> MaskedWeight:
    """Make one parameter of a module sparse-trainable, in place.

    Args:
        layer: any module; a layer of a known kind gets a split backward where the method has one.
        key: name of the parameter in it.
        site: its qualified name, for messages.
        recipe: what it shall be.
        training: shared by all sites of a model.
    """
    raw = layer._parameters[key]
    assert raw is not None
    assert not (isinstance(layer, Masked) and key in layer.nm_notes)
    with torch.no_grad():
        state = _initial_state(raw, recipe)
    clock = torch.zeros(2, dtype=torch.int64, device=raw.device)  # steps done, total
    values = (*state, clock, recipe.to_tensor())
    buffers = dict(zip(buffer_names(key, recipe), values, strict=True))
    taken = next((name for name in buffers if hasattr(layer, name)), None)
    if taken is not None:
        raise ConversionError(f"{site}: {type(layer).__name__} has a {taken} of its own. Rename it, or leave it dense.")
    splits = recipe.method.splits_backward and key == "weight" and is_layer(layer)
    try:
        masked = _take_note(layer, key, Note(site, recipe, training), splits)
    except (TypeError, AttributeError) as error:
        raise ConversionError(
            f"{site}: no class can be made from {type(layer).__name__}: {error}. Leave it dense with --skip {site}."
        ) from error
    for name, value in buffers.items():
        layer._buffers[name] = value.to(raw.device)
    return MaskedWeight(masked, key)


def _initial_state(raw: Tensor, recipe: Recipe) -> Any:
    w_OSC = canonical(raw, recipe.reduction_axis)
    try:
        state = recipe.method.init(w_OSC, recipe.pattern)
    except NotImplementedError:
        if not raw.is_meta:
            raise
        # This method looks at values, which a weight on the meta device has not.
        zeros = torch.zeros_like(raw, device="cpu")
        state = recipe.method.init(canonical(zeros, recipe.reduction_axis), recipe.pattern)
    return state._make(_laid_out_like(w_OSC, t) if t.shape == w_OSC.shape else t for t in state)


def _laid_out_like(w_OSC: Tensor, t_OSC: Tensor) -> Tensor:
    """Arrange in memory as the weight is, so that the two can be gone through together."""
    if t_OSC.stride() == w_OSC.stride():
        return t_OSC
    return torch.empty_like(w_OSC, dtype=t_OSC.dtype, device=t_OSC.device).copy_(t_OSC)


def accelerate(weight: MaskedWeight, hardware: Hardware | None) -> None:
    """Let a layer multiply on sparse tensor cores, in place, or no longer."""
    layer, uses = weight.layer, hardware is not None and hardware.mode != "off"
    layer.nm_notes[weight.key].hardware = hardware
    if weight.key == "weight" and layer.nm_accelerates != uses:
        _give_class(layer, _masked_class(layer.nm_base, layer.nm_keys, layer.nm_splits, uses))


def follow(layer: nn.Module, key: str, leader: MaskedWeight) -> None:
    """Let a module that shares a masked parameter read it masked, too, in place."""
    note = Note(leader.site, leader.told, leader.training, (leader.layer, leader.key))
    _take_note(layer, key, note, splits=False)


def unmask(layer: Masked) -> None:
    """Give a module its own class back, in place; its parameters stay dense."""
    for key, note in layer.nm_notes.items():
        for name in () if note.leader else buffer_names(key, note.told):
            del layer._buffers[name]
            layer._non_persistent_buffers_set.discard(name)
    _give_class(layer, layer.nm_base)
    del layer.__dict__["nm_notes"]


def unmask_all(model: nn.Module) -> None:
    """Give every changed module of a model its own class back, in place; its parameters stay dense."""
    for module in list(masked_modules(model)):
        unmask(module)


def masked_modules(model: nn.Module) -> Iterator[Masked]:
    """Find all modules that were changed, each once."""
    return (module for module in model.modules() if isinstance(module, Masked))


def masked_weights(model: nn.Module) -> dict[str, MaskedWeight]:
    """Find all masked weights by the names of their sites as seen from here, each once."""
    return {
        site_name(path, key): MaskedWeight(module, key)
        for path, module in model.named_modules()
        if isinstance(module, Masked)
        for key, note in module.nm_notes.items()
        if note.leader is None
    }


def site_name(path: str, key: str) -> str:
    """Name a site: by its parameter, with a final ``.weight`` left away.

    >>> site_name("encoder.attn", "in_proj_weight"), site_name("head", "weight"), site_name("", "weight")
    ('encoder.attn.in_proj_weight', 'head', '')
    """
    return path if key == "weight" else f"{path}.{key}".lstrip(".")


def buffer_names(key: str, told: Recipe) -> list[str]:
    """Name the buffers that stand beside a masked parameter."""
    return [_prefix(key) + name for name in (*told.method.state_type._fields, "clock", "recipe")]  # type: ignore[attr-defined]


def _applied(fn: Any, buffer: Tensor) -> Tensor:
    if is_sharded(buffer):
        return fn(buffer)  # type: ignore[no-any-return]
    order = memory_order(buffer)
    laid = in_memory_order(buffer, order)
    # Flat, as a memory format is about weights.
    return out_of_memory_order(fn(laid.flatten()).reshape(laid.shape), order)


def _give_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    object.__setattr__(layer, "__class__", cls)  # a module may have a __setattr__ of its own


def _take_note(layer: nn.Module, key: str, note: Note, splits: bool) -> Masked:
    if not isinstance(layer, Masked):
        _give_class(layer, _masked_class(type(layer), (key,), splits))
        layer.__dict__["nm_notes"] = {}
    elif key not in layer.nm_keys:
        splits = layer.nm_splits or splits
        _give_class(layer, _masked_class(layer.nm_base, (*layer.nm_keys, key), splits, layer.nm_accelerates))
    masked: Any = layer
    masked.nm_notes[key] = note
    return masked  # type: ignore[no-any-return]


def _prefix(key: str) -> str:
    return PREFIX if key == "weight" else f"{PREFIX}{key}_"


def _masked_class(
    base: type[nn.Module], keys: tuple[str, ...], splits: bool, accelerates: bool = False
) -> type[nn.Module]:
    kind = (base, keys, splits, accelerates)
    if kind not in _CLASSES:
        mixins = (*([AcceleratedMasked] if accelerates else []), SplitMasked if splits else Masked)
        # The base's own __module__: tracers take torch.nn's layers as leaves by it, and must go on doing so.
        names = {"nm_base": base, "nm_keys": keys, "__module__": base.__module__}
        properties = {key: _masked_property(key) for key in keys}
        made: Any = type(f"NM{base.__name__}", (*mixins, base), names | properties)
        _CLASSES.setdefault(kind, made)
    return _CLASSES[kind]


def _masked_property(key: str) -> property:
    """Make the property that stands in front of a parameter: masked, in the shape and dtype of the raw one."""

    def read(self: Masked) -> Tensor:
        note = self.nm_notes[key]
        try:
            masked = MaskedWeight(*(note.leader or (self, key)))
            if _wants_the_parameter():
                return masked.raw
            return masked.forward_weight()
        except AttributeError as error:
            # nn.Module would answer an AttributeError with the raw, dense parameter.
            raise RuntimeError(f"{note.site}: the masked weight could not be computed: {error}") from error

    def write(self: Masked, value: Tensor) -> None:
        # nn.Module takes Parameters before they come here; DataParallel gives its replicas plain tensors.
        self._parameters[key] = value  # type: ignore[assignment]

    return property(read, write)


def _wants_the_parameter() -> bool:
    """Tell whether who reads the attribute looks for the parameter itself, as torch does where it shards models.

    Given the masked weight, ``fully_shard`` would take that for the parameter, and train it instead.
    """
    return not torch.compiler.is_compiling() and sys._getframe(2).f_code.co_name in _SHARDING


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _rebuild(base: type[nn.Module], keys: tuple[str, ...], splits: bool, accelerates: bool = False) -> nn.Module:
    cls = _masked_class(base, keys, splits, accelerates)
    return cls.__new__(cls)
