"""Floor 1: one published idea per file. Tensors only: no modules, graphs or files."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from nmgraph.errors import MethodError
from nmgraph.methods.asp import ASP
from nmgraph.methods.bame import BAME
from nmgraph.methods.bimask import BiMask
from nmgraph.methods.contract import Method, Preset
from nmgraph.methods.decaying_mask import DecayingMask
from nmgraph.methods.gradual import Gradual
from nmgraph.methods.lbc import LBC
from nmgraph.methods.maxq import MaxQ
from nmgraph.methods.rigl import RigL
from nmgraph.methods.srste import SRSTE
from nmgraph.methods.sste import SSTE
from nmgraph.methods.static import Static
from nmgraph.methods.tmask import TMask

_ALL: tuple[type[Method[Any]], ...] = (
    ASP, BAME, BiMask, DecayingMask, Gradual, LBC, MaxQ, RigL, SRSTE, SSTE, Static, TMask,
)  # fmt: skip
METHODS: MappingProxyType[str, type[Method[Any]]] = MappingProxyType({m.name: m for m in _ALL})
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
    defaults = defaults_of(method, options)
    for key, value in options.items():
        expected = type(defaults[key])
        if isinstance(value, bool) is not (expected is bool) or not isinstance(
            value, (int, float) if expected is float else expected
        ):
            raise MethodError(f"{method}: {key}={value!r} should be a {expected.__name__}, like {defaults[key]!r}.")
    return METHODS[method](**options)


def defaults_of(method: str, wanted: Iterable[str] = ()) -> dict[str, Any]:
    """Give the options of a method, as they are if nothing is said.

    Raises:
        MethodError: for an unknown name of a method, or of a wanted option.
    """
    if method not in METHODS:
        raise MethodError(f"there is no method {method!r}.{_near(str(method), list(METHODS))} See `nmgraph methods`.")
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(METHODS[method])}
    unknown = next((key for key in wanted if key not in defaults), None)
    if unknown is not None:
        raise MethodError(f"{method} has no option {unknown!r}.{_near(unknown, list(defaults))}")
    return defaults


def find_preset(method: str | Method[Any], name: str) -> Preset:
    """Find published settings of a method by name.

    Raises:
        MethodError: for an unknown name, or beside a method that is configured already.
    """
    if isinstance(method, Method):
        raise MethodError(
            f"{method} is configured already, so the preset {name!r} can't be set. Name the method instead."
        )
    presets = type(make_method(method)).presets
    if name not in presets:
        raise MethodError(f"{method} has no preset {name!r}.{_near(name, list(presets))}")
    return presets[name]


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else f" It knows {', '.join(known)}."
