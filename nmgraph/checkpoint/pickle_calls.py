"""What a pickle calls, found without running it.

``torch.load(weights_only=True)`` calls every class that it may name, with arguments of the file's choosing: a layer of
any size would be made, and a library's constructor do whatever it does. Modules, though, are built without their
constructors; what has to be called is a short list of torch's functions.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any

_PLAIN = frozenset(
    ("collections.OrderedDict", "collections.Counter", "_codecs.encode", "functools.partial", "torch.Size", "torch.device",
     "torch.serialization._get_layout", "builtins.set", "__builtin__.set", "builtins.complex", "__builtin__.complex",
     *(f"torch._utils._rebuild_{name}" for name in (
         "parameter", "parameter_with_state", "qtensor", "tensor", "tensor_v2", "tensor_v3", "sparse_tensor",
         "meta_tensor_no_storage"))),
)  # fmt: skip
_CALLS_ITS_FIRST = "torch._tensor._rebuild_from_type_v2"  # for tensors with attributes


class _Name(str):
    """Something that the pickle names."""

    __slots__ = ()


def find_calls(data: bytes) -> set[str]:
    """Name what a pickle calls, besides the functions that rebuild tensors and plain values.

    Args:
        data: the pickle, of protocol 2 as torch writes it.

    Returns:
        Full names; ``?`` for a call of what it made itself.

    Raises:
        Exception: any, if it is no whole pickle.
    """
    return {name for name in _called(data) if name not in _PLAIN}


def _called(data: bytes) -> Iterator[str]:
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for code, argument, _ in pickletools.genops(data):
        taken = len(code.stack_before)
        if code.name == "GLOBAL":
            stack.append(_Name(str(argument).replace(" ", ".")))
        elif code.name == "MARK":
            below.append(stack)
            stack = []
        elif code.name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = tuple(stack), below.pop()
            stack += [items] if code.name == "TUPLE" else []
        elif code.name in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack[len(stack) - taken :] = [tuple(stack[len(stack) - taken :])]
        elif code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name == "REDUCE":
            arguments = stack.pop()
            name = stack.pop()
            if name == _CALLS_ITS_FIRST:
                name = arguments[0]
            yield str(name) if isinstance(name, _Name) else "?"
            stack.append(None)
        else:
            stack[len(stack) - taken :] = [None] * len(code.stack_after)
