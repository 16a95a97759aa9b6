"""What a training method is: pure functions of tensors, at two moments of a step.

In the forward, ``Method.operand`` says what the layer multiplies by: a weight for the product, and perhaps one for the
input gradient. Before ``optimizer.step``,
``Method.update`` sees the reduced, unscaled, accumulated gradient once, gives back the one the optimizer
shall use, and moves the method's state on. A method never owns tensors and never sees a module: its state is a
NamedTuple of tensors which the layer keeps as buffers. Weights, gradients and masks come and go as ``w_OSC``
(see ``nmgraph.nm.grouping``), so that no method knows about layer kinds.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor

from nmgraph.methods.schedule import check_choice
from nmgraph.nm.masks import check_blocks
from nmgraph.nm.pattern import Pattern

State = TypeVar("State", bound=tuple[Any, ...])


class Operand(NamedTuple):
    """What a layer multiplies by.

    Attributes:
        forward: ``w_OSC`` of ``Y = X Wᵀ``; the gradient of the weight flows through it.
        backward: ``w_OSC`` of ``dX = dY W`` where it differs; None means the same, and then the layer is an
            ordinary linear or convolution with nothing added.
    """

    forward: Tensor
    backward: Tensor | None = None


class Update(NamedTuple):
    """What a step does.

    Attributes:
        state: the state after it.
        grad: the gradient for the optimizer, ``w_OSC``.
        restart: bool ``w_OSC``, weights that begin anew: set to zero before the step, with the optimizer's moments of
            them cleared.
    """

    state: Any
    grad: Tensor
    restart: Tensor | None = None


class Work(NamedTuple):
    """Shares of a layer's dense multiply-accumulates that one step needs, as far as a method can say beforehand.

    Zeros in a weight are not counted where it multiplies, nor results that nothing reads. Whether a machine can leave
    them out is another question (:mod:`nmgraph.accounting`).

    Attributes:
        forward: of ``Y = X Wᵀ``.
        input_gradient: of ``dX = dY W``.
        weight_gradient: of ``dW = dYᵀ X``.
    """

    forward: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True)
class Clock:
    """Where training is, at the moment of one update.

    Attributes:
        step: optimizer steps completed before this one.
        total_steps: steps of the whole run, as given to ``attach``.
        learning_rate: the weight's current learning rate; a tensor under capturable optimizers.
        fresh: the first update after ``attach`` or after loading, when a schedule cannot rely on the step before.
    """

    step: int
    total_steps: int
    learning_rate: float | Tensor
    fresh: bool = False

    @property
    def progress(self) -> float:
        """Share of the run that is done once this step is taken; stays at 1 beyond the end."""
        return min(1.0, (self.step + 1) / self.total_steps)

    @property
    def progress_before(self) -> float:
        """Share of the run that was done before this step."""
        return min(1.0, self.step / self.total_steps)

    @property
    def next(self) -> Clock:
        """The clock of the following update, at the same learning rate."""
        return Clock(self.step + 1, self.total_steps, self.learning_rate)


@dataclass(frozen=True)
class Preset:
    """Published settings of a method, by a name such as ``paper``.

    Attributes:
        options: of the method.
        training: the recipe around it, which is the user's own loop to set.
        keep_dense: layers that were left dense.
        block_axis: along what the blocks ran, ``channels`` or ``flat``.
    """

    options: Mapping[str, Any]
    training: str
    keep_dense: tuple[str, ...] = ("stem", "head")
    block_axis: str = "channels"


@dataclass(frozen=True)
class Method(ABC, Generic[State]):
    """One published idea. Subclasses are frozen dataclasses: configuration and method at once.

    Class attributes say what ``nmgraph methods`` shows: ``name``, ``title``, ``paper``, ``gradient`` (how the
    weight's gradient flows), ``state_cost`` and ``time_cost``; ``unattached`` says what is
    missing in training without ``attach``; ``state_type`` is the NamedTuple of its state; ``presets`` are published
    settings by name; ``choices`` are the values of an option that is one of a few words.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    gradient: ClassVar[str]
    state_cost: ClassVar[str]
    time_cost: ClassVar[str]
    unattached: ClassVar[str]
    state_type: ClassVar[type[tuple[Any, ...]]]
    presets: ClassVar[Mapping[str, Preset]]
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for option, known in self.choices.items():
            check_choice(self.name, option, getattr(self, option), known)

    @property
    def splits_backward(self) -> bool:
        """Tell whether there is always a ``backward_weight``."""
        return False

    @property
    def sparse_input_gradient(self) -> bool:
        """Tell whether what ``dX`` is multiplied by is N:M along rows of the weight, as sparse kernels would need it."""
        return self.splits_backward

    @property
    def straight_through(self) -> bool:
        """Tell whether all of the gradient of ``forward_weight`` goes to ``w_OSC`` as it is."""
        return False

    @property
    def backward_by_magnitude(self) -> bool:
        """Tell whether ``backward_weight`` is the N largest of every M in a column of the forward one, in ``row_order``.

        What keeps more while it is not N:M yet may say so, too.
        """
        return False

    @property
    def needs_attach(self) -> bool:
        """Tell whether training without ``attach`` would not be this method."""
        return True

    @property
    def operand_looks_across(self) -> bool:
        """Tell whether what a block multiplies by, or its mask, depends on other blocks."""
        return False

    def update_looks_across(self, clock: Clock) -> bool:
        """Tell whether an update decides about a block by others, or draws for the weight as a whole.

        Where neither looks across, a process that holds some rows of a weight does without the others.
        """
        return False

    def refusal(self, pattern: Pattern) -> str | None:
        """Say why the method cannot take a pattern, with the nearest choice; None if it can."""
        return None

    def too_short(self, total_steps: int) -> str | None:
        """Say what of the method will not happen in so many steps; None if all of it can."""
        return None

    @abstractmethod
    def init(self, w_OSC: Tensor, pattern: Pattern) -> State:
        """Make the state for a weight."""

    @abstractmethod
    def forward_weight(self, w_OSC: Tensor, state: State, pattern: Pattern) -> Tensor:
        """Give the weight of ``Y = X Wᵀ``; differentiable with respect to ``w_OSC``."""

    def backward_weight(self, forward_OSC: Tensor, state: State, pattern: Pattern) -> Tensor | None:
        """Give the weight of ``dX = dY W`` if it is not the forward one, which is given; without a gradient."""
        return None

    def row_order(self, state: State) -> Tensor | None:
        """Give the order of rows, int64 ``[O]``, in which the weight of ``dX`` is N:M along them; None is their own."""
        return None

    def operand(self, w_OSC: Tensor, state: State, pattern: Pattern) -> Operand:
        """Say what the layer multiplies by, both ways."""
        forward = self.forward_weight(w_OSC, state, pattern)
        return Operand(forward, self.backward_weight(forward, state, pattern))

    @abstractmethod
    def update(self, w_OSC: Tensor, grad_OSC: Tensor, state: State, pattern: Pattern, clock: Clock) -> Update:
        """Take one step: once per optimizer step, before it, without autograd."""

    @abstractmethod
    def mask(self, w_OSC: Tensor, state: State, pattern: Pattern) -> Tensor:
        """Give the current forward mask, bool ``[O, S, C]``."""

    def work(self, pattern: Pattern, clock: Clock) -> Work:
        """Say what the step that ``clock`` stands before will need; by default all of it."""
        return Work(1.0, 1.0, 1.0)

    def gauges(self, w_OSC: Tensor, state: State, pattern: Pattern) -> dict[str, Tensor]:
        """Give what else there is to watch while this method trains: numbers by name, each a mean over the blocks."""
        return {}

    def conclude(self, w_OSC: Tensor, state: State, pattern: Pattern) -> State:
        """Bring an unfinished state to its end at once, by what it knows by now."""
        return state

    def unfinished(self, w_OSC: Tensor, state: State, pattern: Pattern) -> str | None:
        """Say what is missing until the mask is N:M; None when it is."""
        check = check_blocks(self.mask(w_OSC, state, pattern), pattern)
        if check.holds:
            return None
        return f"{check.violations:,} of {check.blocks:,} blocks still keep more than {pattern.n} of {pattern.m}"

    def options(self) -> dict[str, Any]:
        """Give the configuration as plain values, by name; 0 given for 0.0 is the same and looks the same."""
        kinds: dict[str, Any] = {f.name: type(f.default) for f in dataclasses.fields(self)}
        return {name: kind(getattr(self, name)) for name, kind in kinds.items()}
