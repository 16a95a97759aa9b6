"""A recipe as a file: what ``convert`` takes, but for the model and its inputs, as JSON that people edit.

    {"nmgraph_recipe": 1, "method": "lbc", "pattern": "2:4", "layers": {"stages.*": "1:4"}, "skip": ["head"]}

Every key but the version may be left away, and means then what it means to ``convert``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nmgraph.errors import FileError, PatternError
from nmgraph.files import require_writable, written_atomically
from nmgraph.methods import defaults_of
from nmgraph.nm.pattern import Pattern

VERSION_KEY, VERSION = "nmgraph_recipe", 1


@dataclass(frozen=True)
class RecipeFile:
    """Arguments of ``convert``, under its own names; ``options`` are those of the method.

    What is ``None`` or empty is not given.
    """

    method: str = "lbc"
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    preset: str | None = None
    pattern: str = "2:4"
    layers: dict[str, str] = field(default_factory=dict)
    skip: list[str] = field(default_factory=list)
    include: list[str] = field(default_factory=list)
    keep_dense: list[str] | None = None
    block_axis: str | None = None
    permute_channels: bool = False
    mode: str = "auto"

    def arguments(self) -> dict[str, Any]:
        """Give the keyword arguments of ``convert``.

        Raises:
            MethodError: for options that are not the method's; some have names of other arguments.
        """
        defaults_of(self.method, self.options)
        named = asdict(self)
        return {**named.pop("options"), **named}

    def plan_arguments(self) -> dict[str, Any]:
        """Give the keyword arguments of ``inspect``, which decides what becomes of sites and changes none."""
        beyond = ("mode", "permute_channels")
        return {key: value for key, value in self.arguments().items() if key not in beyond}

    def with_more(self, given: Mapping[str, Any]) -> RecipeFile:
        """Put what was given beside the file over it: values replace, lists and mappings go behind the file's.

        Options and preset of the file are those of its method, and go with it.
        """
        own = asdict(self)
        if given.get("method", self.method) != self.method:
            own |= {"options": {}, "preset": None}
        for key, value in given.items():
            if isinstance(value, Mapping):
                value = {k: v for k, v in own[key].items() if k not in value} | dict(
                    value
                )  # the last that matches counts
            elif key in ("skip", "include"):
                value = [*own[key], *value]
            own[key] = value
        return RecipeFile(**own)

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Write it.

        Raises:
            FileError: if it exists and may not be replaced, or can't be written; nothing is changed then.
        """
        require_writable(path, overwrite=overwrite)
        usual = asdict(RecipeFile())
        shown = ("method", "pattern", "layers", "skip")  # these also where they are as usual: to be edited
        given = {k: v for k, v in asdict(self).items() if k in shown or v != usual[k]}
        with written_atomically(path) as temporary:
            temporary.write_text(json.dumps({VERSION_KEY: VERSION, **given}, indent=2) + "\n", encoding="utf-8")


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe.

    Raises:
        FileError: naming the key, what was found and what is expected.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark at the beginning
        values = json.loads(text, object_pairs_hook=_each_key_once, parse_constant=_no_number)
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist.") from error
    except OSError as error:
        raise FileError(f"{path} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise FileError(f"{path} is no recipe: it can't be read as JSON ({error}).") from error
    if not isinstance(values, dict) or VERSION_KEY not in values:
        raise FileError(f'{path} is no recipe. It has to be a JSON object that begins with "{VERSION_KEY}": {VERSION}.')
    version = values.pop(VERSION_KEY)
    if type(version) is not int or version < 1:
        raise FileError(f'{path}: "{VERSION_KEY}" is {version!r:.40}; it has to be {VERSION}.')
    if version > VERSION:
        raise FileError(
            f"{path} is a recipe of version {version}, and this nmgraph reads up to {VERSION}. Update nmgraph."
        )
    known = {f.name for f in fields(RecipeFile)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It knows {', '.join(sorted(known))}."
            raise FileError(f"{path}: a recipe has no key {key!r:.80}. {hint}")
        expected, holds = _KINDS[key]
        if not holds(value):
            raise FileError(f"{path}: {key!r} is {json.dumps(value):.80}; it has to be {expected}.")
    try:
        for pattern in (values.get("pattern", "2:4"), *values.get("layers", {}).values()):
            Pattern.parse(pattern)
    except PatternError as error:
        raise FileError(f"{path}: {error}") from error
    return RecipeFile(**values)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; of a name that stands there twice, one would be lost.

    Raises:
        ValueError: naming it.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{twice!r:.80} stands there twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_patterns(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_options(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, (bool, int, float, str)) for v in value.values())


def _or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


_TEXTS = 'a list of globs, such as ["head", "blocks.0.*"]'
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "method": ('a method\'s name, such as "lbc"', _is_text),
    "options": ('an object of the method\'s options, such as {"t_f": 0.5}', _is_options),
    "preset": ('a name, such as "paper", or null', _or_null(_is_text)),
    "pattern": ('N:M, such as "2:4"', _is_text),
    "layers": ('an object of patterns by glob, such as {"blocks.*": "1:4"}', _is_patterns),
    "skip": (_TEXTS, _is_texts),
    "include": (_TEXTS, _is_texts),
    "keep_dense": ('a list such as ["stem", "head"], or null', _or_null(_is_texts)),
    "block_axis": ('"channels" or "flat", or null', _or_null(_is_text)),
    "permute_channels": ("true or false", lambda value: isinstance(value, bool)),
    "mode": ('"auto" or "graph"', lambda value: value in ("auto", "graph")),
}
