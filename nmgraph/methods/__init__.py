"""Floor 1: one published idea per file. Tensors only: no modules, graphs or files."""

from __future__ import annotations

import dataclasses
import difflib
from types import MappingProxyType
from typing import Any

from nmgraph.errors import MethodError
from nmgraph.methods.asp import ASP
from nmgraph.methods.contract import Method
from nmgraph.methods.lbc import LBC
from nmgraph.methods.srste import SRSTE

METHODS: MappingProxyType[str, type[Method[Any]]] = MappingProxyType({m.name: m for m in (ASP, LBC, SRSTE)})
"""Every training method by its name."""


def make_method(method: str | Method[Any], options: dict[str, Any] | None = None) -> Method[Any]:
    """Turn a name and options into a method; a configured method passes through.

    Raises:
        MethodError: for an unknown name or option, an option of the wrong type, or options beside a method
            that is configured already.
    """
    options = options or {}
    if isinstance(method, Method):
        if options:
            raise MethodError(
                f"{method} is configured already, so {', '.join(options)} can't be set beside it. "
                f"Set them where it is made: {type(method).__name__}({', '.join(f'{k}=...' for k in options)})."
            )
        return method
    if method not in METHODS:
        raise MethodError(f"there is no method {method!r}.{_near(str(method), list(METHODS))} See `nmgraph methods`.")
    cls = METHODS[method]
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls)}
    for key, value in options.items():
        if key not in defaults:
            raise MethodError(f"{method} has no option {key!r}.{_near(key, list(defaults))}")
        expected = type(defaults[key])
        if isinstance(value, bool) is not (expected is bool) or not isinstance(
            value, (int, float) if expected is float else expected
        ):
            raise MethodError(f"{method}: {key}={value!r} should be a {expected.__name__}, like {defaults[key]!r}.")
    return cls(**options)


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else f" It knows {', '.join(known)}."
