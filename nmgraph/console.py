"""What a command prints: results to stdout, everything else to stderr; and how it ends."""

from __future__ import annotations

import json as json_module
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.measure import Measurement, measure_renderables
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.protocol import rich_cast
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from nmgraph.errors import NMGraphError

FINE, FAILED, MISUSED = 0, 1, 2
_ENDLESS = 100_000  # characters; a line that holds any cell


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        values: plain ones, for ``--json``.
        shown: what a person reads.
        brief: all that ``--quiet`` prints.
        note: what to know of it, or to do next.
        code: of the exit.
    """

    values: Any
    shown: Any
    brief: str
    note: str = ""
    code: int = FINE

    def print(self, json: bool, quiet: bool) -> None:
        """Print it, as JSON, as a script needs it, or as a person reads it."""
        if json or quiet:
            sys.stdout.write((json_module.dumps(self.values, indent=2) if json else self.brief) + "\n")
        else:
            console = Console()
            with console.capture() as printed:
                console.print(_Fitted(self.shown))
            sys.stdout.write(re.sub(r" +$", "", printed.get(), flags=re.MULTILINE))
            if self.note:
                console.print(self.note, markup=False, soft_wrap=True)
        sys.stdout.flush()  # a reader that is gone is noticed here, not while Python ends


@contextmanager
def answering(json: bool, quiet: bool, debug: bool) -> Iterator[Callable[[Answer], None]]:
    """Print a command's answer once it is done, and no bar is in the way; turn an error into a message and an exit code."""
    given: list[Answer] = []
    try:
        yield given.append
        for answer in given:
            answer.print(json, quiet)
            raise typer.Exit(answer.code)
    except NMGraphError as error:
        _complain(json, debug, str(error))
    except KeyboardInterrupt:
        _complain(json, debug, "interrupted; nothing was written.")
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        _complain(
            json, debug, f"internal error: {type(error).__name__}: {error}\nPlease report it, with what --debug shows."
        )


def _complain(json: bool, debug: bool, message: str) -> None:
    if debug:
        traceback.print_exc()
    if json:
        _print_error(message)
    else:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(MISUSED)


def _print_error(message: str) -> None:
    sys.stdout.write(json_module.dumps({"error": message}) + "\n")


class Commands(TyperGroup):
    """The commands; a call that can't be understood is said in JSON if it asks for JSON."""

    def main(self, *positional: Any, **settings: Any) -> Any:
        """Run a command, and exit."""
        if "--json" not in (settings.get("args") or sys.argv[1:]):
            return super().main(*positional, **settings)
        try:
            code = super().main(*positional, **{**settings, "standalone_mode": False})
        except typer.TyperException as error:
            _print_error(error.format_message())
            code = MISUSED
        sys.exit(code)


def typed(words: Sequence[str]) -> str:
    """Write a call as it is typed; the shells of Windows quote in another way."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


@contextmanager
def progress_bar(hidden: bool, stages: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr while a person waits; none where nobody watches."""
    console = Console(file=sys.stderr)  # kept: the exporter's own output to stderr is silenced meanwhile
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task("reading", total=stages + 1)
        begun = ""

        def advance(stage: str) -> None:
            nonlocal begun
            before, begun = begun, stage.partition(":")[0]  # what follows tells how far the same stage is
            bar.update(task, description=stage, advance=begun != before)

        yield advance


@dataclass(frozen=True)
class _Fitted:
    """Something to print, with the rows of a table as paragraphs where its columns would break words."""

    shown: Any

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = rich_cast(self.shown)
        if isinstance(shown, Group):
            yield from map(_Fitted, shown.renderables)
        elif isinstance(shown, Table) and not _fit(shown, console, options):
            yield from _paragraphs(shown)
        else:
            yield shown


def _fit(table: Table, console: Console, options: ConsoleOptions) -> bool:
    """Set the widths of a table's columns so that no word breaks; tell whether the line has room for that."""
    endless = options.update_width(_ENDLESS)
    room = options.max_width - Measurement.get(console, endless, table).minimum
    spans = [(c, measure_renderables(console, endless, [c.header, *c.cells])) for c in table.columns]
    spans.sort(key=lambda each: each[1].span)
    for i, (column, (least, most)) in enumerate(spans):  # who wants least is served first; what is left is shared
        more = most - least if column.no_wrap else min(most - least, max(room, 0) // (len(spans) - i))
        column.width, room = least + more, room - more
    return room >= 0


def _paragraphs(table: Table) -> Iterator[Any]:
    """Write each row as its first cell, and below it the others with the names of their columns."""
    yield from filter(None, (table.title,))
    first, *others = table.columns
    for name, *cells in zip(first.cells, *(column.cells for column in others), strict=True):
        yield _text(name, "bold")
        named = [(column.header, cell) for column, cell in zip(others, cells, strict=True) if str(cell)]
        yield Padding(Text("\n").join(Text.assemble((f"{key} ", "dim"), _text(cell)) for key, cell in named), (0, 2))
    yield from filter(None, (table.caption,))


def _text(cell: Any, style: str = "") -> Any:
    return Text.from_markup(cell, style=style, overflow="fold") if isinstance(cell, str) else cell
