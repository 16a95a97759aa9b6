"""What a shell completes the values of arguments and options to; where nothing is suggested, it offers files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import typer

from nmgraph.checkpoint.named_models import LIBRARIES
from nmgraph.methods import METHODS
from nmgraph.methods.contract import Method

Suggest = Callable[[typer.Context, str], list[str]]


def words(*known: str) -> Suggest:
    """Suggest from a list."""

    def suggest(_: typer.Context, incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return suggest


def models(_: typer.Context, incomplete: str) -> list[str]:
    """Suggest a library once its name is begun: what it has would take its import, and all else is a file."""
    return [f"{library}:" for library in LIBRARIES if incomplete and library.startswith(incomplete)]


def presets(context: typer.Context, incomplete: str) -> list[str]:
    """Suggest the presets of the chosen method."""
    return [name for name in _method(context).presets if name.startswith(incomplete)]


def settings(context: typer.Context, incomplete: str) -> list[str]:
    """Suggest the options of the chosen method, each with its default and the other words it may be."""
    method = _method(context)
    found = [
        f"{field.name}={value}"
        for field in dataclasses.fields(method)
        for value in method.choices.get(field.name) or _values(field.default)
    ]
    return [text for text in found if text.startswith(incomplete)]


def _values(default: Any) -> list[str]:
    return ["true", "false"] if isinstance(default, bool) else [str(default)]


def _method(context: typer.Context) -> type[Method[Any]]:
    return METHODS.get(context.params.get("method") or "lbc", METHODS["lbc"])


methods = words(*METHODS)
patterns = words("2:4", "1:4", "4:8", "2:8", "1:16", "1:2")
precisions = words("fp32", "fp16", "bf16")
axes = words("channels", "flat")
ends = words("stem,head", "stem", "head")
