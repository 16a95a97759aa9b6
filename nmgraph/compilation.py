"""When ``torch.compile`` is used, and what happens where it cannot be.

What is compiled can always be computed without, with the same result; compiling it takes seconds, and pays where that
much work is done. The environment variable ``NMGRAPH_COMPILE`` is ``auto`` for that, ``always`` to compile from the
first call on, or ``never``.
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from nmgraph.errors import NMGraphError, first_line

SWITCH = "NMGRAPH_COMPILE"
MODES = ("auto", "always", "never")

Result = TypeVar("Result")

_numbers = itertools.count()
_lock = threading.Lock()
_given_up: set[str] = set()


def may_compile(device: str, *, pays: bool) -> bool:
    """Tell whether to compile for a device; ``pays`` decides unless the user has.

    Raises:
        NMGraphError: if the environment variable has none of the known values.
    """
    mode = os.environ.get(SWITCH, "auto")
    if mode not in MODES:
        raise NMGraphError(f"{SWITCH}={mode} is none of {', '.join(MODES)}.")
    return device not in _given_up and (mode == "always" or (mode == "auto" and pays))


def is_plain(*tensors: Tensor) -> bool:
    """Tell whether these are tensors with memory, and nothing looks on that a kernel would pass by."""
    return (
        tensors[0].device.type in ("cpu", "cuda")
        and all(type(t) is Tensor for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_inference_mode_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        # A default device is a mode, too, which minds only where new tensors are made.
        and all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_exporting() -> bool:
    """Tell whether ``torch.export`` looks on."""
    # Not torch.compiler.is_exporting(): to torch 2.11 each trace for torch.compile is an export as well.
    return torch.compiler._is_exporting_flag


class Compiled:
    """A function of tensors and numbers that writes into the first one, compiled once for all sizes.

    Which dtypes, devices and sizes of 1 there are makes a version of its own; nothing else may.

    Args:
        function: what to compile.
        pays: how much of its work has to be done before compiling it pays, in whatever :meth:`attempt` counts.
    """

    def __init__(self, function: Callable[..., None], pays: int) -> None:
        self._function, self._pays = function, pays
        self._done = 0
        self._versions: dict[tuple[Any, ...], Callable[..., None]] = {}

    def attempt(self, work: Callable[[], Result], amount: int, device: torch.device) -> Result | None:
        """Do some work that calls this; None where that does not pay yet or does not succeed."""
        self._done += amount
        if not may_compile(device.type, pays=self._done >= self._pays):
            return None
        try:
            return work()
        except Exception as error:  # whatever a compiler may lack; the other ways need none
            give_up(device.type, error)
            return None

    def __call__(self, *args: Any) -> None:
        """Call it; the first call of a version takes seconds."""
        tensors = [t for t in args if isinstance(t, Tensor)]
        key = tuple((t.dtype, t.device, *(size == 1 for size in t.shape)) for t in tensors)
        version = self._versions.get(key)
        if version is None:
            with _lock, torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
                version = self._versions[key] = self._compile(args, tensors[0].device)
        version(*args)

    def _compile(self, args: tuple[Any, ...], device: torch.device) -> Callable[..., None]:
        # Dynamo counts recompilations by code object, which all closures of one function would share.
        own: Any = self._function
        code = own.__code__.replace(co_name=f"{own.__name__}_{next(_numbers)}")
        renamed = FunctionType(code, own.__globals__, code.co_name, own.__defaults__, own.__closure__)
        lazy: Any = torch.compile(renamed, dynamic=True, fullgraph=True)
        if device.type != "cpu" or not hasattr(lazy, "aot_compile"):
            return lambda *args: _without_modes(lazy, args)
        # Checking what the key has checked would take longer than most calls. So nothing may be taken for granted that
        # only happens to be so in the first call, as two sizes that are equal then.
        with _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            ready = lazy.aot_compile((args, {}))
        ready.disable_guard_check()
        return ready  # type: ignore[no-any-return]


def _without_modes(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
        function(*args)


def give_up(device: str, error: Exception) -> None:
    """Compile no more for a device in this process, and say why, once."""
    if device not in _given_up:
        _given_up.add(device)
        cause = getattr(error, "inner_exception", error)
        warnings.warn(
            f"masks are made without compiled code, which is slower, as torch.compile failed on {device}: {first_line(cause)}. "
            f"{SWITCH}=never does not try it.",
            stacklevel=2,
        )
